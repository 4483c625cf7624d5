"""What the two Flax modules share: from a layer's options, parameters and statistics to the functional core."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array, lax

from jbn import functional, renorm, stats, validate
from jbn.types import Moments, Params, State


def feature_axes(axis: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """Flax's rule: non-negative, ascending, each once; () makes the whole array one feature."""
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    return validate.axis(tuple({a + ndim if a < 0 else a for a in axes}), ndim) if axes else ()


def output_dtype(x: Array, params: Params, dtype: Any) -> Any:
    """Flax's rule: `dtype`, or what x, scale and bias promote to; under strict promotion too, as the rule is explicit."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(canonicalize_dtype(x, params.scale, params.bias, dtype=dtype))


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

    Args:
        layer: the module, for its options.
        x: array of any dtype and rank; what is not inexact is computed in float32.
        params: scale and bias, the shape of the feature axes (or as many values).
        state: the running statistics, likewise.
        use_running_average: normalize by the state and keep it, instead of by the batch.
        dtype: of y.
        initializing: then neither axis_name nor virtual_batch_size apply.
        mask: bool, broadcastable to x.
        residual: array like x.
        limits: r_max and d_max, for batch renormalization.

    Returns:
        (y, state): y has the shape of x; the state has the shapes and dtypes of the one given, except that the mean of
        complex x is complex.

    Raises:
        ValueError, TypeError: an option out of range, arrays that do not fit x.
        NotImplementedError: virtual batches, renormalization or a kernel for complex x; virtual batches in renormalization;
            an implementation that cannot run here.
    """
    _check(layer, limits)
    config = _config(layer, x, dtype, initializing)
    x = _computable(x, dtype)
    features = tuple(x.shape[a] for a in config.axis)
    params, old = jax.tree.map(lambda v: _fit(v, features), (params, state))
    if _any_complex(x, dtype, *params, state.mean):
        train, evaluate = _train_complex, _evaluate_complex
    else:
        train, evaluate = functional.train if limits is None else renorm.train, functional.evaluate
        validate.parameters(params, old, x, config.axis)
        residual = validate.residual(residual, x)
    if use_running_average:
        return evaluate(x, params, old, config=config, eps=layer.epsilon, residual=residual), state
    weights = None if mask is None else validate.weights(jnp.asarray(mask).astype(bool), x)
    if config.virtual_batch_size is not None:
        validate.batch(x, config.axis, weights, config.axis_name, config.virtual_batch_size)
    options = {"momentum": layer.momentum, "eps": layer.epsilon, "weights": weights, "residual": residual, **(limits or {})}
    y, new = train(x, params, old, config=config, **options)
    return y, State(new.mean.reshape(state.mean.shape), new.var.reshape(state.var.shape), new.count)


def _check(layer, limits):
    """Reject the options that no input could make right."""
    if limits is not None:
        validate.limits(**limits)
        if layer.virtual_batch_size is not None:
            raise NotImplementedError(
                f"virtual_batch_size is {layer.virtual_batch_size}, expected None: batch renormalization is for batches that "
                "are small already"
            )
    if layer.momentum is None:
        raise ValueError(
            "momentum is None, expected 0 <= momentum <= 1: Flax's variables hold no count of batches to average over, "
            "use jbn.batch_norm_train for that"
        )
    validate.update(layer.momentum)
    validate.epsilon(layer.epsilon)
    validate.activation(layer.activation)
    validate.implementation(layer.implementation)


def _config(layer, x, dtype, initializing):
    axis_name = None if initializing else layer.axis_name
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    validate.mapped_axis(axis_name)
    return functional.Config(
        axis=feature_axes(layer.axis, x.ndim),
        activation=layer.activation,
        dtype=dtype,
        implementation=layer.implementation,
        axis_name=axis_name,
        axis_index_groups=None if axis_name is None else validate.groups(layer.axis_index_groups, axis_name),
        virtual_batch_size=None if initializing else layer.virtual_batch_size,
        unbiased=layer.unbiased,
        skip_nonfinite=layer.skip_nonfinite,
    )


def _fit(vector, features):
    """nnx holds one flat vector, whatever number of feature axes; what does not fit is left to the checks."""
    return vector.reshape(features) if vector.size == math.prod(features) and vector.ndim else vector


def _computable(x, dtype):
    """x in a dtype that computes y at full precision; flax reads integers and bools as float32."""
    if dtype == jnp.float64 and not _any_complex(x):
        return x.astype(jnp.float64)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _any_complex(*values):
    return any(v is not None and jnp.issubdtype(getattr(v, "dtype", v), jnp.complexfloating) for v in values)


def _evaluate_complex(x, params, state, *, config, eps, residual):
    """`functional.evaluate` in plain JAX."""
    if config.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation {config.implementation!r} does not take complex values, expected None or 'xla'"
        )
    wide = jnp.complex128 if any(d in (jnp.float64, jnp.complex128) for d in (x.dtype, config.dtype)) else jnp.complex64
    reduced = tuple(a for a in range(x.ndim) if a not in config.axis)
    expand = lambda v: jnp.expand_dims(v.astype(wide), reduced)
    y = (x.astype(wide) - expand(state.mean)) * expand(lax.rsqrt(state.var.real + eps))
    y = y if params.scale is None else y * expand(params.scale)
    y = y if params.bias is None else y + expand(params.bias)
    y = y if residual is None else y + residual.astype(wide)
    y = y if config.activation is None else config.activation(y)
    return y.astype(config.dtype)


def _train_complex(x, params, state, *, config, momentum, eps, weights, residual, **limits):
    """`functional.train` in plain JAX. The mean is complex; the variance is E|x - mean|^2, real."""
    if limits:
        raise NotImplementedError(f"batch renormalization does not take complex values, x is {x.dtype}")
    if config.virtual_batch_size is not None:
        raise NotImplementedError(f"virtual_batch_size {config.virtual_batch_size} does not take complex values, expected None")
    parts = [functional.moments(part, axis=config.axis, weights=weights) for part in (x.real, x.imag)]
    if config.axis_name is not None:
        parts = [functional.psum_moments(part, config.axis_name, config.axis_index_groups) for part in parts]
    real, imag = parts
    batch = Moments(real.count, lax.complex(real.mean, imag.mean), real.m2 + imag.m2)
    if weights is not None:  # as everywhere: what is masked and not finite is read as the mean
        mean = jnp.expand_dims(batch.mean, tuple(a for a in range(x.ndim) if a not in config.axis))
        x = jnp.where(~weights & ~jnp.isfinite(x), mean.astype(x.dtype), x)
    used = State(batch.mean, stats.variance(batch), state.count)
    y = _evaluate_complex(x, params, used, config=config, eps=eps, residual=residual)
    return y, _fold_complex(state, batch, momentum=momentum, unbiased=config.unbiased, skip_nonfinite=config.skip_nonfinite)


def _fold_complex(state, batch, **options):
    """`update_state` with both parts of the mean side by side, so that a batch is accepted or refused as a whole."""
    twice = lambda v: jnp.stack([v, v])
    parts = lambda v: jnp.stack([v.real, v.imag])
    old = State(parts(state.mean), twice(state.var.real), state.count)
    new = functional.update_state(old, Moments(twice(batch.count), parts(batch.mean), twice(batch.m2)), **options)
    return State(lax.complex(*new.mean), new.var[0], new.count)
