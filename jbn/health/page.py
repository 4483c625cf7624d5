"""The HTML report: one file that needs no network and opens from disk. Layers are sorted by
trouble; each opens to its warnings, sparklines, numbers per checkpoint, and maps of its channels.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from jbn.health.assets import SCRIPT, STYLE
from jbn.health.export import to_json
from jbn.health.findings import REMEDIES

_RANK = {kind: rank for rank, kind in enumerate(REMEDIES)}  # written with the worst first
_POINTS = 240  # of a sparkline: more than its pixels
# Attribute of a report, title, legend, the value drawn in the neutral color, and the distance from
# it that is drawn in the full color.
_MAPS = (
    ("drift", "drift", "running standard deviations, blue below and orange above 0", 0, 3),
    ("signal", "signal", "1 in a working channel, blue where the input does not vary", 1, 1),
    ("ratio", "|mean| / std", "full color at 100", 0, 100),
    ("one_sided", "output mean / std", "beyond 4 on either side it hardly crosses 0", 0, 4),
    ("scale", "scale", "neutral at 0, where the channel can be pruned", 0, 1),
)


def render(reports: Mapping[str, Any], monitor: Any = None, title: str = "Batch norms") -> str:
    """The page of one report or of several of one run by label, in order, and of a monitor."""
    layers = {m.layer: {} for report in reports.values() for m in report.layers}
    for label, report in reports.items():
        for m in report.layers:
            layers[m.layer][label] = m
    events, series = [], {}
    if monitor is not None:
        events = monitor.events
        for name in monitor.names:
            layer, _, key = name.rpartition("/")
            series.setdefault(layer, {})[key] = monitor.series(name)
    for name in (*series, *(event.layer for event in events)):
        if name:
            layers.setdefault(name, {})
    rows = [_Row(name, by, reports, series.get(name, {}), events) for name, by in layers.items()]
    rows.sort(key=lambda row: row.trouble)
    worried = sum(bool(row.now) for row in rows)
    now = sum(len(row.now) for row in rows)
    crossed = sum(not event.back for event in events)
    sentence = (
        f"{_count(len(rows), 'layer')}, {_count(now, 'warning')}"
        + (f" in {_count(worried, 'layer')}" if now else "")
        + (f"; {_count(crossed, 'limit')} crossed in training" if crossed else "")
        + (f"; {len(reports)} checkpoints: {', '.join(reports)}" if len(reports) > 1 else "")
    )
    marks = (
        " Red marks: a limit is crossed; green marks: the value is back within it."
        if events
        else ""
    )
    body = [
        f"<h1>{_text(title)}</h1><p class=soft>{_text(sentence)}.</p>",
        _timeline(events, monitor),
        "".join(
            f"<h2>{_text(k)}</h2>{_spark(k, v[0], v[1], [])}" for k, v in series.get("", {}).items()
        ),
        "<h2>Layers, the most troubled first</h2>"
        f"<p class=soft>A click on a layer shows its warnings and channels.{marks}</p>"
        "<div class=head><span>layer</span>"
        "<span>warnings</span><span class=number>channels</span><span class=number>drift</span>"
        "<span class=number>signal</span><span>over time</span></div>",
        *(row.html() for row in rows),
    ]
    maps = {row.name: row.maps() for row in rows}
    data = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", to_json(maps))
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!DOCTYPE html><html lang=en><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}"
        f'<script type="application/json" id="channels">{data}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


class _Row:
    """One layer: what every checkpoint and the monitor say of it."""

    def __init__(self, name, by, reports, series, events):
        self.name, self.by, self.labels = name, by, list(reports)
        self.series = series or (_over_checkpoints(by, self.labels) if len(by) > 1 else {})
        self.events = [event for event in events if event.layer == name]
        open_events = {event.kind: event for event in self.events}
        last = by.get(self.labels[-1]) if self.labels else None
        self.last = last
        self.now = [*(last.findings if last else ())]
        self.now += [e for e in open_events.values() if not e.back]
        self.past = [e for e in self.events if not e.back and e not in self.now]

    @property
    def trouble(self):
        ranks = lambda found: min((_RANK[f.kind] for f in found), default=len(_RANK))
        return ranks(self.now), -len(self.now), ranks(self.past), -len(self.past)

    def html(self) -> str:
        kinds = dict.fromkeys(f.kind for f in self.now)
        past = dict.fromkeys(f.kind for f in self.past if f.kind not in kinds)
        chips = "".join(f"<span class=kind>{_text(kind)}</span>" for kind in kinds)
        chips += "".join(f'<span class="kind back">{_text(kind)}, past</span>' for kind in past)
        newest = lambda key: self.series[key][1][-1] if key in self.series else None
        numbers = self.last.summary() if self.last else {}
        drift, signal = numbers.get("max drift"), numbers.get("min signal")
        drift = newest("drift") if drift is None else drift
        signal = newest("signal") if signal is None else signal
        size = str(self.last.signal.size) if self.last else "-"
        return (
            f'<details data-layer="{_text(self.name)}"><summary>'
            f"<span class=name>{_text(self.name)}</span>"
            f"<span>{chips or '<span class=fine>healthy</span>'}</span>"
            f"<span class=number>{size}</span>"
            f"<span class=number>{_number(drift)}</span><span class=number>{_number(signal)}</span>"
            f"<span>{self._worst_spark()}</span></summary><div class=inside>"
            f"{self._warnings()}{self._sparks()}{self._numbers()}{self._channel_maps()}"
            "</div></details>"
        )

    def _worst_spark(self):
        """The series that belongs to the worst warning."""
        of_kind = {
            "dead": "dead",
            "drift": "drift",
            "input scale": "input_std",
            "learning rate": "update",
            "one-sided": "one_sided",
            "not finite": "nonfinite",
            "cancellation": "ratio",
        }
        worst = sorted([*self.now, *self.past], key=lambda f: _RANK[f.kind])
        keys = [of_kind.get(f.kind) for f in worst]
        keys += ["input_std", "std", "weight", "drift", "warnings", "min signal", *self.series]
        key = next((key for key in keys if key in self.series), None)
        if key is None:
            return ""
        steps, values = self.series[key]
        return f"<small>{_text(key)}</small>{_svg(steps, values, self.events)}"

    def _warnings(self):
        return "".join(
            f'<div class="warning{"" if f in self.now else " back"}">'
            f"<p><b>{_text(_headline(f, f in self.now))}</b></p><p>{_text(f.what)}.</p>"
            f"<p class=soft>Remedy: {_text(f.remedy)}.</p></div>"
            for f in (*self.now, *self.past)
        )

    def _sparks(self):
        if not self.series:
            return ""
        sparks = "".join(_spark(key, v[0], v[1], self.events) for key, v in self.series.items())
        return f"<h3>Over time</h3><div class=sparks>{sparks}</div>"

    def _numbers(self):
        if not self.by:
            return ""
        rows = {label: self.by[label].summary() for label in self.labels if label in self.by}
        head = "".join(f"<th class=number>{_text(label)}</th>" for label in rows)
        body = "".join(
            f"<tr><td>{_text(key)}</td>"
            + "".join(f"<td class=number>{_number(v[key])}</td>" for v in rows.values())
            + "</tr>"
            for key in next(iter(rows.values()))
        )
        return (
            f"<h3>Numbers</h3><div class=scroll><table><tr><th></th>{head}</tr>{body}</table></div>"
        )

    def _channel_maps(self):
        return '<h3>Channels</h3><div class="maps"></div>' if self.by else ""

    def maps(self) -> dict:
        """By label: the names of the channels, and the maps that are known."""
        result = {}
        for label, m in self.by.items():
            shape = np.shape(m.mean)
            names = [",".join(map(str, index)) for index in np.ndindex(shape)]
            known = [
                {"title": title, "legend": legend, "zero": zero, "reach": reach}
                | {"values": [_short(v) for v in np.ravel(getattr(m, key)).tolist()]}
                for key, title, legend, zero, reach in _MAPS
                if getattr(m, key) is not None
            ]
            result[label] = {"names": names, "maps": known}
        return result


def _over_checkpoints(by, labels):
    """The numbers of a layer as series, with the step in each label, else its place."""
    present = [label for label in labels if label in by]
    steps = [
        int(s[-1]) if (s := re.findall(r"\d+", label)) else i for i, label in enumerate(present)
    ]
    if steps != sorted(set(steps)):
        steps = list(range(len(present)))
    summaries = [by[label].summary() for label in present]
    series = {key: [s[key] for s in summaries] for key in summaries[0]}
    series["warnings"] = [len(by[label].findings) for label in present]
    known = {key: np.array(v, float) for key, v in series.items() if None not in v}
    return {key: (np.array(steps), v) for key, v in known.items() if not np.isnan(v).all()}


def _timeline(events, monitor):
    if monitor is None:
        return ""
    if not events:
        return "<h2>What happened</h2><p class=fine>Nothing crossed a limit.</p>"
    ends = {(e.layer, e.kind, e.what): e.step for e in events if e.back}
    end = lambda e: ends.get(
        (e.layer, e.kind, f"back within the limit that it crossed at step {e.step}")
    )
    rows = "".join(
        f"<tr><td class=number>{e.step}</td>"
        f'<td><a href="#{quote(e.layer)}">{_text(e.layer)}</a></td>'
        f"<td><span class=kind>{_text(e.kind)}</span></td><td>{_text(e.what)}</td>"
        f"<td class=number>{'' if end(e) is None else end(e)}</td></tr>"
        for e in events
        if not e.back
    )
    return (
        "<h2>What happened</h2><div class=scroll><table class=events><tr><th class=number>step</th>"
        "<th>layer</th><th>kind</th><th>what</th><th class=number>back at</th></tr>"
        f"{rows}</table></div>"
    )


def _spark(key, steps, values, events):
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (math.nan, math.nan)
    return (
        f"<div class=spark><b>{_text(key)}</b> {_number(values[-1])}{_svg(steps, values, events)}"
        f"<div class=range><span>{_number(low)} to {_number(high)}</span>"
        f"<span>steps {steps[0]} to {steps[-1]}</span></div></div>"
    )


def _svg(steps: Any, values: Any, events: Sequence) -> str:
    """A line over the steps, broken where values are not finite, with a mark at every event."""
    x, y = _thinned(np.asarray(steps, float), np.asarray(values, float))
    finite = y[np.isfinite(y)]
    if finite.size and finite.min() > 0 and finite.max() > 100 * finite.min():
        y = np.log(np.where(y > 0, y, np.nan))
        finite = y[np.isfinite(y)]
    span = lambda v, low, high, size: (
        (v - low) / (high - low) * size if high > low else np.where(np.isfinite(v), size / 2, v)
    )
    across = lambda v: span(v, x[0], x[-1], 100)
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    up = 28 - span(y, low, high, 26) if finite.size else y
    path, pen = "", "M"
    for px, py in zip(across(x), up, strict=True):
        path, pen = (f"{path}{pen}{px:.4g} {py:.4g}", "L") if np.isfinite(py) else (path, "M")
    if "L" not in path and path:
        path += "h1"
    marks = "".join(
        f'<line x1="{at:.4g}" x2="{at:.4g}" y1="0" y2="30"{" class=back" if e.back else ""}>'
        f"<title>step {e.step}: {_text(e.kind)}{' is over' if e.back else ''}</title></line>"
        for e in events
        if 0 <= (at := float(across(np.float64(e.step)))) <= 100
    )
    return f'<svg viewBox="0 0 100 30" preserveAspectRatio="none">{marks}<path d="{path}"/></svg>'


def _thinned(x, y):
    """At most about _POINTS of them: the smallest and the largest of each stretch."""
    if x.size <= _POINTS:
        return x, y
    keep = {0, x.size - 1}
    for part in np.array_split(np.arange(x.size), _POINTS // 2):
        numbers = np.nan_to_num(y[part], nan=0.0)
        broken = part[~np.isfinite(y[part])][:1]
        keep.update(map(int, (part[numbers.argmin()], part[numbers.argmax()], *broken)))
    chosen = sorted(keep)
    return x[chosen], y[chosen]


def _headline(finding, lasts):
    step = getattr(finding, "step", None)
    more = f" and {len(finding.channels) - 24} more" if len(finding.channels) > 24 else ""
    channels = ", ".join(map(str, finding.channels[:24])) + more
    where = f", channel{'s' if len(finding.channels) > 1 else ''} {channels}" if channels else ""
    when = "" if step is None else f" {'since' if lasts else 'at'} step {step}"
    return finding.kind + when + where


def _text(value):
    return html.escape(str(value), quote=True)


def _number(value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(value):
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _count(n, noun):
    return f"{n} {noun}{'' if n == 1 else 's'}"
