"""Batch renormalization: normalize by the batch, corrected toward the running statistics that inference will use."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn import functional, partition, running, stats, validate
from jbn.functional import Config
from jbn.kernels.seam import accumulator
from jbn.types import Params, State


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
    implementation: str | None = None,
) -> tuple[Array, State]:
    """Normalize by the statistics of the batch, corrected toward the running ones, and fold the batch into the state.

        r = clip(std / running std, 1 / r_max, r_max)           std = sqrt(var + eps), for both
        d = clip((mean - running mean) / running std, -d_max, d_max)
        y = activation(((x - mean) / std * r + d) * scale + bias + residual)

    r and d are constants to the derivative; the running statistics are those before the update.  With r_max = 1 and
    d_max = 0 this is `batch_norm_train`, bit for bit; with both infinite, y is what inference computes.  Small or
    dependent batches gain from it.  Raise both limits slowly (the paper: r_max from 1 to 3, d_max from 0 to 5), as traced
    values, so that a schedule compiles once.

    Args:
        x, params, state: as in `batch_norm_train`.
        r_max: limit of the correction of the standard deviation, >= 1; may be traced.
        d_max: limit of the correction of the mean, in running standard deviations, >= 0; may be traced.
        axis, momentum, eps, weights, residual, activation, axis_name, axis_index_groups, unbiased, skip_nonfinite, dtype,
            implementation: as in `batch_norm_train`. There are no virtual batches: making them small is what hurts.

    Returns:
        (y, state), as `batch_norm_train`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `batch_norm_train`, and for limits out of range.

    Reference: Ioffe 2017, algorithm 1.
    """
    validate.limits(r_max, d_max)
    x, arguments = functional.checked(
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
        virtual_batch_size=None,
        unbiased=unbiased,
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
        implementation=implementation,
    )
    return train(x, params, state, r_max=r_max, d_max=d_max, **arguments)


def train(x, params, state, *, config: Config, r_max, d_max, momentum, eps, weights=None, residual=None) -> tuple[Array, State]:
    """`batch_renorm_train` without the checks, for the modules."""
    fused, after = functional.split_activation(config)
    y, new_state = _train(x, params, state, r_max, d_max, running.decay(momentum), eps, weights, residual, config=fused)
    return y if after is None else after(y).astype(config.dtype), new_state


# One jit around both, so that XLA merges the two statistics: the correction costs no pass over x and no collective.
@functools.partial(jax.jit, static_argnames="config")
def _train(x, params, state, r_max, d_max, decay, eps, weights, residual, *, config):
    r, d = _correction(x, state, r_max, d_max, eps, weights, config)
    scale = r if params.scale is None else params.scale.astype(r.dtype) * r
    shift = d if params.scale is None else params.scale.astype(d.dtype) * d
    bias = shift if params.bias is None else params.bias.astype(d.dtype) + shift
    return functional.train(
        x, Params(scale, bias), state, config=config, momentum=decay, eps=eps, weights=weights, residual=residual
    )


def _correction(x, state, r_max, d_max, eps, weights, config):
    """r and d of each feature, constants to the derivative."""
    x, state, eps, weights = jax.tree.map(lax.stop_gradient, (x, state, eps, weights))
    acc = accumulator(x.dtype)
    mean, var, eps, r_max, d_max = (jnp.asarray(v).astype(acc) for v in (state.mean, state.var, eps, r_max, d_max))
    mean, var = stats.split_alike((mean, var), x, config.axis)
    x, weights, guess = stats.vary_alike((x, weights, mean))
    local = partition.fwd_stats(config.implementation, x, guess, weights, axis=config.axis)
    count, shift, offset, m2 = stats.psum_stats(local, config.axis_name, config.axis_index_groups)
    running_std = jnp.sqrt(var + eps)
    r = jnp.sqrt(m2 / jnp.where(count > 0, count, 1) + eps) / running_std
    d = ((shift - mean) + offset) / running_std
    return jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)
