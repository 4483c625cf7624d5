"""Batch normalization as pure functions over explicit state."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from jbn.core import layer, running, stats, validate
from jbn.core.config import Config
from jbn.kernels.backends import Implementation
from jbn.kernels.seam import accumulator
from jbn.types import Moments, Params, State


def init(
    features: int | Sequence[int],
    *,
    param_dtype: Any = jnp.float32,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Callable = initializers.ones,
    bias_init: Callable = initializers.zeros,
    key: Array | None = None,
) -> tuple[Params, State]:
    """Parameters and state of a new layer: scale 1, bias 0, mean 0, var 1, count 0.

    Args:
        features: number of channels, or the shape of the feature axes.
        param_dtype: floating dtype of scale and bias.
        use_scale: whether there is a scale (gamma).
        use_bias: whether there is a bias (beta).
        scale_init: initializer(key, shape, dtype), as in `jax.nn.initializers`.
        bias_init: likewise.
        key: a PRNG key for initializers that draw; the defaults do not.

    Returns:
        (params, state); the state is float32, or float64 for param_dtype float64.

    Raises:
        ValueError: features that are not positive.
        TypeError: features that are not integers, or a param_dtype that is not floating.
    """
    shape = validate.features(features)
    validate.floating_dtype(param_dtype, "param_dtype")
    use_scale = validate.flag(use_scale, "use_scale")
    use_bias = validate.flag(use_bias, "use_bias")
    for name, initializer in (("scale_init", scale_init), ("bias_init", bias_init)):
        validate.function(initializer, name, "of (key, shape, dtype), as in jax.nn.initializers")
    validate.key(key)
    keys = (None, None) if key is None else jax.random.split(key)
    scale = scale_init(keys[0], shape, param_dtype) if use_scale else None
    bias = bias_init(keys[1], shape, param_dtype) if use_bias else None
    dtype = accumulator(param_dtype)
    return Params(scale, bias), State(
        jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32)
    )


def batch_norm_train(
    x: Array,
    params: Params,
    state: State,
    *,
    axis: int | Sequence[int] = -1,
    momentum: float | Array | None = 0.99,
    eps: float | Array = 1e-5,
    weights: Array | None = None,
    residual: Array | None = None,
    activation: Callable[[Array], Array] | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Array, State]:
    """Normalize by the statistics of the batch, and update the state with them.

        y = activation((x - mean) / sqrt(var + eps) * scale + bias + residual)
        state.mean = momentum * state.mean + (1 - momentum) * mean, and var likewise

    mean and var (biased) are taken per feature over all other axes, in float32 (float64 for float64
    x). Gradients flow through them, into y and into the new state.

    Args:
        x: floating array of any rank >= 2 (rank >= 1 with axis_name). Where the squares of a
            feature add up to more than 3.4e38 (a million values of 2e16), its variance is not
            finite in float32, and skip_nonfinite keeps the old state.
        params: scale and bias, the shape of the feature axes.
        state: the running statistics.
        axis: the feature axis or axes; everything else is reduced.
        momentum: weight of the OLD value, in [0, 1] (PyTorch's is 1 minus this); None averages over
            all batches.
        eps: added to the variance; > 0.
        weights: bool mask or non-negative float weights, broadcastable to x; count = their sum. An
            element of weight zero influences neither the statistics nor any gradient, even if it is
            NaN. No gradient flows to the weights.
        residual: array like x, added before the activation.
        activation: elementwise function. jax.nn.relu, leaky_relu, relu6, silu, gelu are fused; any
            other runs after.
        axis_name: mapped axis or axes (shard_map, pmap, vmap) over which the batch is spread.
        axis_index_groups: groups of indices along axis_name to be normalized apart.
        virtual_batch_size: examples along axis 0 per group that is normalized by its own moments
            (ghost batches).
        unbiased: store n / (n - 1) times the variance, as PyTorch does.
        skip_nonfinite: keep the old state if the moments of the batch are not finite.
        dtype: of y; x's if None.
        implementation: None to choose, or the name of one.

    Returns:
        (y, state): y has the shape of x; the state has the dtypes of the one given.

    Raises:
        ValueError, TypeError: whatever does not fit; nothing is changed.
        NotImplementedError: an implementation that cannot run here.

    Reference: Ioffe & Szegedy 2015, algorithm 1.
    """
    options: dict[str, Any] = {
        "axis": axis,
        "activation": activation,
        "dtype": dtype,
        "implementation": implementation,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "virtual_batch_size": virtual_batch_size,
        "unbiased": unbiased,
        "skip_nonfinite": skip_nonfinite,
    }
    return _train(x, params, state, options, momentum, eps, weights, residual)


def batch_renorm_train(
    x: Array,
    params: Params,
    state: State,
    *,
    r_max: float | Array,
    d_max: float | Array,
    axis: int | Sequence[int] = -1,
    momentum: float | Array | None = 0.99,
    eps: float | Array = 1e-5,
    weights: Array | None = None,
    residual: Array | None = None,
    activation: Callable[[Array], Array] | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Array, State]:
    """Normalize by the statistics of the batch, corrected toward the running ones, and update the
    state.

        r = clip(std / running std, 1 / r_max, r_max)           std = sqrt(var + eps), for both
        d = clip((mean - running mean) / running std, -d_max, d_max)
        y = activation(((x - mean) / std * r + d) * scale + bias + residual)

    r and d are constants to the derivative; the running statistics are those before the update.
    With r_max = 1 and d_max = 0 this is `batch_norm_train`, bit for bit; with both infinite, y is
    what inference computes.  Small or dependent batches gain from it.  Raise both limits slowly
    (the paper: r_max from 1 to 3, d_max from 0 to 5), as traced values, so that a schedule compiles
    once.

    Args:
        x, params, state: as in `batch_norm_train`.
        r_max: limit of the correction of the standard deviation, >= 1; may be traced.
        d_max: limit of the correction of the mean, in running standard deviations, >= 0; may be
            traced.
        axis, momentum, eps, weights, residual, activation, axis_name, axis_index_groups, unbiased,
            skip_nonfinite, dtype, implementation: as in `batch_norm_train`. There are no virtual
            batches: their small size is what hurts.

    Returns:
        (y, state), as `batch_norm_train`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `batch_norm_train`, and for limits out of
            range.

    Reference: Ioffe 2017, algorithm 1.
    """
    validate.limits(r_max, d_max)
    options: dict[str, Any] = {
        "axis": axis,
        "activation": activation,
        "dtype": dtype,
        "implementation": implementation,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "unbiased": unbiased,
        "skip_nonfinite": skip_nonfinite,
    }
    limits = {"r_max": r_max, "d_max": d_max}
    return _train(x, params, state, options, momentum, eps, weights, residual, limits)


def batch_norm_eval(
    x: Array,
    params: Params,
    state: State,
    *,
    axis: int | Sequence[int] = -1,
    eps: float | Array = 1e-5,
    residual: Array | None = None,
    activation: Callable[[Array], Array] | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> Array:
    """Normalize by the running statistics: a fixed affine map per feature, which no other example
    influences.

    Args, Raises: as `batch_norm_train`; x may have rank 1.

    Returns:
        y, the shape of x.

    Reference: Ioffe & Szegedy 2015, algorithm 2.
    """
    x = validate.array(x, "x")
    axis = validate.axis(axis, x.ndim)
    validate.parameters(params, state, x, axis)
    validate.epsilon(eps, x.dtype)
    config = Config(
        axis=axis,
        activation=validate.activation(activation),
        dtype=validate.output_dtype(dtype, x),
        implementation=validate.implementation(implementation),
    )
    return layer.evaluate(
        x, params, state, config=config, eps=eps, residual=validate.residual(residual, x)
    )


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    params: Params,
    *,
    axis: int | Sequence[int] = -1,
    eps: float | Array = 1e-5,
    residual: Array | None = None,
    activation: Callable[[Array], Array] | None = None,
    dtype: Any = None,
) -> Array:
    """Normalize by any mean and variance; gradients flow to them too.

    Args:
        x: floating array.
        mean, var: the shape of the feature axes.
        params, axis, eps, residual, activation, dtype: as in `batch_norm_train`.

    Returns:
        y, the shape of x.
    """
    state = State(
        validate.array(mean, "mean"), validate.array(var, "var"), jnp.zeros((), jnp.int32)
    )
    return batch_norm_eval(
        x, params, state, axis=axis, eps=eps, residual=residual, activation=activation, dtype=dtype
    )


def moments(x: Array, *, axis: int | Sequence[int] = -1, weights: Array | None = None) -> Moments:
    """Count, mean and m2 of each feature.

    Args:
        x: floating array.
        axis: the feature axis or axes.
        weights: bool mask or non-negative float weights, broadcastable to x.

    Returns:
        Moments, float32 (float64 for float64 x), each the shape of the feature axes.

    Raises:
        ValueError, TypeError: an empty reduction, or arguments that do not fit x.
    """
    x = validate.array(x, "x")
    axis = validate.axis(axis, x.ndim)
    validate.nonempty(x, axis)
    return layer.moments(x, validate.weights(weights, x), axis=axis)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets, exactly (Chan, Golub & LeVeque 1979, eq. 2.1).

    Raises:
        TypeError: a or b is not Moments.  ValueError: their shapes differ.
    """
    validate.moments(a, "a")
    validate.moments(b, "b")
    validate.same_features(a, b)
    return stats.merge(a, b)


def psum_moments(
    m: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Moments:
    """Moments of the union over a mapped axis, weighted by count, in two all-reduces.

    Raises:
        ValueError: axis_name is not bound.
    """
    validate.moments(m, "m")
    validate.mapped_axis(axis_name, required=True)
    return stats.psum_moments(m, axis_name, validate.groups(axis_index_groups, axis_name))


def update_state(
    state: State,
    m: Moments,
    *,
    momentum: float | Array | None = 0.99,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
) -> State:
    """The state, updated with the moments of a batch.

    Args:
        state: the running statistics.
        m: moments of the batch.
        momentum: weight of the OLD value, in [0, 1]; None averages over all batches.
        unbiased: store n / (n - 1) times the variance, as PyTorch does.
        skip_nonfinite: keep the state if m is not finite.

    Returns:
        A state of the same dtypes; where m counted nothing, the same values.

    Raises:
        ValueError, TypeError: shapes that differ, or a momentum outside [0, 1].
    """
    validate.updatable(state)
    validate.moments(m, "m")
    validate.same_features(state, m)
    validate.update(momentum)
    return running.update(
        state,
        m,
        decay=running.decay(momentum),
        unbiased=validate.flag(unbiased, "unbiased"),
        skip_nonfinite=validate.flag(skip_nonfinite, "skip_nonfinite"),
    )


def _train(x, params, state, options, momentum, eps, weights, residual, limits=None):
    """`layer.train`, once everything is found to fit; `options` are the fields of `Config` as the
    user gave them."""
    x, given = validate.array(x, "x"), Config(**options)
    axis = validate.axis(given.axis, x.ndim)
    validate.parameters(params, state, x, axis)
    validate.updatable(state)
    validate.update(momentum)
    validate.epsilon(eps, x.dtype)
    weights = validate.weights(weights, x)
    validate.mapped_axis(given.axis_name)
    virtual_batch_size = validate.virtual_batch(given.virtual_batch_size, x, axis)
    validate.batch(x, axis, weights, given.axis_name, virtual_batch_size)
    config = given._replace(
        axis=axis,
        activation=validate.activation(given.activation),
        dtype=validate.output_dtype(given.dtype, x),
        implementation=validate.implementation(given.implementation),
        axis_index_groups=validate.groups(given.axis_index_groups, given.axis_name),
        virtual_batch_size=virtual_batch_size,
        unbiased=validate.flag(given.unbiased, "unbiased"),
        skip_nonfinite=validate.flag(given.skip_nonfinite, "skip_nonfinite"),
    )
    residual = validate.residual(residual, x)
    known = {"config": config, "momentum": momentum, "eps": eps, "weights": weights}
    return layer.train(x, params, state, **known, residual=residual, limits=limits)
