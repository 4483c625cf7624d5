"""Watching a run: which numbers of `jbn.health.metrics` crossed a limit, and at which step.

Two sorts of rules judge a number. A fixed limit, such as one dead channel, counts from the first
update. A limit that depends on the run, such as a drift three times larger than any before, counts
after `Changes.warmup` updates, and is taken from updates at which nothing was wrong.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn.core import validate
from jbn.health import export, page
from jbn.health.findings import REMEDIES, Finding, Limits, check_limits, printable
from jbn.health.reports import ModelReport

_LIMITS = Limits()
_SHARES = {"dead": "dead", "one-sided": "one_sided"}  # kinds whose number is a share of channels


class Changes(NamedTuple):
    """The limits that depend on the run. Each is a judgement; its reason stands here.

    Attributes:
        warmup: updates before anything is compared; the running statistics leave their initial
            values meanwhile.
        history: updates to compare with.
        drift: factor above the largest drift, and the largest log of spread, of the history.
            Batches from one source differ by less.
        level: factor between the input's standard deviation and that of the `steps` steps before,
            where the batch is known, else between the running one and that of `steps` steps ago:
            input 3 times larger moves it by 1.6 at momentum 0.99.
        steps: see `level`; also the newest updates that the history leaves out. Less than warmup.
        update: |change of W| / |W| in one step. Training that works is near 1e-3.
        jump: factor above the largest `update` of the history, and above the largest change of
            `scale`, `bias` and `weight` per step.
        gradient: factor above the largest `effective_lr` of the history. One batch that the model
            gets wrong multiplies it by 10, once the others are learned.
        moved: change of `scale`, `bias` or `weight` in one step that is never too large, relative
            to its value.
        worse: rise of a share that is told again.
        calm: updates within the limit after which a number has come back.
    """

    warmup: int = 50
    history: int = 100
    drift: float = 3.0
    level: float = 1.4
    steps: int = 20
    update: float = 0.5
    jump: float = 5.0
    gradient: float = 1000.0
    moved: float = 0.03
    worse: float = 0.25
    calm: int = 3


_CHANGES = Changes()


@dataclass(frozen=True)
class Event(Finding):
    """A finding at a step of the run.

    Attributes:
        step: the step at which the number crossed its limit, or had come back for good.
        back: whether it came back within the limit, instead of leaving it.
    """

    step: int
    back: bool = False

    def __str__(self) -> str:
        back = f"{printable(self.layer)}: {self.kind}: {self.what}"
        text = back if self.back else super().__str__()
        return f"step {self.step}: {text}"


class Monitor:
    """Keeps the metrics of a run, and says when one of them crosses a limit and when it comes back.

        monitor = jbn.health.Monitor()
        for step in range(steps):
            variables, metrics = train_step(variables, batch)  # metrics: jbn.health.metrics(...)
            for event in monitor.update(step, metrics):
                print(event)

    Attributes:
        events: all that was found, in order.
    """

    def __init__(
        self, *, limits: Limits = _LIMITS, changes: Changes = _CHANGES, keep: int = 1000
    ) -> None:
        """Make a monitor that has seen nothing.

        Args:
            limits: the fixed limits, those of `report`.
            changes: the limits that depend on the run.
            keep: updates whose metrics are kept; older ones are dropped.

        Raises:
            ValueError: keep smaller than what `changes` compares with.
            TypeError: arguments of another type.
        """
        check_limits(limits)
        if not isinstance(changes, Changes):
            raise TypeError(
                f"changes is {changes!r:.60}, expected jbn.health.Changes, such as "
                "Changes(warmup=100)"
            )
        keep = validate.positive(keep, "keep")
        if keep < max(changes.history, changes.warmup, changes.steps + 1):
            raise ValueError(
                f"keep is {keep}, expected at least {max(changes[:2])}: what changes.history and "
                "changes.warmup compare with"
            )
        self.events: list[Event] = []
        self._limits, self._changes, self._keep = limits, changes, keep
        self._series: dict[str, deque[tuple[int, float]]] = {}
        self._normal: dict[str, deque[float]] = {}  # values of updates at which nothing was wrong
        self._bounds: dict[str, float] = {}  # limits that depend on the run, as when crossed
        self._active: dict[tuple[str, str], Event] = {}
        self._shares: dict[tuple[str, str], float] = {}  # as last told
        self._calm: dict[tuple[str, str], int] = {}  # updates since it was last beyond its limit

    @property
    def active(self) -> tuple[Event, ...]:
        """What is beyond its limit now."""
        return tuple(self._active.values())

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps and values kept of one metric, such as "BatchNorm_0/drift"."""
        if name not in self._series:
            raise ValueError(f"no metric {name!r} yet, expected one of {sorted(self._series)}")
        steps, values = zip(*self._series[name], strict=True)
        return np.array(steps), np.array(values)

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics seen so far."""
        return tuple(self._series)

    def to_dict(self) -> dict[str, Any]:
        """Events and kept metrics as plain values; a number not finite becomes None."""
        series = {}
        for name in self.names:
            steps, values = self.series(name)
            series[name] = {"steps": steps, "values": values}
        return export.plain({"events": self.events, "active": self.active, "series": series})

    def to_json(self) -> str:
        """`to_dict` in strict JSON."""
        return export.to_json(self.to_dict())

    def to_html(self, reports: ModelReport | Mapping[str, ModelReport] | None = None) -> str:
        """A page that opens in a browser from disk, without network: what happened, and sparklines.

        Args:
            reports: of the run's checkpoints by label, or one of them; they add numbers and maps of
                the channels.
        """
        if isinstance(reports, ModelReport):
            reports = {"report": reports}
        return page.render(reports or {}, self)

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[Event]:
        """Take the metrics of a step.

        Args:
            step: of the run, an int not smaller than the one before.
            metrics: name -> scalar, as from `jbn.health.metrics`. Others, such as a loss, are kept
                and not judged. One transfer brings them all to the host.

        Returns:
            What crossed a limit at this step, and what came back (`back` is True).

        Raises:
            ValueError: step smaller than the last one.  TypeError: a metric that is no scalar, or
                other arguments of the wrong type. Nothing of the step is kept then.
        """
        try:
            step = validate.index(step)
        except TypeError:
            raise TypeError(f"step is {step!r:.60}, expected an int") from None
        if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
            raise TypeError(
                f"metrics is {metrics!r:.60}, expected a dict from names to scalars, as from "
                "jbn.health.metrics"
            )
        last = max((series[-1][0] for series in self._series.values()), default=step)
        if step < last:
            raise ValueError(
                f"step is {step} after step {last}, expected steps in order: a run that starts "
                "again from an earlier step takes a Monitor of its own"
            )
        values = {name: _scalar(name, v) for name, v in jax.device_get(dict(metrics)).items()}
        layers: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            layer, _, key = name.rpartition("/")
            layers.setdefault(layer, {})[key] = value
            self._series.setdefault(name, deque(maxlen=self._keep)).append((step, value))
        events = [
            event for layer, values in layers.items() for event in self._events(step, layer, values)
        ]
        self.events += events
        return events

    def _events(self, step, layer, values):
        """What changed for one layer: kinds that begin, get worse, or end."""
        found: dict[str, Any] = dict(self._crossed(layer, values))
        events = []
        for kind, what in found.items():
            key = layer, kind
            share: float = values.get(_SHARES.get(kind, ""), 0.0)
            worse = share >= self._shares.get(key, share) + self._changes.worse
            if key not in self._active or worse:
                self._active[key] = Event(layer, kind, (), what, REMEDIES[kind], step)
                self._shares[key] = share
                events.append(self._active[key])
        for key, event in list(self._active.items()):
            if key[0] != layer:
                continue
            self._calm[key] = 0 if key[1] in found else self._calm.get(key, 0) + 1
            if self._calm[key] == self._changes.calm:
                what = f"back within the limit that it crossed at step {event.step}"
                events.append(Event(*key, (), what, "none needed", step, back=True))
                del self._active[key]
                self._shares.pop(key, None)
        return events

    def _crossed(self, layer, v) -> Iterator[tuple[str, str]]:
        """Kind and words of everything that is beyond its limit now, worst kinds first."""
        limits, changes = self._limits, self._changes
        if v.get("missing"):
            yield "missing", "mean or var is missing or is no array"
        if v.get("nonfinite"):
            yield "not finite", f"{v['nonfinite']:.0f} values are NaN or infinite"
        dying = "drift" not in v and self._decays(f"{layer}/std")
        if v.get("dead"):
            yield "dead", f"the input of {v['dead']:.0%} of the channels does not vary"
        elif dying:
            yield "dead", "the running variance only decays: the input stopped varying"
        elif v.get("signal", 1.0) < limits.shrunk:
            what = f"smallest standard deviation of a normalized channel {v['signal']:.3g}"
            yield "variance near eps", what
        if v.get("std", 0.0) > limits.magnitude:
            yield "overflow", f"running standard deviation {v['std']:.3g}"
        if v.get("one_sided"):
            yield "one-sided", f"{v['one_sided']:.0%} of the channels lie on one side of zero"
        if v.get("ratio", 0.0) > limits.ratio:
            yield "cancellation", f"|mean| / std is {v['ratio']:.3g}"
        largest = max((value for _, value in self._series.get(f"{layer}/scale", ())), default=0.0)
        if v.get("scale", 1.0) < limits.scale * largest:
            yield "prunable", f"the scales fell from {largest:.3g} to {v['scale']:.3g}"
        newest = list(islice(reversed(self._series.get(f"{layer}/std", ())), changes.warmup))
        if len(newest) == changes.warmup and all(std == 1.0 for _, std in newest):
            yield "never updated", f"the running variance is still 1 after {len(newest)} updates"
        if drift := [*self._drift(layer, v)]:
            yield "drift", ", ".join(drift)
        if scale := self._scale(layer, v):
            yield "input scale", scale
        if fast := [*self._fast(layer, v)]:
            yield "learning rate", ", ".join(fast)

    def _drift(self, layer, v) -> Iterator[str]:
        limits, changes = self._limits, self._changes
        if "drift" in v:
            bound = self._bound(f"{layer}/drift", v["drift"], changes.drift, limits.drift)
            if bound is not None:
                what = (
                    "the mean of this batch is {:.3g} running standard deviations from the running"
                )
                yield what.format(v["drift"]) + f" mean, the limit is {bound:.3g}"
        if "spread" in v:
            log = math.log(v["spread"]) if v["spread"] > 0 else math.nan
            bound = self._bound(f"{layer}/spread", log, changes.drift, math.log(limits.spread))
            if bound is not None:
                what = (
                    f"its standard deviation differs by a factor {v['spread']:.3g} from the running"
                )
                yield f"{what} one, the limit is {math.exp(bound):.3g}"

    def _scale(self, layer, v) -> str:
        """Where the input's standard deviation went, in words, if beyond its limit; else ""."""
        known = "input_std" in v
        name = f"{layer}/{'input_std' if known else 'std'}"
        series, steps = self._series.get(name, ()), self._changes.steps
        if len(series) < 2 or self._decays(name):
            return ""
        now, std = series[-1]
        before = [(s, old) for s, old in islice(reversed(series), 1, steps + 2) if old > 0]
        if known:
            past = np.median([old for s, old in before if s >= now - steps] or [math.nan])
        else:
            past = next((old for s, old in before if s <= now - steps), math.nan)
        log = abs(math.log(std / past)) if std > 0 and past > 0 else math.nan
        bound = self._bound(name, log, 1.5, math.log(self._changes.level))
        which = "standard deviation of the input" if known else "running standard deviation"
        return "" if bound is None else f"the {which} went from {past:.3g} to {std:.3g}"

    def _fast(self, layer, v) -> Iterator[str]:
        changes = self._changes
        if "update" in v:
            bound = self._bound(f"{layer}/update", v["update"], changes.jump, 0.0, changes.update)
            if bound is not None:
                what = f"the weights before changed by {v['update']:.3g} of their norm in one step"
                yield f"{what}, the limit is {bound:.3g}"
        if "effective_lr" in v:
            bound = self._bound(f"{layer}/effective_lr", v["effective_lr"], changes.gradient, 0.0)
            if bound is not None:
                yield f"|gradient| / |W|^2 is {v['effective_lr']:.3g}, the limit is {bound:.3g}"
        for key in ("weight", "scale", "bias"):
            series = self._series.get(f"{layer}/{key}", ())
            if key not in v or len(series) < 2:
                continue
            (before, old), (now, new) = series[-2], series[-1]
            change = abs(new - old) / max(now - before, 1)
            floor = changes.moved * max(abs(old), 0.2)  # biases start at 0
            bound = self._bound(f"{layer}/{key}", change, changes.jump, floor)
            if bound is not None:
                what = f"the root mean square of {key}" if key != "weight" else "|W|"
                took = "one step" if now - before == 1 else f"{now - before} steps"
                yield f"{what} went from {old:.3g} to {new:.3g} in {took}"

    def _bound(self, name, value, factor, floor, ceiling=math.inf):
        """The limit that a number crossed, else None, and then the number joins the history.

        The limit is a factor above the history's largest number, and stays as it is while crossed.
        The newest numbers are left out, so that one which grows slowly does not raise its limit.
        """
        normal = self._normal.setdefault(name, deque(maxlen=self._changes.history))
        bound = self._bounds.pop(name, None)
        if bound is None:
            earlier = list(normal)[: -self._changes.steps]
            warm = len(normal) >= self._changes.warmup
            bound = min(max(floor, factor * max(earlier)) if warm else math.inf, ceiling)
        if value > bound:
            self._bounds[name] = bound
            return bound
        if math.isfinite(value):
            normal.append(value)
        return None

    def _decays(self, name) -> bool:
        """Whether a running standard deviation shrank by one and the same factor per step in the
        last three updates, and did not before: then the batches' variance became zero.

        Batches that vary change the factor by far more than the tolerance, 0.02 % of its logarithm
        and float32's rounding. The initial value decays alike, but from the first update on.
        """
        series = list(self._series.get(name, ()))
        if len(series) <= self._changes.warmup:
            return False
        slopes = [
            (math.log(new) - math.log(old)) / (now - before) if old > 0 < new else math.nan
            for (before, old), (now, new) in pairwise(series)
            if now > before
        ]
        if len(slopes) < 4:
            return False
        last = slopes[-3:]
        slope = last[-1]
        tolerance = 2e-4 * abs(slope) + 2e-7
        return (
            slope < -1e-4
            and all(abs(other - slope) < tolerance for other in last)
            and any(abs(other - slope) > 0.1 * abs(slope) for other in slopes)
        )


def _scalar(name, value):
    array = np.asarray(value)
    real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer, np.bool_))
    if array.shape or not real:
        raise TypeError(f"metric {name!r} is {value!r:.60}, expected a scalar")
    return float(array)
