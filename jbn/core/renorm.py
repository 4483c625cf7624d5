"""Batch renormalization: normalize by the batch, corrected toward the running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core import op, sharding, stats, validate
from jbn.core.config import Config
from jbn.kernels.seam import accumulator
from jbn.types import Params, State

CLOSED = {"r_max": 1.0, "d_max": 0.0}  # the limits at which batch renorm is batch norm


def counts(layer: Any) -> bool:
    """Whether a module's options need the count of its updates.

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


def limits_at(layer: Any, steps: Array | None, r_max: Any, d_max: Any) -> dict[str, Any]:
    """The limits of one training call of a module.

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
        own = {key: jnp.where(warm, CLOSED[key], limit) for key, limit in own.items()}
    given = {"r_max": r_max, "d_max": d_max}
    return {key: own[key] if value is None else value for key, value in given.items()}


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
