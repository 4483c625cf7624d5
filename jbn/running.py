"""Folding the moments of a batch into the running state."""

import jax.numpy as jnp
from jax import Array

from jbn import stats
from jbn.types import Moments, State


def fold(state: State, m: Moments, *, momentum: float | Array | None, unbiased: bool, skip_nonfinite: bool) -> State:
    """momentum * old + (1 - momentum) * new, or the average of all batches for momentum None.

    A channel in which nothing was counted keeps its values; so does the whole state if no channel counted anything, or,
    with skip_nonfinite, if any moment is not finite.
    """
    dtype = jnp.promote_types(m.mean.dtype, state.mean.dtype)
    if momentum is None:
        seen = state.count.astype(dtype)
        momentum = seen / (seen + 1)
    momentum = jnp.asarray(momentum).astype(dtype)
    counted = m.count > 0
    accepted = counted.any()
    if skip_nonfinite:
        accepted = accepted & jnp.isfinite(m.mean).all() & jnp.isfinite(m.m2).all()

    def average(old, new):
        mixed = momentum * old.astype(dtype) + (1 - momentum) * new.astype(dtype)
        return jnp.where(counted & accepted, mixed.astype(old.dtype), old)

    return State(
        mean=average(state.mean, m.mean),
        var=average(state.var, stats.variance(m, unbiased=unbiased)),
        count=state.count + accepted.astype(state.count.dtype),
    )
