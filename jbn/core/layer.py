"""A whole layer without the checks: from x, parameters and state to y and the new state. Called by the functions and modules."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbn.core import autodiff, ghost, partition, running, stats
from jbn.kernels.seam import FUSED, accumulator
from jbn.types import Moments, State


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


def train(
    x, params, state, *, config: Config, momentum, eps, weights=None, residual=None
) -> tuple[Array, State]:
    """`batch_norm_train` without the checks, for the modules."""
    fused, after = split_activation(config)
    y, new_state = _train(
        x, params, state, running.decay(momentum), eps, weights, residual, config=fused
    )
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
    return y, running.update(
        state, m, decay=decay, unbiased=config.unbiased, skip_nonfinite=config.skip_nonfinite
    )


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
def moments(x, weights, *, axis):
    guess = jnp.zeros(tuple(x.shape[a] for a in axis), accumulator(x.dtype))
    x, guess, weights = stats.vary_alike((x, guess, weights))
    count, shift, offset, m2 = partition.fwd_stats(None, x, guess, weights, axis=axis)
    return Moments(count, shift + offset, m2)
