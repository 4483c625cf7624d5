"""How the moments of a batch enter the running state."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core import stats
from jbn.core.sharding import split_alike
from jbn.types import Moments, State


class Decay(NamedTuple):
    """Weights of the old and of the new value.

    1 - momentum is computed in Python floats where it can be: in float32, 1 - 0.9999 is off by
    3e-4 of itself.
    """

    old: float | Array
    new: float | Array


def decay(momentum: float | Array | Decay | None) -> Decay | None:
    if momentum is None or isinstance(momentum, Decay):
        return momentum
    momentum = float(momentum) if isinstance(momentum, int) else momentum  # 0 and 0.0 compile once
    return Decay(momentum, 1 - momentum)


# Under jit, because JAX moves a state to a mesh only there.
@functools.partial(jax.jit, static_argnames=("unbiased", "skip_nonfinite"))
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
    # On an explicit mesh the moments go where the state is; a state on no mesh yet goes to them.
    axes = tuple(range(state.mean.ndim))
    m = split_alike(m, state.mean, axes)
    m, mean, var = split_alike((m, state.mean, state.var), m.mean, axes)
    counted = m.count > 0

    def average(old, new):
        mixed = weight_old * old.astype(dtype) + weight_new * new.astype(dtype)
        return jnp.where(counted & accepted, mixed.astype(old.dtype), old)

    return State(
        mean=average(mean, m.mean),
        var=average(var, stats.variance(m, unbiased=unbiased)),
        count=state.count + accepted.astype(state.count.dtype),
    )
