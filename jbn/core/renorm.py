"""Batch renormalization: normalize by the batch, corrected toward the running statistics."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core import layer, op, running, sharding, stats
from jbn.core.config import Config
from jbn.kernels.seam import accumulator
from jbn.types import Params, State


def train(
    x, params, state, *, config: Config, r_max, d_max, momentum, eps, weights=None, residual=None
) -> tuple[Array, State]:
    """`batch_renorm_train` without the checks, for the modules."""
    if x.size == 0:
        return x.astype(config.dtype), state
    fused, after = layer.split_activation(config)
    y, new_state = _train(
        x,
        params,
        state,
        r_max,
        d_max,
        running.decay(momentum),
        eps,
        weights,
        residual,
        config=fused,
    )
    return y if after is None else after(y).astype(config.dtype), new_state


# One jit around both, so that XLA merges the two statistics: the correction costs no pass over x
# and no collective.
@functools.partial(jax.jit, static_argnames="config")
def _train(x, params, state, r_max, d_max, decay, eps, weights, residual, *, config):
    weights, _ = stats.rescale(weights, config.axis, config.axis_name)
    r, d = _correction(x, state, r_max, d_max, eps, weights, config)
    scale = r if params.scale is None else params.scale.astype(r.dtype) * r
    shift = d if params.scale is None else params.scale.astype(d.dtype) * d
    bias = shift if params.bias is None else params.bias.astype(d.dtype) + shift
    return layer.train(
        x,
        Params(scale, bias),
        state,
        config=config,
        momentum=decay,
        eps=eps,
        weights=weights,
        residual=residual,
    )


def _correction(x, state, r_max, d_max, eps, weights, config):
    """r and d of each feature, constants to the derivative."""
    x, state, eps, weights = jax.tree.map(lax.stop_gradient, (x, state, eps, weights))
    acc = accumulator(x.dtype)
    mean, var, eps, r_max, d_max = (
        jnp.asarray(v).astype(acc) for v in (state.mean, state.var, eps, r_max, d_max)
    )
    mean, var = sharding.split_alike((mean, var), x, config.axis)
    x, weights, guess = sharding.vary_alike((x, weights, mean))
    local = op.fwd_stats(config, x, guess, weights)
    batch = stats.psum_stats(local, config.axis_name, config.axis_index_groups)
    running_std = jnp.sqrt(var + eps)
    r = jnp.sqrt(stats.variance(batch) + eps) / running_std
    d = ((batch.shift - mean) + batch.offset) / running_std
    return jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)
