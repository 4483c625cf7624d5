"""The one door for checks: every public function passes here first, nothing below checks again.

Each message says what came, what was expected, and how to mend it.
"""

import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from jbn.types import Moments, Params, State

IMPLEMENTATIONS = (
    "xla",
    "triton",
    "mosaic_gpu",
    "mosaic_tpu",
    "triton/interpret",
    "mosaic_gpu/interpret",
    "mosaic_tpu/interpret",
)


def array(value: Any, name: str) -> Array:
    """A floating array, or TypeError."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} is a {type(value).__name__} ({value!r:.60}), expected an array: pass jnp.asarray({name})"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        mend = (
            "the Flax modules take complex input"
            if jnp.issubdtype(value.dtype, jnp.complexfloating)
            else f"cast it, {name}.astype(jnp.float32)"
        )
        raise TypeError(f"{name} has dtype {value.dtype}, expected a real floating dtype: {mend}")
    return jnp.asarray(value)


def floating_dtype(dtype: Any, name: str) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} is {jnp.dtype(dtype).name}, expected a floating dtype such as jnp.float32"
        )
    return jnp.dtype(dtype)


def output_dtype(dtype: Any, x: Array) -> Any:
    return x.dtype if dtype is None else floating_dtype(dtype, "dtype")


def features(value: int | Sequence[int]) -> tuple[int, ...]:
    sizes = value if isinstance(value, Sequence) else (value,)
    try:
        sizes = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            f"features is {value!r}, expected a positive int or a tuple of them"
        ) from None
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"features is {value!r}, expected a positive int or a non-empty tuple of them"
        )
    return sizes


def axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The feature axes, non-negative and ascending."""
    axes = value if isinstance(value, Sequence) else (value,)
    try:
        axes = tuple(operator.index(a) for a in axes)
    except TypeError:
        raise TypeError(
            f"axis is {value!r}, expected an int or a tuple of ints: the feature axis or axes of x"
        ) from None
    if not axes:
        raise ValueError(f"axis is {value!r}, expected at least one feature axis")
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis {a} is out of range for x of rank {ndim}, expected {-ndim} <= axis < {ndim}"
            )
    positive = tuple(sorted(a % ndim for a in axes))
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"axis {value!r} names the same axis of x (rank {ndim}) twice: name each feature axis once"
        )
    return positive


def parameters(params: Params, state: State, x: Array, axis: tuple[int, ...]) -> None:
    expected = tuple(x.shape[a] for a in axis)
    _named_tuple(params, Params, "params", "make them with jbn.init(features)")
    _named_tuple(state, State, "state", "make it with jbn.init(features)")
    named = {"scale": params.scale, "bias": params.bias, "mean": state.mean, "var": state.var}
    for name, value in named.items():
        if value is None and name in ("scale", "bias"):
            continue
        shape = array(value, name).shape
        if shape != expected:
            raise ValueError(
                f"{name} has shape {shape}, expected {expected}: the size of x {x.shape} along axis {axis}"
            )


def update(momentum: float | Array | None) -> None:
    if momentum is None or isinstance(momentum, Tracer):
        return
    if not 0 <= _scalar(momentum, "momentum") <= 1:
        raise ValueError(
            f"momentum is {momentum}, expected 0 <= momentum <= 1: the weight of the OLD value, such as 0.99"
        )


def epsilon(eps: float | Array) -> None:
    if isinstance(eps, Tracer):
        return
    if not _scalar(eps, "eps") > 0:
        raise ValueError(f"eps is {eps}, expected eps > 0, such as 1e-5")


def limits(r_max: float | Array, d_max: float | Array) -> None:
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not isinstance(value, Tracer) and not _scalar(value, name) >= least:
            raise ValueError(
                f"{name} is {value}, expected {name} >= {least}: r_max 1 and d_max 0 make it plain batch norm"
            )


def weights(value: Array | None, x: Array) -> Array | None:
    if value is None:
        return None
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"weights is a {type(value).__name__} ({value!r:.60}), expected an array: pass jnp.asarray(weights)"
        )
    if not (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == jnp.bool_):
        raise TypeError(
            f"weights has dtype {value.dtype}, expected bool or floating: cast it, weights.astype(bool)"
        )
    shape = (1,) * (x.ndim - value.ndim) + tuple(value.shape)
    if len(shape) != x.ndim or any(w not in (1, n) for w, n in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"weights has shape {value.shape}, not broadcastable to x {x.shape}: "
            "a mask of examples needs size-1 axes for the rest, such as mask[:, None, None, None]"
        )
    return jnp.asarray(value).reshape(shape)


def residual(value: Array | None, x: Array) -> Array | None:
    if value is None:
        return None
    value = array(value, "residual")
    if value.shape != x.shape:
        raise ValueError(
            f"residual has shape {value.shape}, expected that of x, {x.shape}: it is added, not broadcast"
        )
    return value


def activation(value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(
            f"activation is {value!r}, expected None or an elementwise function such as jax.nn.relu"
        )
    return value


def implementation(value: str | None) -> str | None:
    if value is not None and value not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {value!r}, expected None or one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    return value


def mapped_axis(axis_name: Hashable | None) -> None:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names if axis_name is not None else ():
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is not bound here: call inside shard_map, pmap or vmap with an axis of that name, "
                "or leave axis_name out (under jit, sharded x needs none)"
            ) from error


def groups(
    value: Sequence[Sequence[int]] | None, axis_name: Hashable | None
) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups is {value!r} but axis_name is None: groups are of indices along axis_name"
        )
    return tuple(tuple(operator.index(index) for index in group) for group in value)


def nonempty(x: Array, axis: tuple[int, ...]) -> int:
    """How many values of x each feature has: at least one."""
    count = math.prod(n for a, n in enumerate(x.shape) if a not in axis)
    if count == 0:
        raise ValueError(
            f"x has shape {x.shape}: nothing to reduce outside feature axis {axis}, expected at least one value per feature"
        )
    return count


def batch(
    x: Array,
    axis: tuple[int, ...],
    weights: Array | None,
    axis_name: Hashable | None,
    virtual_batch_size: int | None,
) -> None:
    """Enough values per feature for a variance."""
    count = nonempty(x, axis)
    if virtual_batch_size is not None:
        count = _virtual(virtual_batch_size, x, axis) * count // x.shape[0]
    if axis_name is not None:
        return
    if x.ndim == 1:
        raise ValueError(
            f"x has shape {x.shape}, rank 1: expected a batch axis, or axis_name (vmap over single examples)"
        )
    if count == 1 and weights is None:
        raise ValueError(
            f"x has shape {x.shape}: one value per feature outside feature axis {axis}, whose variance is 0. "
            "Expected at least two: use a larger batch, or batch_norm_eval"
        )


def _virtual(size, x, axis):
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(f"virtual_batch_size is {size!r}, expected an int") from None
    if 0 in axis:
        raise ValueError(
            f"virtual_batch_size {size} needs the batch at axis 0 of x, but axis {axis} makes that a feature axis"
        )
    if size < 1 or x.shape[0] % size:
        raise ValueError(
            f"virtual_batch_size is {size}, expected a positive divisor of the batch, {x.shape[0]}"
        )
    return size


def moments(m: Moments) -> None:
    _named_tuple(m, Moments, "moments", "make them with jbn.moments(x)")


def state(value: State) -> None:
    _named_tuple(value, State, "state", "make it with jbn.init(features)")


def same_features(a: State | Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of shape {a.mean.shape} and {b.mean.shape}, expected the same: both must come from the same layer"
        )


def _named_tuple(value, expected, name, mend):
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} is a {type(value).__name__} ({value!r:.60}), expected jbn.{expected.__name__}: {mend}"
        )


def _scalar(value, name):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r:.60}, expected a number") from None
