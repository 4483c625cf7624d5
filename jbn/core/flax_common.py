"""What the two Flax modules share: from a layer's options, parameters and statistics to the functional core."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from jbn.core import complex_numbers, renorm, validate
from jbn.core import layer as core
from jbn.core.config import Config
from jbn.types import Params, State


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
        (y, state): y has the shape of x; the state has the shapes and dtypes of the one given,
        except that the mean of complex x is complex.

    Raises:
        ValueError, TypeError: an option out of range, arrays that do not fit x.
        NotImplementedError: virtual batches, renormalization or a kernel for complex x; virtual
            batches in renormalization; an implementation that cannot run here.
    """
    _check(layer, limits)
    config = _config(layer, x, dtype, initializing)
    x = _computable(x, dtype)
    features = tuple(x.shape[a] for a in config.axis)
    params, old = jax.tree.map(lambda v: _fit(v, features), (params, state))
    if complex_numbers.any_complex(x, dtype, *params, state.mean):
        train, evaluate = complex_numbers.train, complex_numbers.evaluate
    else:
        train, evaluate = core.train if limits is None else renorm.train, core.evaluate
        validate.parameters(params, old, x, config.axis)
        residual = validate.residual(residual, x)
    if use_running_average:
        return evaluate(x, params, old, config=config, eps=layer.epsilon, residual=residual), state
    weights = None if mask is None else validate.weights(jnp.asarray(mask).astype(bool), x)
    if config.virtual_batch_size is not None:
        validate.batch(x, config.axis, weights, config.axis_name, config.virtual_batch_size)
    options = {
        "momentum": layer.momentum,
        "eps": layer.epsilon,
        "weights": weights,
        "residual": residual,
        **(limits or {}),
    }
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
    return Config(
        axis=feature_axes(layer.axis, x.ndim),
        activation=layer.activation,
        dtype=dtype,
        implementation=layer.implementation,
        axis_name=axis_name,
        axis_index_groups=None
        if axis_name is None
        else validate.groups(layer.axis_index_groups, axis_name),
        virtual_batch_size=None if initializing else layer.virtual_batch_size,
        unbiased=layer.unbiased,
        skip_nonfinite=layer.skip_nonfinite,
    )


def _fit(vector, features):
    """nnx holds one flat vector, whatever number of feature axes; what does not fit is left to the checks."""
    return (
        vector.reshape(features) if vector.size == math.prod(features) and vector.ndim else vector
    )


def _computable(x, dtype):
    """x in a dtype that computes y at full precision; flax reads integers and bools as float32."""
    if dtype == jnp.float64 and not complex_numbers.any_complex(x):
        return x.astype(jnp.float64)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
