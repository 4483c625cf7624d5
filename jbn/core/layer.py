"""A whole layer without the checks: from x, parameters and state to y and the new state.

The public functions and the Flax modules call these, once everything is found to fit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core import autodiff, ghost, marking, op, renorm, running, sharding, stats, validate
from jbn.core.config import Config
from jbn.core.passes import Operands
from jbn.kernels.seam import FUSED, accumulator
from jbn.types import Moments, Params, State


def train(
    x: Array,
    params: Params,
    state: State,
    *,
    config: Config,
    momentum: Any,
    eps: Any,
    weights: Array | None = None,
    residual: Array | None = None,
    limits: dict[str, Any] | None = None,
) -> tuple[Array, State]:
    """`batch_norm_train` without the checks; `batch_renorm_train` with limits, r_max and d_max."""
    if x.size == 0:  # nothing to normalize and nothing to learn from
        return x.astype(config.dtype), state
    fused, after = _split_activation(config)
    decay = running.decay(momentum)
    arguments = (x, params, state, decay, eps, weights, limits, residual)
    y, new_state = marking.call(_train, *arguments, config=fused)
    return _activated(after, y, config), new_state


def evaluate(
    x: Array,
    params: Params,
    state: State,
    *,
    config: Config,
    eps: Any,
    residual: Array | None = None,
) -> Array:
    """`batch_norm_eval` without the checks."""
    if x.size == 0:
        return x.astype(config.dtype)
    fused, after = _split_activation(config)
    y = marking.call(_evaluate, x, params, state, eps, residual, config=fused)
    return _activated(after, y, config)


def _split_activation(config: Config):
    """(config, None), or without the activation and the activation, if it is not fused.

    Such an activation stays outside the jit and the derivative rule, so that it may close over
    traced values.
    """
    if config.activation is None or config.activation in FUSED:
        return config, None
    return config._replace(activation=None), config.activation


def _activated(after, y, config):
    return y if after is None else validate.activated(after(y), y).astype(config.dtype)


@functools.partial(jax.jit, static_argnames="config")
def _train(x, params, state, decay, eps, weights, limits, residual, *, config):
    config = config._replace(axis_sizes=sharding.axis_sizes(config.axis_name))
    weights, _ = stats.rescale(weights, config.axis, config.axis_name)
    if limits is not None:
        known = {"config": config, "limits": limits, "eps": eps, "weights": weights}
        params = renorm.corrected(x, params, state, **known)
    operands = _operands(x, params, eps, residual, config)
    guess = lax.stop_gradient(state.mean.astype(operands.scale.dtype))
    operands, weights, guess = sharding.vary_alike((operands, weights, guess))
    batch_norm = autodiff if config.virtual_batch_size is None else ghost
    y, batch = batch_norm.batch_norm(config, operands, weights, guess)
    m = stats.as_moments(batch)
    known = {"unbiased": config.unbiased, "skip_nonfinite": config.skip_nonfinite}
    return y, running.update(state, m, decay=decay, **known)


@functools.partial(jax.jit, static_argnames="config")
def _evaluate(x, params, state, eps, residual, *, config):
    operands = _operands(x, params, eps, residual, config)
    mean, var = (v.astype(operands.scale.dtype) for v in (state.mean, state.var))
    mean, var = sharding.split_alike((mean, var), x, config.axis)
    return autodiff.normalize(config, *sharding.vary_alike((operands, mean, var)))


@functools.partial(jax.jit, static_argnames="axis")
def moments(x: Array, weights: Array | None, *, axis: tuple[int, ...]) -> Moments:
    """The moments of x, over all devices but those of manual axes."""
    features, dtype = tuple(x.shape[a] for a in axis), accumulator(x.dtype)
    if x.size == 0:
        return Moments(*(jnp.zeros(features, dtype),) * 3)
    weights, unit = stats.rescale(weights, axis)
    x, guess, weights = sharding.vary_alike((x, jnp.zeros(features, dtype), weights))
    count, mean, m2 = stats.as_moments(op.fwd_stats(Config(axis, None, x.dtype), x, guess, weights))
    unit = jnp.broadcast_to(unit, features).astype(dtype)
    return Moments(count * unit, mean, m2 * unit)


def _operands(x, params, eps, residual, config):
    """The arguments of the derivative rule, every vector in the accumulator's dtype."""
    dtype = accumulator(x.dtype)
    features = tuple(x.shape[a] for a in config.axis)
    scale = jnp.ones(features, dtype) if params.scale is None else params.scale.astype(dtype)
    bias = jnp.zeros(features, dtype) if params.bias is None else params.bias.astype(dtype)
    scale, bias = sharding.split_alike((scale, bias), x, config.axis)
    residual = sharding.split_alike(residual, x, tuple(range(x.ndim)))
    eps = jnp.asarray(eps).astype(dtype)
    return sharding.vary_alike(Operands(x, scale, bias, residual, eps))
