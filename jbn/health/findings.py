"""What counts as a warning: the limits, the kinds with their remedies, and a layer's numbers turned
into findings. Measuring is done in channels.py, and watching over time in monitor.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Limits(NamedTuple):
    """Beyond which values a number is a warning. Each is a judgement; its reason stands here.

    Attributes:
        drift: |batch mean - running mean| in running standard deviations, beyond sampling noise
            (4 / sqrt(count)).
        spread: factor between the batch's and the running standard deviation, either way, beyond
            the same noise.
        constant: standard deviation of the normalized value (1 in a working channel) up to which
            the channel is dead.
        shrunk: the same, below which eps is felt: 0.9 is a variance of 4.3 eps.
        ratio: |mean| / std: at 100, bfloat16 rounds the input by 0.1 standard deviations, and
            E[x^2] - E[x]^2 in float32 is off by about 1e-3 of the variance.
        scale: |scale| beside the layer's largest; a thousandth is less than bfloat16 adds to a sum.
        one_sided: distance of the output from zero in its own standard deviations; 3e-5 of normal
            values cross 4.
        start: weight that the initial values still have in the running averages.
        replicas: difference between replicas, in running standard deviations (or of the largest
            parameter).
        magnitude: values whose squares float32 cannot hold (its largest is 3.4e38). Statistics in
            float64 are not held to it.
    """

    drift: float = 0.5
    spread: float = 2.0
    constant: float = 0.1
    shrunk: float = 0.9
    ratio: float = 100.0
    scale: float = 1e-3
    one_sided: float = 4.0
    start: float = 0.05
    replicas: float = 1e-3
    magnitude: float = 1e19


# By kind, the worst first: reports are sorted by this order.
REMEDIES = {
    "missing": (
        "save the whole layer, mean and var, or take this layer's statistics from another "
        "checkpoint"
    ),
    "not finite": (
        "restore the last good checkpoint; with skip_nonfinite=True such a batch no longer changes "
        "the running statistics"
    ),
    "negative count": (
        "the variables are damaged, or the count overflowed: take it from another checkpoint"
    ),
    "negative variance": (
        "the variables are damaged or were converted wrongly: convert them again with jbn.convert"
    ),
    "overflow": (
        "divide the input by a constant before this layer, or keep it and the statistics in "
        "float64: float32 cannot hold the square of such a value, so the variance becomes "
        "infinite"
    ),
    "learning rate": (
        "lower the learning rate or clip the gradient, and go back to a checkpoint from "
        "before this step"
    ),
    "dead": (
        "look at the layer before, whose unit always gives the same value (a ReLU that never "
        "opens, an input that is never used): prune the channel or initialize its weights "
        "again"
    ),
    "never updated": (
        "keep the state that training returns (linen: mutable=['batch_stats']; nnx: "
        "model.train()), or recalibrate"
    ),
    "input scale": (
        "check that the data are preprocessed as before, and look at the layer before, whose "
        "output changed its scale"
    ),
    "drift": (
        "recalibrate with jbn.recalibrate; check that every training step keeps its state, "
        "and that this batch was preprocessed like the training data"
    ),
    "replicas disagree": (
        "pass axis_name to the layer, or pool the states before saving; restart a replica "
        "that left the others"
    ),
    "few updates": "train longer, lower the momentum, or recalibrate with jbn.recalibrate",
    "one-sided": (
        "a ReLU that follows is always off or never cuts: move the bias towards zero, put "
        "weight decay on it, or lower the learning rate"
    ),
    "off": (
        "if a ReLU follows, the channel is off and learns nothing: raise its bias, or lower "
        "the learning rate"
    ),
    "saturated": (
        "if a ReLU follows, it never cuts and the channel is linear; a sigmoid or tanh is "
        "saturated: lower the bias, or put weight decay on it"
    ),
    "cancellation": (
        "take away the constant that the layer before adds, and keep this layer's input in "
        "float32; jbn's float32 statistics are exact here, one-pass implementations lose the "
        "variance"
    ),
    "variance near eps": (
        "enlarge the weights of the layer before, or lower eps if such small values matter"
    ),
    "prunable": (
        "prune the channel, whose output is its bias whatever the input (a residual branch "
        "that starts at scale 0 looks like this until it has trained)"
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        layer: path of the layer, joined by "/".
        kind: such as "drift" or "dead".
        channels: the indices concerned, ints (tuples where the features have several axes); () for
            the layer as a whole.
        what: what was measured.
        remedy: what to do about it.
    """

    layer: str
    kind: str
    channels: tuple
    what: str
    remedy: str

    def __str__(self) -> str:
        where = f"{printable(self.layer)}{_named(self.channels)}"
        return f"{where}: {self.kind}: {self.what}. Remedy: {self.remedy}."


@dataclass(frozen=True)
class Numbers:
    """What was measured of one layer. Arrays are float64 of the shape of the features; None where a
    thing is not known.

    Attributes:
        layer: its path.
        scale, bias, mean, var: its variables (of the first replica, where there are several); of
            complex ones the magnitudes, as of drift and one_sided.
        eps: of the layer.
        updates: batches that the state has averaged; flax trees do not count them, so there it is
            known only where a channel tells: see `start_weight`.
        start_weight: what the initial values weigh in the running averages, momentum^updates. The
            count tells, or a channel whose input was always zero: its variance still equals
            momentum^updates, and its mean 0. None where neither is known.
        nonfinite: how many values are not finite, by name, over all replicas.
        finite: bool, whether all the values of a channel are finite in all replicas.
        count: values per channel behind the moments; None without moments, as drift and spread.
        drift: (batch mean - running mean) / running standard deviation.
        spread: batch standard deviation / running standard deviation.
        input_var: variance of the input, of the batch if its moments are known, else the running
            one.
        signal: standard deviation of the normalized value in training,
            sqrt(input_var / (input_var + eps)).
        ratio: |running mean| / running standard deviation.
        one_sided: mean of the output in its own standard deviations: of the batch in evaluation, or
            in training.
        disagreement: by replica, the largest distance from the median one; None where there is only
            one.
        overflow: bool, whether a mean or a standard deviation is beyond `Limits.magnitude`.
    """

    layer: str
    scale: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    eps: float
    updates: int | None
    start_weight: float | None
    nonfinite: dict[str, int]
    finite: np.ndarray
    count: np.ndarray | None
    drift: np.ndarray | None
    spread: np.ndarray | None
    input_var: np.ndarray
    signal: np.ndarray
    ratio: np.ndarray
    one_sided: np.ndarray
    disagreement: np.ndarray | None
    overflow: np.ndarray

    @property
    def never_updated(self) -> bool:
        """By the count, or where there is none, by values that are exactly those of
        initialization.
        """
        if self.updates is not None:
            return self.updates == 0
        return bool((self.mean == 0).all() and (self.var == 1).all())


def check_limits(limits: Limits) -> None:
    if not isinstance(limits, Limits):
        raise TypeError(
            f"limits is {limits!r:.60}, expected jbn.health.Limits, such as Limits(drift=1.0)"
        )


def findings(m: Numbers, limits: Limits) -> tuple[Finding, ...]:
    """All that is over a limit. A broken, dead or pruned channel is named for that alone."""
    fine = m.finite & (m.var >= 0) & ~m.overflow
    dead = fine & (m.signal <= limits.constant)
    alive = fine & ~dead
    prunable = np.zeros_like(fine)
    if m.scale is not None:
        prunable = fine & (np.abs(m.scale) <= limits.scale * np.abs(m.scale[fine]).max(initial=0))
    with np.errstate(all="ignore"):
        found = [
            *_broken(m),
            *_updates(m, limits),
            *_drift(m, limits, alive),
            *_variance(m, limits, dead, alive),
            *_precision(m, limits, alive),
            *_output(m, limits, prunable, alive & ~prunable),
            *_replicas(m, limits),
        ]
    return tuple(found)


def _broken(m) -> Iterator[Finding]:
    if any(m.nonfinite.values()):
        counts = ", ".join(f"{n} in {name}" for name, n in m.nonfinite.items() if n)
        yield _finding(m, "not finite", ~m.finite, f"NaN or infinity ({counts})")
    negative = m.finite & (m.var < 0)
    if negative.any():
        what = f"running variance {_range(m.var[negative])}"
        yield _finding(m, "negative variance", negative, what)
    if m.overflow.any():
        what = (
            f"mean {_range(m.mean[m.overflow])}, standard deviation "
            f"{_range(np.sqrt(m.var[m.overflow]))}: the squares of such values overflow float32"
        )
        yield _finding(m, "overflow", m.overflow, what)


def _updates(m, limits) -> Iterator[Finding]:
    if m.updates is not None and m.updates < 0:
        yield _finding(m, "negative count", (), f"{m.updates} batches averaged")
    elif m.never_updated:
        what = "the running statistics are those of initialization"
        yield _finding(m, "never updated", (), what)
    elif m.start_weight is not None and m.start_weight > limits.start:
        what = f"the initial values still weigh {m.start_weight:.0%} after {m.updates} updates"
        yield _finding(m, "few updates", (), what)


def _drift(m, limits, alive) -> Iterator[Finding]:
    if m.drift is None or m.never_updated:
        return
    noise = 4 / np.sqrt(m.count)
    wider = np.abs(np.log(np.maximum(m.spread, np.finfo(float).tiny)))
    moved = alive & (
        (np.abs(m.drift) > limits.drift + noise) | (wider > np.log(limits.spread) + noise)
    )
    if moved.any():
        what = (
            f"the mean of this batch is up to {np.abs(m.drift[moved]).max():.3g} running standard "
            f"deviations from the running mean, its standard deviation {_range(m.spread[moved])} "
            "times the running one"
        )
        yield _finding(m, "drift", moved, what)


def _variance(m, limits, dead, alive) -> Iterator[Finding]:
    what = "running variance" if m.count is None else "variance of the batch"
    if dead.any():
        text = f"the input does not vary, {what} {_range(m.input_var[dead])}"
        yield _finding(m, "dead", dead, text)
    shrunk = alive & (m.signal < limits.shrunk)
    if shrunk.any():
        text = f"{what} {_range(m.input_var[shrunk])}, eps {m.eps:g}"
        yield _finding(m, "variance near eps", shrunk, text)


def _precision(m, limits, alive) -> Iterator[Finding]:
    lossy = alive & (m.ratio > limits.ratio)
    if lossy.any():
        yield _finding(m, "cancellation", lossy, f"|mean| / std is {_range(m.ratio[lossy])}")


def _output(m, limits, prunable, judged) -> Iterator[Finding]:
    if prunable.any():
        yield _finding(m, "prunable", prunable, f"scale {_range(m.scale[prunable])}")
    off, on = judged & (m.one_sided < -limits.one_sided), judged & (m.one_sided > limits.one_sided)
    what = "the output's mean is {} of its standard deviations from zero"
    for kind, channels in (("off", off), ("saturated", on)):
        if channels.any():
            yield _finding(m, kind, channels, what.format(_range(m.one_sided[channels])))


def _replicas(m, limits) -> Iterator[Finding]:
    if m.disagreement is not None and m.disagreement.max() > limits.replicas:
        apart = np.flatnonzero(m.disagreement > limits.replicas)
        what = (
            f"replica{'s' if apart.size > 1 else ''} {', '.join(map(str, apart))} of "
            f"{m.disagreement.size}: up to {m.disagreement.max():.3g} standard deviations from the "
            "median replica"
        )
        yield _finding(m, "replicas disagree", (), what)


def printable(name: str) -> str:
    """A name from a checkpoint, with control characters escaped: they could move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _finding(m, kind, channels, what):
    indices = (tuple(map(int, index)) for index in np.argwhere(channels))
    named = tuple(i[0] if len(i) == 1 else i for i in indices)
    return Finding(m.layer, kind, named, what, REMEDIES[kind])


def _named(channels):
    if not channels:
        return ""
    more = f" and {len(channels) - 8} more" if len(channels) > 8 else ""
    return f", channel{'s' if len(channels) > 1 else ''} {', '.join(map(str, channels[:8]))}{more}"


def _range(values):
    low, high = f"{np.min(values):.3g}", f"{np.max(values):.3g}"
    return low if low == high else f"{low} to {high}"
