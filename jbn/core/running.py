"""Folding the moments of a batch into the running state."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core import stats
from jbn.core.sharding import split_alike
from jbn.types import Moments, State


class Decay(NamedTuple):
    """Weights of the old and of the new value; 1 - 0.99 is taken before anything is rounded to float32."""

    old: float | Array
    new: float | Array


def decay(momentum: float | Array | Decay | None) -> Decay | None:
    if momentum is None or isinstance(momentum, Decay):
        return momentum
    momentum = float(momentum) if isinstance(momentum, int) else momentum  # 0 and 0.0 compile once
    return Decay(momentum, 1 - momentum)


def update(
    state: State, m: Moments, *, decay: Decay | None, unbiased: bool, skip_nonfinite: bool
) -> State:
    """decay.old * old + decay.new * new, or the average of all batches for decay None.

    A channel in which nothing was counted keeps its values; so does the whole state if no channel
    counted anything, or, with skip_nonfinite, if any moment is not finite.
    """
    dtype = np.promote_types(m.mean.dtype, state.mean.dtype)
    if decay is None:
        total = state.count.astype(dtype) + 1
        decay = Decay((total - 1) / total, 1 / total)
    weight_old, weight_new = (jnp.asarray(weight).astype(dtype) for weight in decay)
    accepted = (m.count > 0).any()
    if skip_nonfinite:
        accepted = accepted & jnp.isfinite(m.mean).all() & jnp.isfinite(m.m2).all()
    m = split_alike(m, state.mean, tuple(range(state.mean.ndim)))
    counted = m.count > 0

    def average(old, new):
        mixed = weight_old * old.astype(dtype) + weight_new * new.astype(dtype)
        return jnp.where(counted & accepted, mixed.astype(old.dtype), old)

    return State(
        mean=average(state.mean, m.mean),
        var=average(state.var, stats.variance(m, unbiased=unbiased)),
        count=state.count + accepted.astype(state.count.dtype),
    )
