"""Pictures of results (extra bench). Titles say what was found; jbn has one color everywhere."""

import contextlib
import importlib.util
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from jbn.bench.report import Row
from jbn.plot import COLORS

CUT = 3  # longer bars end here, and their labels say how long they would be
JBN, ROOF = COLORS["jbn"], COLORS["without"]
# jbn's kernels beside its default, whose color is JBN.
_KERNELS = {"triton": COLORS["other"], "mosaic_gpu": "#8172b3", "mosaic_tpu": "#8172b3"}
_OPERATIONS = {
    "bn": "batch norm",
    "bn_relu": "BN + ReLU",
    "bn_add_relu": "BN + add + ReLU",
}
_MODES = {"forward": "forward", "forward_backward": "forward and backward", "eval": "evaluation"}


@contextlib.contextmanager
def figure(path: str | os.PathLike, width: float, height: float) -> Iterator[Any]:
    """Axes whose picture is saved to path when the block ends."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'jbn[bench]'"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure((width, height), layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    FigureCanvasAgg(picture).print_figure(os.fspath(path), dpi=120)


def plot_ratios(path: str | os.PathLike, rows: Sequence[Row], where: str) -> None:
    """Bars of the time over flax's, a group for each problem.

    flax is the line at 1; where a copy was timed too, a tick across each group is the time of the
    passes over memory that cannot be avoided.
    """
    series = list(dict.fromkeys(_peer(row) for row in rows if row["peer"] != "flax.linen"))
    title = _found(rows, "ratio_vs_flax", "jbn takes {} of flax.linen's time")
    with figure(path, 9, _height(rows, len(series))) as axes:
        value = lambda row: row["ratio_vs_flax"]
        _bars(axes, rows, series, value, "{:.2f}", cut=CUT)
        for i, group in enumerate(_groups(rows)):
            row = next(row for row in rows if _label(row) == group)
            if "times_roofline" in row:
                _tick(axes, row["ratio_vs_flax"] / row["times_roofline"], i, "at a copy's speed")
        axes.axvline(1, color="black", linewidth=1, label="flax.linen")
        _finish(axes, f"time / time of flax.linen (less is better; bars end at {CUT})")
        axes.set_title(f"{title}\n{where}", fontsize=9)


def plot_traffic(path: str | os.PathLike, rows: Sequence[Row], where: str) -> None:
    """Bars of what a layer or a train step costs on a target, a group for each.

    Layers by the bytes they move in units of T, the bytes of x, with a tick at the fewest. Train
    steps, where there are no layers, by the figure whose ratio the table gives.
    """
    layers = [row for row in rows if "moved_T" in row]
    rows = layers or list(rows)
    value = lambda row: row["moved_T"] if layers else row["ratio_vs_flax"]
    what = "moves {} of flax.linen's bytes" if layers else "costs {} of flax.linen"
    title = _found(rows, "ratio_vs_flax", f"jbn {what}")
    with figure(path, 9, _height(rows, 2)) as axes:
        _bars(axes, rows, ["flax.linen", "jbn"], value, "{:.1f}" if layers else "{:.3f}")
        for i, group in enumerate(_groups(layers)):
            row = next(row for row in rows if _label(row) == group)
            _tick(axes, row["bound_T"], i, "fewest passes over memory")
        measure = "bytes moved / bytes of x" if layers else f"{_measures(rows)} / flax.linen's"
        _finish(axes, f"{measure} (less is better)")
        axes.set_title(f"{title}\n{where}", fontsize=9)


def plot_bandwidth(path: str | os.PathLike, rows: Sequence[Row], where: str) -> None:
    """GB/s of each kernel on each shape, beside XLA's; the best copy is the line."""
    copies = [row["GB_per_s"] for row in rows if row.get("part") == "copy" and "GB_per_s" in row]
    rows = [row for row in rows if str(row.get("part", "")).startswith("speed")]
    rows = [row | {"peer": row["implementation"]} for row in rows if "GB_per_s" in row]
    series = list(dict.fromkeys(row["implementation"] for row in rows))
    best = max(rows, key=lambda row: row["GB_per_s"])
    title = f"fastest: {best['implementation']} with {best['GB_per_s']:.0f} GB/s"
    if copies:
        title += f", a copy reaches {max(copies):.0f}"
    with figure(path, 9, _height(rows, len(series))) as axes:
        _bars(axes, rows, series, lambda row: row["GB_per_s"], "{:.0f}", peer="implementation")
        if copies:
            axes.axvline(max(copies), color=ROOF, label="copy")
        _finish(axes, "GB/s of the bytes that cannot be avoided (more is better)")
        axes.set_title(f"{title}\n{where}", fontsize=9)


def _label(row):
    """A name and the case in words, such as "BN + add + ReLU, forward and backward, bfloat16"."""
    operation, slash, layer = row["case"].partition("/")
    words = [_OPERATIONS[operation]] if slash and operation in _OPERATIONS else []
    mode = row.get("mode", "")
    words += [word for word in (_MODES.get(mode, mode), row.get("dtype", "")) if word]
    place = [row["target"]] if "target" in row else []
    place.append(layer.replace("_", " ") if slash else row["case"])
    return ": ".join(place) + ("\n" + ", ".join(words) if words else "")


def _groups(rows):
    return list(dict.fromkeys(map(_label, rows)))


def _peer(row):
    return f"{row['peer']} {row.get('implementation', '')}".strip()


def _color(name, index, count):
    """jbn and flax as in every picture; kernels have colors of their own, others shades of grey."""
    library, _, implementation = name.partition(" ")
    if library == "jbn" or library in _KERNELS:
        return _KERNELS.get(implementation or library, JBN)
    if library.startswith("flax"):
        return COLORS["peer"]
    return f"{0.65 + 0.25 * index / max(1, count):.2f}"


def _bars(axes, rows, series, value, form, *, peer=None, cut=None):
    """Bars of each series, in groups of one label, with the value at the end of each."""
    groups, height = _groups(rows), 0.8 / max(1, len(series))
    for index, name in enumerate(series):
        of_series = [row for row in rows if (row[peer] if peer else _peer(row)) == name]
        if not of_series and name == "jbn":  # under the names of its implementations
            of_series = [row for row in rows if row["peer"] == "jbn"]
        values = [value(row) for row in of_series]
        drawn = axes.barh(
            [groups.index(_label(row)) + index * height for row in of_series],
            [v if cut is None else min(v, cut) for v in values],
            0.9 * height,
            color=_color(name, index, len(series)),
            label=name,
        )
        axes.bar_label(drawn, [form.format(v) for v in values], padding=2, fontsize=7)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], groups, fontsize=8)


def _tick(axes, value, group, label):
    axes.vlines(value, group - 0.2, group + 0.7, ROOF, label=None if group else label)


def _finish(axes, label):
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7, loc="best")


def _height(rows, series):
    return 1.4 + len(_groups(rows)) * (0.3 + 0.17 * max(1, series))


def _found(rows, key, sentence):
    """The sentence with the median over jbn's rows, and their range if there are several."""
    values = sorted(row[key] for row in rows if row["peer"] == "jbn")
    if not values:
        return "jbn is not among what was measured"
    text = f"{statistics.median(values):.2f}"
    if len(values) > 1:
        text += f" (median of {len(values)}; {values[0]:.2f} to {values[-1]:.2f})"
    return sentence.format(text)


def _measures(rows):
    return " or ".join(dict.fromkeys(row["ratio_of"].replace("_", " ") for row in rows))
