"""The checks of arguments. Every public function calls them first, and nothing below checks again.

Each message says what came, what was expected, and how to mend it.
"""

import itertools
import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from jbn.kernels.backends import IMPLEMENTATIONS
from jbn.kernels.seam import accumulator
from jbn.types import Moments, Params, State


def array(value: Any, name: str) -> Array:
    """The value as a JAX array, which must be real and floating."""
    _is_array(value, name)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        mend = (
            "the Flax modules take complex input"
            if jnp.issubdtype(value.dtype, jnp.complexfloating)
            else f"cast it, {name}.astype(jnp.float32)"
        )
        raise TypeError(f"{name} has dtype {value.dtype}, expected a real floating dtype: {mend}")
    return jax_array(value)


def jax_array(value: Any) -> Array:
    """The value as a JAX array; one that is an array already, traced or not, comes back as it is.

    On a traced array jnp.asarray is an operation, whose result jax_debug_nans checks: it would stop
    at the NaN of an element that a mask leaves out.
    """
    return value if isinstance(value, Array) else jnp.asarray(value)


def floating_dtype(dtype: Any, name: str) -> Any:
    try:
        known = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        given = repr(dtype) if known is None else known.name
        raise TypeError(f"{name} is {given}, expected a floating dtype such as jnp.float32")
    return known


def output_dtype(dtype: Any, x: Array) -> Any:
    return x.dtype if dtype is None else floating_dtype(dtype, "dtype")


def features(value: int | Sequence[int]) -> tuple[int, ...]:
    sizes = value if isinstance(value, Sequence) else (value,)
    try:
        sizes = tuple(map(index, sizes))
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
        axes = tuple(map(index, axes))
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
            f"axis {value!r} names the same axis of x (rank {ndim}) twice: "
            "name each feature axis once"
        )
    return positive


def parameters(params: Params, state: State, x: Array, axis: tuple[int, ...]) -> None:
    """Parameters and statistics of the shape that the feature axes of x have."""
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
                f"{name} has shape {shape}, expected {expected}: the size of x {x.shape} along "
                f"axis {axis}{_other_axis(shape, x.shape)}"
            )


def _other_axis(features, shape):
    """A hint for a message: the axes along which x has these features, if there are any."""
    for axes in itertools.combinations(range(len(shape)), len(features)):
        if axes and tuple(shape[a] for a in axes) == features:
            return f", use axis={axes[0] if len(axes) == 1 else axes}"
    return ""


def update(momentum: float | Array | None) -> None:
    number = None if momentum is None else scalar(momentum, "momentum")
    if number is not None and not 0 <= number <= 1:
        raise ValueError(
            f"momentum is {momentum}, expected 0 <= momentum <= 1: the weight of the OLD value, "
            "such as 0.99"
        )


def epsilon(eps: float | Array, dtype: Any = jnp.float32) -> None:
    """A number that is positive in the dtype of the statistics of an array of the given dtype."""
    number = scalar(eps, "eps")
    if number is None:
        return
    if not 0 < number < math.inf:
        raise ValueError(f"eps is {eps}, expected eps > 0 and finite, such as 1e-5")
    dtype = accumulator(dtype)
    if number < jnp.finfo(dtype).tiny:  # XLA computes with zero in place of subnormal numbers
        raise ValueError(
            f"eps is {eps}, which is 0 in {dtype.name}, the dtype of the statistics: "
            f"expected at least {jnp.finfo(dtype).tiny}, such as 1e-5"
        )


def flax_epsilon(epsilon: float | Array) -> None:
    """Flax's modules take 0 too."""
    number = scalar(epsilon, "epsilon")
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"epsilon is {epsilon}, expected epsilon >= 0 and finite, such as 1e-5")


def limits(r_max: float | Array, d_max: float | Array) -> None:
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        number = scalar(value, name)
        if number is not None and not number >= least:
            raise ValueError(
                f"{name} is {value}, expected {name} >= {least}: "
                "r_max 1 and d_max 0 make it plain batch norm"
            )


def weights(value: Array | None, x: Array) -> Array | None:
    if value is None:
        return None
    _is_array(value, "weights")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == jnp.bool_):
        raise TypeError(
            f"weights has dtype {value.dtype}, expected bool or floating: "
            "cast it, weights.astype(bool)"
        )
    shape = (1,) * (x.ndim - value.ndim) + tuple(value.shape)
    if len(shape) != x.ndim or any(w not in (1, n) for w, n in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"weights has shape {value.shape}, not broadcastable to x {x.shape}: "
            "a mask of examples needs size-1 axes for the rest, such as mask[:, None, None, None]"
        )
    return jax_array(value).reshape(shape)


def residual(value: Array | None, x: Array) -> Array | None:
    if value is None:
        return None
    value = array(value, "residual")
    if value.shape != x.shape:
        raise ValueError(
            f"residual has shape {value.shape}, expected that of x, {x.shape}: "
            "it is added, not broadcast"
        )
    return value


def activation(value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(
            f"activation is {value!r}, expected None or an elementwise function such as jax.nn.relu"
        )
    return value


def activated(value: Any, y: Array) -> Array:
    """What an activation made of y."""
    if getattr(value, "shape", None) != y.shape:
        made = f"an array of shape {value.shape}" if hasattr(value, "shape") else f"{value!r:.60}"
        raise TypeError(
            f"activation made {made} of y, whose shape is {y.shape}: "
            "expected an elementwise function such as jax.nn.relu"
        )
    return value


def function(value: Any, name: str, meaning: str) -> Any:
    if not callable(value):
        raise TypeError(f"{name} is {value!r:.60}, expected a function {meaning}")
    return value


def key(value: Any) -> None:
    """A PRNG key, of either kind, or None."""
    if value is not None and not hasattr(value, "dtype"):
        raise TypeError(f"key is {value!r:.60}, expected a PRNG key such as jax.random.key(0)")


def mapping(value: Any, name: str, expected: str) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a {type(value).__name__} ({value!r:.60}), expected {expected}")
    return value


def flag(value: bool, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} is {value!r:.60}, expected True or False: it is known before tracing"
        )
    return bool(value)


def implementation(value: str | None) -> str | None:
    if value is not None and value not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {value!r}, expected None or one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    return value


def mapped_axis(axis_name: Hashable | None, *, required: bool = False) -> None:
    """A name, or a tuple of names, that shard_map, pmap or vmap gave to an axis around the call."""
    if axis_name is None and required:
        raise TypeError("axis_name is None, expected the name of a mapped axis: m is the whole")
    try:
        hash(axis_name)
    except TypeError:
        raise TypeError(
            f"axis_name is {axis_name!r:.60}, expected a hashable name or a tuple of names, "
            'such as "batch"'
        ) from None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names if axis_name is not None else ():
        if isinstance(name, int):
            raise TypeError(
                f"axis_name is {name!r}, an int, which JAX's collectives take for the position of "
                "an axis: give the axis another name, such as a string"
            )
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is not bound here: call inside shard_map, pmap or vmap with "
                "an axis of that name, or leave axis_name out (under jit, sharded x needs none)"
            ) from error


def groups(
    value: Sequence[Sequence[int]] | None, axis_name: Hashable | None
) -> tuple[tuple[int, ...], ...] | None:
    """The groups as tuples: every index along the mapped axis in exactly one of them."""
    if value is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups is {value!r:.60} but axis_name is None: "
            "groups are of indices along axis_name"
        )
    try:
        of_ints = tuple(tuple(map(index, group)) for group in value)
    except TypeError:
        raise TypeError(
            f"axis_index_groups is {value!r:.60}, expected lists of ints, such as [[0, 1], [2, 3]]"
        ) from None
    size = math.prod(
        lax.axis_size(name)
        for name in (axis_name if isinstance(axis_name, tuple) else (axis_name,))
    )
    if sorted(itertools.chain(*of_ints)) != list(range(size)):
        raise ValueError(
            f"axis_index_groups is {value!r:.60}, expected each index along axis_name "
            f"{axis_name!r}, 0 to {size - 1}, in exactly one group"
        )
    return of_ints


def nonempty(x: Array, axis: tuple[int, ...]) -> int:
    """How many values of x each feature has: at least one, unless there is no feature."""
    count = math.prod(n for a, n in enumerate(x.shape) if a not in axis)
    if count == 0 and math.prod(x.shape[a] for a in axis) > 0:
        raise ValueError(
            f"x has shape {x.shape}: nothing to reduce outside feature axis {axis}, "
            "expected at least one value per feature"
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
        count = virtual_batch_size * count // (x.shape[0] or 1)
    if axis_name is not None:
        return
    if x.ndim == 1:
        raise ValueError(
            f"x has shape {x.shape}, rank 1: expected a batch axis, or axis_name "
            "(vmap over single examples)"
        )
    if count == 1 and weights is None:
        raise ValueError(
            f"x has shape {x.shape}: one value per feature outside feature axis {axis}, whose "
            "variance is 0. Expected at least two: use a larger batch, or batch_norm_eval"
        )


def virtual_batch(size: int | None, x: Array, axis: tuple[int, ...]) -> int | None:
    if size is None:
        return None
    try:
        size = index(size)
    except TypeError:
        raise TypeError(f"virtual_batch_size is {size!r}, expected an int") from None
    if 0 in axis:
        raise ValueError(
            f"virtual_batch_size {size} needs the batch at axis 0 of x, "
            f"but axis {axis} makes that a feature axis"
        )
    if size < 1 or x.shape[0] % size:
        raise ValueError(
            f"virtual_batch_size is {size}, expected a positive divisor of the batch, {x.shape[0]}"
        )
    return size


def moments(value: Moments, name: str = "moments") -> None:
    _named_tuple(value, Moments, name, "make them with jbn.moments(x)")
    features = array(value.mean, f"{name}.mean").shape
    for field in ("count", "m2"):
        shape = array(getattr(value, field), f"{name}.{field}").shape
        if shape != features:
            raise ValueError(
                f"{name}.{field} has shape {shape}, expected {features}, that of {name}.mean: "
                "make them with jbn.moments(x)"
            )


def state(value: State, name: str, *, prefix: str) -> None:
    """Statistics of one layer, of any floating dtype; `prefix` goes before their names."""
    _named_tuple(value, State, name, "make it with jbn.init(features)")
    mean, var = array(value.mean, f"{prefix}mean"), array(value.var, f"{prefix}var")
    if mean.shape != var.shape:
        raise ValueError(
            f"{prefix}var has shape {var.shape}, expected {mean.shape}, that of {prefix}mean: "
            "make the state with jbn.init(features)"
        )
    count = value.count
    _is_array(count, f"{prefix}count")
    if not jnp.issubdtype(count.dtype, jnp.integer) or count.shape:
        raise TypeError(
            f"{prefix}count has dtype {count.dtype} and shape {count.shape}, expected an "
            "int32 scalar: the number of batches seen, such as jnp.int32(0)"
        )


def updatable(value: State) -> None:
    """A state that can be updated with a batch."""
    state(value, "state", prefix="")
    for name in ("mean", "var"):
        dtype = getattr(value, name).dtype
        if accumulator(dtype) != dtype:
            raise TypeError(
                f"{name} has dtype {dtype}, in which a running average stalls, expected "
                f"float32: state._replace({name}=state.{name}.astype(jnp.float32))"
            )


def same_features(a: State | Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of shape {a.mean.shape} and {b.mean.shape}, expected the same: "
            "both must come from the same layer"
        )


def _named_tuple(value, expected, name, mend):
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} is a {type(value).__name__} ({value!r:.60}), "
            f"expected jbn.{expected.__name__}: {mend}"
        )


def _is_array(value, name):
    try:
        is_array = jnp.dtype(value.dtype) is not None and value.shape is not None
    except (AttributeError, TypeError):  # torch has a shape, and dtypes of its own
        is_array = False
    has_values = isinstance(value, Array) or any(
        hasattr(value, protocol) for protocol in ("__array__", "__jax_array__")
    )
    if is_array and not has_values:  # a jax.ShapeDtypeStruct
        raise TypeError(
            f"{name} is a {type(value).__name__} ({value!r:.60}), which holds no values: "
            "call jax.eval_shape to learn the types of the results"
        )
    if not is_array:
        raise TypeError(
            f"{name} is a {type(value).__name__} ({value!r:.60}), expected an array: "
            f"pass jnp.asarray({name})"
        )


def index(value: Any) -> int:
    """An int; True is none."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is a bool")
    return operator.index(value)


def positive(value: Any, name: str, otherwise: str = "") -> int:
    """An int of at least 1; `otherwise` ends the messages."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(
            f"{name} is {value!r:.60}, expected an int of at least 1{otherwise}"
        ) from None
    if number < 1:
        raise ValueError(f"{name} is {number}, expected at least 1{otherwise}")
    return number


def scalar(value, name):
    """The value as a float; None if it is traced, and only its shape and dtype are known."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        is_number = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
        if is_number and value.shape != ():
            raise ValueError(
                f"{name} has shape {value.shape} ({value!r:.60}), expected a scalar: "
                "one number for all features"
            )
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(
            f"{name} is {value!r:.60}, a {type(value).__name__}, expected a number: "
            "a float or a scalar array"
        )
    try:
        return None if isinstance(value, Tracer) else float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value!r:.60}, too large for a float") from None
