"""The four functions in jax.numpy: the specification of every kernel.

CPU runs them too, with sums that share one pass over memory (`xla_cpu`).  GPU and TPU have versions
of their own in `xla_gpu` and `xla_tpu`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.kernels.seam import (
    MASKING,
    Affine,
    Stats,
    StatsGradient,
    accumulator,
    barrier,
    broadcastable,
    input_cotangent,
    is_counted,
    num_values,
    pre_activation,
    reduced_axes,
    round_shift,
    through_activation,
)

# E[x^2] - E[x]^2 loses (mean / std)^2 roundings: beyond mean = 10 std it is not used (measured
# there: var within 2e-5).
MAX_SQUARED_MEAN = 100.0


def separate_sums(axis: tuple[int, ...], *values: Array) -> tuple[Array, ...]:
    """The per-channel sums of several arrays."""
    return tuple(value.sum(reduced_axes(value.ndim, axis)) for value in values)


def fwd_stats(
    x: Array,
    shift: Array,
    weights: Array | None,
    *,
    axis: tuple[int, ...],
    sums: Callable[..., tuple[Array, ...]] = separate_sums,
) -> Stats:
    """Count, mean and m2 of each channel. `shift` is not used: the first pass finds the mean."""
    del shift
    if weights is None:
        return _plain_stats(x, axis, sums)
    return _weighted_stats(x, weights, axis, sums)


def fwd_apply(
    x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype
) -> Array:
    """y = activation((x - mean) * gain + bias + residual)."""
    acc = accumulator(x.dtype)
    z = pre_activation(x.astype(acc), _vectors(affine, x.ndim, axis), _cast(residual, acc))
    if activation is jax.nn.relu and residual is not None:
        # A select, because XLA would compute a maximum again in the backward pass, and would read
        # the residual for it.
        return jnp.where(z <= 0, 0, z).astype(dtype)
    return (z if activation is None else activation(z)).astype(dtype)


def bwd_stats(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    saved,
    weights,
    axis,
    activation,
    sums: Callable[..., tuple[Array, ...]] = separate_sums,
) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - shift)."""
    acc = accumulator(x.dtype)
    dz = _cotangent(x, dy, affine, saved, weights, axis, activation).astype(acc)
    sum_dz, sum_dz_x = sums(axis, dz, dz * (x.astype(acc) - _vectors(affine.shift, x.ndim, axis)))
    return sum_dz, sum_dz_x


def bwd_apply(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    stats_gradient: StatsGradient | None,
    saved,
    weights,
    axis,
    activation,
    residual_dtype,
) -> tuple[Array, Array | None]:
    """(dx, dz): dx = gain * dz + weights * (intercept + slope * (x - shift)).

    dz is the residual's cotangent, in residual_dtype; None where that is None.
    """
    acc = accumulator(x.dtype)
    dtype = x.dtype
    dz = _cotangent(x, dy, affine, saved, weights, axis, activation)
    vectors = _vectors((affine, stats_gradient), x.ndim, axis)
    dx = input_cotangent(x.astype(acc), dz.astype(acc), *vectors, _cast(weights, acc))
    return dx.astype(dtype), None if residual_dtype is None else dz.astype(residual_dtype)


def _plain_stats(x, axis, sums):
    count = num_values(x, axis)

    def about(shift, x):
        x = x.astype(accumulator(x.dtype))
        x = x if shift is None else x - broadcastable(shift, x.ndim, axis)
        offset, square = (total / count for total in sums(axis, x, jnp.square(x)))
        return offset, square - offset * offset

    mean, var = about(None, x)

    def near(x):
        return jnp.zeros_like(mean), mean, var

    def far(x):
        shift = round_shift(mean)
        return shift, *about(shift, x)

    # The branches return `shift`. If both returned the same expression, XLA would hoist it and
    # compute it again, division and all, for every element of every pass over x.
    shift, offset, var = lax.cond(jnp.all(mean * mean <= MAX_SQUARED_MEAN * var), near, far, x)
    return Stats(jnp.full_like(mean, count), shift, offset, jnp.maximum(var, 0) * count)


def _weighted_stats(x, weights, axis, sums):
    """In two passes; what an element of weight zero holds has no influence, even NaN."""
    acc = accumulator(x.dtype)
    weights = jnp.broadcast_to(weights.astype(acc), x.shape)
    x = jnp.where(weights > 0, x.astype(acc), 0)
    count, total = sums(axis, weights, weights * x)
    divisor = jnp.where(count > 0, count, 1)
    shift = round_shift(total / divisor)
    centered = jnp.where(weights > 0, x - broadcastable(shift, x.ndim, axis), 0)
    offset, m2 = sums(axis, weights * centered, weights * jnp.square(centered))
    offset = offset / divisor
    return Stats(count, shift, offset, jnp.maximum(m2 - count * jnp.square(offset), 0))


def _cotangent(x, dy, affine, saved, weights, axis, activation):
    """dz, finite where the weight is zero.

    With a residual, whose cotangent it is, it is written to memory once for three passes; else each
    pass makes it from x.
    """
    acc = accumulator(x.dtype)
    dz = dy
    if activation is not None:
        # A barrier on y, or XLA recomputes it here from x and the residual: one more tensor read.
        saved = None if saved is None else lax.optimization_barrier(saved).astype(acc)
        arriving = dy.astype(acc)
        if activation is jax.nn.relu and dy.dtype == acc:
            # y > 0 is so short that LLVM unrolls a loop over 32 channels and then does not
            # vectorize it, which doubles the time.
            saved = None if saved is None else saved + jnp.abs(saved)
            arriving = _read_twice(arriving)
        dz = through_activation(
            x.astype(acc), arriving, _vectors(affine, x.ndim, axis), saved, activation
        )
        dz = dz.astype(dy.dtype) if activation in MASKING else dz
    if weights is not None:
        dz = jnp.where(~is_counted(weights) & ~jnp.isfinite(dz), 0, dz)
    return dz if saved is None else lax.optimization_barrier(dz)


@jax.custom_jvp
def _read_twice(dy):
    """dy, read a second time to be compared with zero.

    If only relu's mask reads dy, LLVM loads it under that mask, which takes 1.3 times as long (AMD
    with AVX-512).
    """
    return jnp.where(dy != 0, dy, 0)


_read_twice.defjvp(lambda primals, tangents: (_read_twice(*primals), *tangents))


def _vectors(vectors, ndim, axis):
    """Vectors (a pytree) behind barriers; XLA would compute them again for each element of x."""
    return broadcastable(barrier(vectors), ndim, axis)


def _cast(array, dtype):
    return None if array is None else array.astype(dtype)
