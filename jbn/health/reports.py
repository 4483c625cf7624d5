"""The report of a layer and of a model: numbers per channel, and the findings among them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn.core import validate
from jbn.health import checkpoints, export, page
from jbn.health.channels import Batch, check_moments, magnitude, measure, moments_by_layer
from jbn.health.findings import (
    REMEDIES,
    Finding,
    Limits,
    Numbers,
    check_limits,
    findings,
    printable,
)
from jbn.types import Moments, Params, State

_LIMITS = Limits()


@dataclass(frozen=True)
class LayerReport(Numbers):
    """The numbers of one layer (the attributes of `Numbers`) and the warnings.

    Attributes:
        findings: what is over a limit; empty for a healthy layer.
    """

    findings: tuple[Finding, ...]

    def summary(self) -> dict[str, float | int | None]:
        """The worst value of each number, by its name in the table; None where it is not known."""
        worst = lambda values, pick: (
            None if values is None or np.isnan(values).all() else float(pick(values))
        )
        return {
            "updates": self.updates,
            "max drift": worst(None if self.drift is None else np.abs(self.drift), np.nanmax),
            "min signal": worst(self.signal, np.nanmin),
            "max |mean|/std": worst(self.ratio, np.nanmax),
            "not finite": sum(self.nonfinite.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers; a number not finite becomes None."""
        return export.plain(self)

    def to_json(self) -> str:
        """`to_dict` in strict JSON."""
        return export.to_json(self)

    def to_html(self) -> str:
        """A page that opens in a browser from disk, without network."""
        return ModelReport((self,)).to_html()

    def __str__(self) -> str:
        return str(ModelReport((self,)))


@dataclass(frozen=True)
class ModelReport:
    """The reports of all layers, in the order of the tree; str() is a table and the warnings."""

    layers: tuple[LayerReport, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for layer in self.layers for finding in layer.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers; a number not finite becomes None."""
        return export.plain(self)

    def to_json(self) -> str:
        """`to_dict` in strict JSON."""
        return export.to_json(self)

    def to_html(self) -> str:
        """A page that opens in a browser from disk, without network."""
        return page.render({"report": self})

    def __str__(self) -> str:
        rows = [("layer", "channels", *self.layers[0].summary())] if self.layers else []
        for m in self.layers:
            rows.append((printable(m.layer), str(m.signal.size), *map(_cell, m.summary().values())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [f"WARNING {finding}" for finding in self.findings]
        return "\n".join(
            [*lines, f"{len(self.findings)} warning{'' if len(self.findings) == 1 else 's'}"]
        )


def report(
    params: Params,
    state: State,
    moments: Moments | None = None,
    *,
    eps: float = 1e-5,
    momentum: float | None = None,
    layer: str = "layer",
    stacked: bool = False,
    limits: Limits = _LIMITS,
) -> LayerReport:
    """Look at one layer.

    Args:
        params: scale and bias, or None for either.
        state: the running statistics; a count of None is one that is not known. Of several counts,
            as vmap makes them, the smallest is reported.
        moments: of a batch of the layer's input, as from `jbn.moments`: adds drift, and lets dead
            and one-sided channels be judged by that batch. Sampling noise is allowed for as if its
            values were independent.
        eps: of the layer.
        momentum: of the layer, to judge what the initial values still weigh after state.count
            updates.
        layer: the name to report it by.
        stacked: the leading axis of every variable counts replicas, as pmap returns them; `moments`
            has no such axis. Without it, replicas are compared where an array is replicated over
            several devices of this process.
        limits: from where on to warn.

    Returns:
        A LayerReport.

    Raises:
        TypeError: not Params, State, Moments and Limits, or they hold no numbers.
        ValueError: shapes that differ, eps <= 0 or momentum outside [0, 1].
    """
    validate.epsilon(eps)
    validate.update(momentum)
    check_limits(limits)
    if not isinstance(layer, str):
        raise TypeError(f"layer is {layer!r}, expected a str: the name to report the layer by")
    if not isinstance(params, Params) or not isinstance(state, State):
        raise TypeError(
            f"got a {type(params).__name__} and a {type(state).__name__}, expected jbn.Params and "
            "jbn.State"
        )
    replicas = {
        name: _replicas(name, v, stacked)
        for name, v in (params._asdict() | state._asdict()).items()
        if v is not None or name in ("mean", "var")
    }
    _check(replicas, moments, layer)
    with np.errstate(all="ignore"):
        held = math.inf if np.asarray(state.var).dtype == np.float64 else limits.magnitude
        numbers = _numbers(replicas, moments, layer, float(eps), momentum, held)
    return LayerReport(**vars(numbers), findings=findings(numbers, limits))


def model_report(
    variables: Any, moments: Mapping[str, Moments] | None = None, **options: Any
) -> ModelReport:
    """Look at every batch norm of a model.

    Args:
        variables: linen variables, an nnx module or state, or any nesting of mappings and sequences
            that holds these or the (params, state) of `jbn.init`, such as a restored checkpoint. A
            layer is wherever there are a mean and a var.
        moments: of the inputs of those layers for which they are known, by the layer's name in the
            report.
        options: the keyword arguments of `report` but `layer`, for all layers.

    Returns:
        A ModelReport.

    Raises:
        ValueError: no batch norm in the tree, or moments of a layer that is not there.
    """
    found, damaged = checkpoints.find_some(variables)
    moments = moments_by_layer(moments, found)
    if "layer" in options:
        raise TypeError("model_report takes no layer: the tree names its layers")
    layers = [
        report(
            Params(v.scale, v.bias),
            State(v.mean, v.var, v.count),
            moments.get(name),
            layer=name,
            **options,
        )
        for name, v in found.items()
    ]
    return ModelReport((*layers, *(_damaged(name, text) for name, text in damaged.items())))


def _damaged(layer, text) -> LayerReport:
    """The report of a layer of which nothing can be measured."""
    unknown = np.full(1, np.nan)
    numbers: dict[str, Any] = dict.fromkeys((field.name for field in fields(Numbers)), unknown)
    absent = ("scale", "bias", "updates", "start_weight", "count", "drift", "spread")
    numbers |= dict.fromkeys((*absent, "disagreement"))
    numbers |= {"layer": layer, "eps": math.nan, "nonfinite": {}, "finite": np.zeros(1, bool)}
    numbers |= {"overflow": np.zeros(1, bool)}
    missing = Finding(layer, "missing", (), text, REMEDIES["missing"])
    return LayerReport(**numbers, findings=(missing,))


def _replicas(name, value, stacked):
    """float64 or complex128 with a leading axis of replicas."""
    held = np.asarray(value)
    is_complex = np.iscomplexobj(held) and name not in ("var", "count")
    if not jnp.issubdtype(held.dtype, np.number) or (np.iscomplexobj(held) and not is_complex):
        kind = "numbers" if name not in ("var", "count") else "real numbers"
        raise TypeError(f"{name} is {value!r:.60}, expected an array of {kind}")
    dtype = np.complex128 if is_complex else np.float64
    if not stacked and isinstance(value, jax.Array) and value.is_fully_replicated:
        return np.stack([np.asarray(shard.data, dtype) for shard in value.addressable_shards])
    if stacked and not held.shape and name != "count":  # a scalar counts for all replicas
        raise ValueError(
            f"{name} is a scalar, expected a leading axis of replicas: leave out stacked=True"
        )
    return held.astype(dtype) if stacked and held.shape else held.astype(dtype)[None]


def _check(replicas, moments, layer):
    shape = replicas["mean"].shape[1:]
    for name, value in replicas.items():
        if name != "count" and value.shape[1:] != shape:
            raise ValueError(
                f"{name} has shape {value.shape[1:]}, expected that of mean, {shape}: all of the "
                f"same layer, {layer}"
            )
    if moments is not None:
        check_moments(moments, shape, layer)


def _numbers(replicas, moments, layer, eps, momentum, held) -> Numbers:
    vectors = {name: value for name, value in replicas.items() if name != "count"}
    first = {name: value[0] for name, value in replicas.items()}
    mean, var, scale, bias = first["mean"], first["var"], first.get("scale"), first.get("bias")
    count = batch = None
    if moments is not None:
        count, m2 = (np.asarray(v, np.float64) for v in (moments.count, moments.m2))
        batch_mean = np.asarray(moments.mean)
        batch_mean = batch_mean.astype(np.result_type(mean, batch_mean))
        batch = Batch(batch_mean, m2 / count)
    if "count" in first:
        counts = first["count"][np.isfinite(first["count"])]
        updates = int(counts.min()) if counts.size else None
    else:
        momentum, updates = _updates_of_zero_inputs(mean, var, momentum)
    start_weight = None
    if momentum is not None and updates is not None and updates >= 0:
        start_weight = float(momentum) ** updates
    beyond = (np.abs(mean) > held) | (np.sqrt(var) > held)
    return Numbers(
        layer=layer,
        **{name: magnitude(first.get(name), np) for name in ("scale", "bias", "mean")},
        var=var,
        eps=eps,
        updates=updates,
        start_weight=start_weight,
        nonfinite={name: int((~np.isfinite(v)).sum()) for name, v in replicas.items()},
        finite=np.all([np.isfinite(v).all(0) for v in vectors.values()], axis=0),
        count=count,
        **measure(scale, bias, Batch(mean, var), batch, eps, np)._asdict(),
        disagreement=_disagreement(replicas),
        overflow=np.isfinite(mean) & beyond,
    )


def _updates_of_zero_inputs(mean, var, momentum):
    """(momentum, updates) as told by channels whose input was always zero, else (momentum, None).

    Such a channel still holds momentum^updates times its initial values, mean 0 and variance 1.
    Each update rounds the variance by up to half a float32 step, and momentum was rounded once.
    Where that uncertainty reaches a twentieth of the distance between two powers, nothing is told.
    """
    untouched = var[(mean == 0) & (var > 0) & (var < 1)]
    for m in (0.9, 0.99, 0.999) if momentum is None else (momentum,):
        if not untouched.size or not 0 < m < 1:
            break
        updates = np.round(np.log(untouched) / np.log(m))
        error = 2.0**-23 * (updates + 2)
        exact = (np.abs(untouched / m**updates - 1) <= error) & (error < (1 - m) / 20)
        if exact.any() and np.ptp(updates[exact]) == 0 and updates[exact][0] > 0:
            return m, int(updates[exact][0])
    return momentum, None


def _disagreement(replicas):
    """By replica, the largest distance from the median one: in running standard deviations, or of
    the largest parameter.
    """
    size = max(len(value) for value in replicas.values())
    if size == 1:
        return None
    var = np.nanmedian(replicas["var"], 0)
    units = {"mean": np.sqrt(var), "var": var}
    worst = np.zeros(size)
    for name, value in replicas.items():
        if name != "count" and len(value) == size:
            unit = units.get(name, np.nanmax(np.abs(value)) or 1.0)
            distance = np.abs(value - np.nanmedian(value, 0))
            distance = np.where(distance == 0, 0, distance / unit)
            worst = np.maximum(worst, np.nan_to_num(distance, nan=np.inf).reshape(size, -1).max(1))
    return worst


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
