"""Batch normalization as pure functions over explicit state."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from jbn import autodiff, ghost, partition, running, stats, validate
from jbn.kernels.seam import FUSED, accumulator
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
    keys = (None, None) if key is None else jax.random.split(key)
    scale = scale_init(keys[0], shape, param_dtype) if use_scale else None
    bias = bias_init(keys[1], shape, param_dtype) if use_bias else None
    dtype = accumulator(param_dtype)
    return Params(scale, bias), State(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32))


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
    implementation: str | None = None,
) -> tuple[Array, State]:
    """Normalize by the statistics of the batch, and fold them into the state.

        y = activation((x - mean) / sqrt(var + eps) * scale + bias + residual)
        state.mean = momentum * state.mean + (1 - momentum) * mean, and var likewise

    mean and var (biased) are taken per feature over all other axes, in float32 (float64 for float64 x). Gradients flow
    through them, into y and into the new state.

    Args:
        x: floating array of any rank >= 2 (rank >= 1 with axis_name).
        params: scale and bias, the shape of the feature axes.
        state: the running statistics.
        axis: the feature axis or axes; everything else is reduced.
        momentum: weight of the OLD value, in [0, 1] (PyTorch's is 1 minus this); None averages over all batches.
        eps: added to the variance; > 0.
        weights: bool mask or non-negative float weights, broadcastable to x; count = their sum. An element of weight zero
            influences neither the statistics nor any gradient, even if it is NaN. No gradient flows to the weights.
        residual: array like x, added before the activation.
        activation: elementwise function. jax.nn.relu, leaky_relu, silu and gelu are fused; any other runs after.
        axis_name: mapped axis or axes (shard_map, pmap, vmap) over which the batch is spread.
        axis_index_groups: groups of indices along axis_name to be normalized apart.
        virtual_batch_size: examples along axis 0 per group that is normalized by its own moments (ghost batches).
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
    x, arguments = checked(
        x,
        params,
        state,
        axis=axis,
        momentum=momentum,
        eps=eps,
        weights=weights,
        residual=residual,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        unbiased=unbiased,
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
        implementation=implementation,
    )
    return train(x, params, state, **arguments)


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
    implementation: str | None = None,
) -> Array:
    """Normalize by the running statistics: a fixed affine map per feature, which no other example influences.

    Args, Raises: as `batch_norm_train`; x may have rank 1.

    Returns:
        y, the shape of x.

    Reference: Ioffe & Szegedy 2015, algorithm 2.
    """
    x = validate.array(x, "x")
    axis = validate.axis(axis, x.ndim)
    validate.parameters(params, state, x, axis)
    validate.epsilon(eps)
    config = Config(
        axis=axis,
        activation=validate.activation(activation),
        dtype=validate.output_dtype(dtype, x),
        implementation=validate.implementation(implementation),
    )
    return evaluate(x, params, state, config=config, eps=eps, residual=validate.residual(residual, x))


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
    state = State(validate.array(mean, "mean"), validate.array(var, "var"), jnp.zeros((), jnp.int32))
    return batch_norm_eval(x, params, state, axis=axis, eps=eps, residual=residual, activation=activation, dtype=dtype)


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
    return _moments(x, validate.weights(weights, x), axis=axis)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets, exactly (Chan, Golub & LeVeque 1979, eq. 2.1).

    Raises:
        TypeError: a or b is not Moments.  ValueError: their shapes differ.
    """
    validate.moments(a)
    validate.moments(b)
    validate.same_features(a, b)
    return stats.merge(a, b)


def psum_moments(m: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None = None) -> Moments:
    """Moments of the union over a mapped axis, weighted by count, in two all-reduces.

    Raises:
        ValueError: axis_name is not bound.
    """
    validate.moments(m)
    validate.mapped_axis(axis_name)
    local = stats.Stats(m.count, m.mean, jnp.zeros_like(m.mean), m.m2)
    count, shift, offset, m2 = stats.psum_stats(local, axis_name, validate.groups(axis_index_groups, axis_name))
    return Moments(count, shift + offset, m2)


def update_state(
    state: State, m: Moments, *, momentum: float | Array | None = 0.99, unbiased: bool = False, skip_nonfinite: bool = False
) -> State:
    """Fold the moments of a batch into the state.

    Args:
        state: the running statistics.
        m: moments of the batch.
        momentum: weight of the OLD value, in [0, 1]; None averages over all batches.
        unbiased: fold in n / (n - 1) times the variance.
        skip_nonfinite: keep the state if m is not finite.

    Returns:
        A state of the same dtypes; where m counted nothing, the same values.

    Raises:
        ValueError, TypeError: shapes that differ, or a momentum outside [0, 1].
    """
    validate.state(state)
    validate.moments(m)
    validate.same_features(state, m)
    validate.update(momentum)
    return running.fold(state, m, decay=running.decay(momentum), unbiased=unbiased, skip_nonfinite=skip_nonfinite)


class Config(NamedTuple):
    """What the unvalidated core needs to know before tracing."""

    axis: tuple[int, ...]
    activation: Callable | None
    dtype: Any
    implementation: str | None = None
    axis_name: Hashable | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    virtual_batch_size: int | None = None
    unbiased: bool = False
    skip_nonfinite: bool = False


def checked(
    x,
    params,
    state,
    *,
    axis,
    momentum,
    eps,
    weights,
    residual,
    activation,
    axis_name,
    axis_index_groups,
    virtual_batch_size,
    unbiased,
    skip_nonfinite,
    dtype,
    implementation,
) -> tuple[Array, dict[str, Any]]:
    """x and the keyword arguments of `train`, once everything has been found to fit: the checks of all training calls."""
    x = validate.array(x, "x")
    axis = validate.axis(axis, x.ndim)
    validate.parameters(params, state, x, axis)
    validate.update(momentum)
    validate.epsilon(eps)
    weights = validate.weights(weights, x)
    validate.mapped_axis(axis_name)
    validate.batch(x, axis, weights, axis_name, virtual_batch_size)
    config = Config(
        axis=axis,
        activation=validate.activation(activation),
        dtype=validate.output_dtype(dtype, x),
        implementation=validate.implementation(implementation),
        axis_name=axis_name,
        axis_index_groups=validate.groups(axis_index_groups, axis_name),
        virtual_batch_size=virtual_batch_size,
        unbiased=unbiased,
        skip_nonfinite=skip_nonfinite,
    )
    residual = validate.residual(residual, x)
    return x, {"config": config, "momentum": momentum, "eps": eps, "weights": weights, "residual": residual}


def train(x, params, state, *, config: Config, momentum, eps, weights=None, residual=None) -> tuple[Array, State]:
    """`batch_norm_train` without the checks, for the modules."""
    fused, after = split_activation(config)
    y, new_state = _train(x, params, state, running.decay(momentum), eps, weights, residual, config=fused)
    return y if after is None else after(y).astype(config.dtype), new_state


def evaluate(x, params, state, *, config: Config, eps, residual=None) -> Array:
    """`batch_norm_eval` without the checks, for the modules."""
    fused, after = split_activation(config)
    y = _eval(x, params, state, eps, residual, config=fused)
    return y if after is None else after(y).astype(config.dtype)


def split_activation(config):
    """Activations that are not fused stay outside the jit and the derivative rule, so closures over tracers work."""
    if config.activation is None or config.activation in FUSED:
        return config, None
    return config._replace(activation=None), config.activation


@functools.partial(jax.jit, static_argnames="config")
def _train(x, params, state, decay, eps, weights, residual, *, config):
    spec, operands = _operands(x, params, eps, residual, config)
    weights = None if weights is None else jax.lax.stop_gradient(weights)
    guess = jax.lax.stop_gradient(state.mean.astype(operands.scale.dtype))
    operands, weights, guess = stats.vary_alike((operands, weights, guess))
    if config.virtual_batch_size is None:
        y, batch = autodiff.batch_norm(spec, operands, weights, guess)
    else:
        y, batch = ghost.batch_norm(spec, operands, weights, guess, config.virtual_batch_size)
    m = Moments(batch.count, batch.shift + batch.offset, batch.var * batch.count)
    return y, running.fold(state, m, decay=decay, unbiased=config.unbiased, skip_nonfinite=config.skip_nonfinite)


@functools.partial(jax.jit, static_argnames="config")
def _eval(x, params, state, eps, residual, *, config):
    spec, operands = _operands(x, params, eps, residual, config)
    acc = operands.scale.dtype
    mean, var = stats.split_alike((state.mean.astype(acc), state.var.astype(acc)), x, config.axis)
    return autodiff.normalize(spec, *stats.vary_alike((operands, mean, var)))


def _operands(x, params, eps, residual, config):
    """The static and the dynamic arguments of the derivative rule, every vector in the accumulator's dtype."""
    acc = accumulator(x.dtype)
    features = tuple(x.shape[a] for a in config.axis)
    scale = jnp.ones(features, acc) if params.scale is None else params.scale.astype(acc)
    bias = jnp.zeros(features, acc) if params.bias is None else params.bias.astype(acc)
    scale, bias = stats.split_alike((scale, bias), x, config.axis)
    residual = stats.split_alike(residual, x, tuple(range(x.ndim)))
    operands = autodiff.Operands(x, scale, bias, residual, jnp.asarray(eps).astype(acc))
    spec = autodiff.Spec(
        axis=config.axis,
        activation=config.activation,
        dtype=config.dtype,
        implementation=config.implementation,
        residual_dtype=None if residual is None else residual.dtype,
        axis_name=config.axis_name,
        axis_index_groups=config.axis_index_groups,
    )
    return spec, stats.vary_alike(operands)


@functools.partial(jax.jit, static_argnames="axis")
def _moments(x, weights, *, axis):
    guess = jnp.zeros(tuple(x.shape[a] for a in axis), accumulator(x.dtype))
    x, guess, weights = stats.vary_alike((x, guess, weights))
    count, shift, offset, m2 = partition.fwd_stats(None, x, guess, weights, axis=axis)
    return Moments(count, shift + offset, m2)
