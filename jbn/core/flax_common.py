"""What the two Flax modules share: the way from a layer's options to the functional core."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from jbn.core import complex_numbers, validate
from jbn.core import layer as core
from jbn.core.config import Config
from jbn.kernels.seam import accumulator
from jbn.types import Params, State


def feature_axes(axis: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """Flax's rule: non-negative, ascending, each once; () makes the whole array one feature."""
    axes: Any = (axis,)
    if isinstance(axis, Iterable) and not isinstance(axis, str):
        axes = tuple(axis)
    if not axes:
        return ()
    return validate.axis(
        tuple({a + ndim if isinstance(a, int) and a < 0 else a for a in axes}), ndim
    )


def output_dtype(x: Array, params: Params, dtype: Any, *others: Array) -> Any:
    """Flax's rule: `dtype`, or what x, scale, bias (in nnx the statistics too) promote to.

    The rule is explicit, so it is the same under strict promotion.
    """
    with jax.numpy_dtype_promotion("standard"):
        if dtype is None:
            dtype = jnp.result_type(*(v for v in (x, *params, *others) if v is not None))
            if not jnp.issubdtype(dtype, jnp.inexact):
                dtype = jnp.promote_types(dtype, jnp.float32)
        return jnp.dtype(canonicalize_dtype(dtype=dtype))


def batch_norm(
    layer: Any,
    x: Array,
    params: Params,
    state: State,
    *,
    use_running_average: bool,
    dtype: Any,
    initializing: bool = False,
    mask: Array | None = None,
    residual: Array | None = None,
    limits: dict[str, Any] | None = None,
) -> tuple[Array, State]:
    """The call of all modules, so that linen's and nnx's agree to the last bit.

    An option is read, and checked, only in the mode that uses it.

    Args:
        layer: the module, for its options.
        x: array of any dtype and rank; what is not inexact is computed in float32.
        params: scale and bias, the shape of the feature axes (or as many values).
        state: the running statistics, likewise.
        use_running_average: normalize by the state and keep it, instead of by the batch.
        dtype: of y.
        initializing: normalize by the batch, without axis_name and virtual_batch_size, and keep
            the state.
        mask: bool, broadcastable to x.
        residual: array like x.
        limits: r_max and d_max, for batch renormalization; not read with use_running_average.

    Returns:
        (y, state): y has the shape of x. The state is the one given, unless the batch updates it:
        then it has the same shapes and at least float32, and the mean of complex x is complex.

    Raises:
        ValueError, TypeError: an option out of range, arrays that do not fit x.
        NotImplementedError: virtual batches, renormalization or a kernel for complex x; virtual
            batches in renormalization; an implementation that cannot run here.
    """
    validate.flax_epsilon(layer.epsilon)
    config = Config(
        axis=feature_axes(layer.axis, x.ndim),
        activation=validate.activation(layer.activation),
        dtype=dtype,
        implementation=validate.implementation(layer.implementation),
    )
    x = _computable(x, dtype)
    features = tuple(x.shape[a] for a in config.axis)
    params, old = jax.tree.map(lambda v: _shaped(v, features), (params, state))
    is_complex = complex_numbers.any_complex(x, dtype, *params, state.mean)
    if not is_complex:
        validate.parameters(params, old, x, config.axis)
        residual = validate.residual(residual, x)
    if use_running_average:
        evaluate = complex_numbers.evaluate if is_complex else core.evaluate
        return evaluate(x, params, old, config=config, eps=layer.epsilon, residual=residual), state
    if not initializing:
        config = _synchronized(layer, config, x)
    momentum, updates = 1.0, layer.update_stats and not initializing
    if updates:
        momentum = _momentum(layer.momentum)
        config = config._replace(unbiased=layer.unbiased, skip_nonfinite=layer.skip_nonfinite)
        old = old._replace(mean=_widened(layer, old.mean, x), var=_widened(layer, old.var, x))
    if limits is not None:
        validate.limits(**limits)
        if config.virtual_batch_size is not None:
            raise NotImplementedError(
                f"virtual_batch_size is {config.virtual_batch_size}, expected None: "
                "batch renormalization is for batches that are small already"
            )
    train = complex_numbers.train if is_complex else core.train
    y, new = train(
        x,
        params,
        old,
        config=config,
        momentum=momentum,
        eps=layer.epsilon,
        weights=None if mask is None else validate.weights(jnp.asarray(mask).astype(bool), x),
        residual=residual,
        limits=limits,
    )
    if not updates:
        return y, state
    return y, State(new.mean.reshape(state.mean.shape), new.var.reshape(state.var.shape), new.count)


def needs_steps(layer: Any) -> bool:
    """Whether the options of a BatchRenorm need the count of its updates.

    Raises:
        ValueError: warmup_steps is no count.
    """
    warmup_steps = layer.warmup_steps
    if warmup_steps is not None and not (isinstance(warmup_steps, int) and warmup_steps >= 0):
        raise ValueError(
            f"warmup_steps is {warmup_steps!r}, expected None or an int >= 0: the updates during "
            "which the layer is plain batch norm"
        )
    return warmup_steps is not None or callable(layer.r_max) or callable(layer.d_max)


def renorm_limits(layer: Any, steps: Array | None, r_max: Any, d_max: Any) -> dict[str, Any]:
    """The limits of one training call of a BatchRenorm.

    Args:
        layer: the module, for r_max and d_max (numbers or functions of `steps`) and warmup_steps.
        steps: int32 scalar, updates so far; None where none of these needs it.
        r_max, d_max: the call's own limits, which go before the module's; None for none.

    Raises:
        ValueError: a limit out of range, at whatever step it would come into force.
    """
    own: dict[str, Any] = {"r_max": layer.r_max, "d_max": layer.d_max}
    own = {key: limit(steps) if callable(limit) else limit for key, limit in own.items()}
    validate.limits(**own)
    if layer.warmup_steps is not None:
        warm = jnp.asarray(steps) < layer.warmup_steps
        closed = {"r_max": 1.0, "d_max": 0.0}  # at which batch renorm is batch norm
        own = {key: jnp.where(warm, closed[key], limit) for key, limit in own.items()}
    given = {"r_max": r_max, "d_max": d_max}
    return {key: own[key] if value is None else value for key, value in given.items()}


def expect_nnx(model: Any, of_linen: str) -> None:
    """Refuse what is no nnx model; `of_linen` names the function for linen models."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__} ({model!r:.60}), expected a flax.nnx.Module: for "
            f"linen there is {of_linen}"
        )


def _synchronized(layer, config, x):
    """The config with what decides over which examples the statistics of a batch are taken."""
    axis_name = layer.axis_name
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    validate.mapped_axis(axis_name)
    return config._replace(
        axis_name=axis_name,
        axis_index_groups=None
        if axis_name is None
        else validate.groups(layer.axis_index_groups, axis_name),
        virtual_batch_size=validate.virtual_batch(layer.virtual_batch_size, x, config.axis),
    )


def _momentum(momentum):
    if momentum is None:
        raise ValueError(
            "momentum is None, expected 0 <= momentum <= 1: Flax's variables hold no count of "
            "batches to average over, use jbn.batch_norm_train for that"
        )
    validate.update(momentum)
    return momentum


def _widened(layer, statistic, x):
    """A statistic in the dtype that flax stores: float32 if it was narrower (and x is, if told so).

    In bfloat16 a running average stalls: with a momentum of 0.99, at 2.56 where 3 is true.
    """
    force = getattr(layer, "force_float32_reductions", True)
    least = jnp.float32 if force or accumulator(x.dtype) == x.dtype else x.dtype
    with jax.numpy_dtype_promotion("standard"):
        return statistic.astype(jnp.promote_types(statistic.dtype, least))


def _shaped(vector, features):
    """A vector in the shape of the feature axes: nnx holds it flat, however many there are.

    A vector that does not fit stays as it is, and is left to the checks.
    """
    return (
        vector.reshape(features) if vector.size == math.prod(features) and vector.ndim else vector
    )


def _computable(x, dtype):
    """x in a dtype that computes y at full precision; flax reads integers and bools as float32."""
    if dtype == jnp.float64 and not complex_numbers.any_complex(x):
        return x.astype(jnp.float64)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
