"""Batch renormalization: normalize by the batch, corrected toward the running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core import op, sharding, stats
from jbn.core.config import Config
from jbn.kernels.seam import accumulator
from jbn.types import Params, State


def corrected(
    x: Array,
    params: Params,
    state: State,
    *,
    config: Config,
    limits: dict[str, Any],
    eps: Any,
    weights: Array | None,
) -> Params:
    """Parameters with which batch norm computes batch renorm's y:

    scale * ((x - mean) / std * r + d) + bias.

    XLA merges the statistics taken here with those of the batch norm that follows, as they stand in
    one program: the correction costs no pass over x and no collective.
    """
    r, d = _correction(x, state, eps, weights, config, **limits)
    scale = r if params.scale is None else params.scale.astype(r.dtype) * r
    shift = d if params.scale is None else params.scale.astype(d.dtype) * d
    bias = shift if params.bias is None else params.bias.astype(d.dtype) + shift
    return Params(scale, bias)


def _correction(x, state, eps, weights, config, *, r_max, d_max):
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
