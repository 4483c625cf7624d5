"""The four functions in jax.numpy: the specification of every kernel, and the fast path on CPU.

On CPU the time is decided by what XLA fuses into its YNNPACK reductions.  A convert, subtract or
multiply joins a reduction only if nothing else uses its result, but common-subexpression
elimination (CSE) makes reductions share their inputs.  `_isolate` prevents the sharing.
"""

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


def fwd_stats(x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...]) -> Stats:
    """Count, mean and m2 of each channel. `shift` is not used: the first pass finds the mean."""
    del shift
    return _plain_stats(x, axis) if weights is None else _weighted_stats(x, weights, axis)


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
    x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation
) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - shift)."""
    acc = accumulator(x.dtype)
    reduced = reduced_axes(x.ndim, axis)
    dz = _cotangent(x, dy, affine, saved, weights, axis, activation)
    sum_dz = _isolate(3, dz).astype(acc).sum(reduced)
    x, dz, shift = _isolate(4, x, dz, broadcastable(affine.shift, x.ndim, axis))
    centered = lambda x, dz, shift: (dz.astype(acc) * (x.astype(acc) - shift)).sum(reduced)
    if activation is not None and saved is None:
        # No lax.cond here: with one, XLA would not reuse dz's buffer for dx, and the peak memory
        # would grow by one tensor.
        sum_dz_x = centered(x, dz, shift)
    else:
        # The subtraction makes this pass 1.2 to 1.6 times as long; a mean near zero has shift 0.
        plain = lambda x, dz, shift: (dz.astype(acc) * x.astype(acc)).sum(reduced)
        sum_dz_x = lax.cond(jnp.all(shift == 0), plain, centered, x, dz, shift)
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


def _plain_stats(x, axis):
    acc = accumulator(x.dtype)
    reduced = reduced_axes(x.ndim, axis)
    count = num_values(x, axis)
    mean = _isolate(1, x).astype(acc).sum(reduced) / count
    square = jnp.square(_isolate(2, x).astype(acc)).sum(reduced) / count
    var = square - mean * mean

    def near(x):
        return jnp.zeros_like(mean), mean, var

    def far(x):
        shift = round_shift(mean)
        (x1, shift1), (x2, shift2) = _isolate(1, x, shift), _isolate(2, x, shift)
        offset = (x1.astype(acc) - broadcastable(shift1, x.ndim, axis)).sum(reduced) / count
        var = (
            jnp.square(x2.astype(acc) - broadcastable(shift2, x.ndim, axis)).sum(reduced) / count
            - offset * offset
        )
        return shift, offset, var

    # The branches return `shift`. If both returned the same expression, XLA would hoist it and
    # compute it again, division and all, for every element of every pass over x.
    shift, offset, var = lax.cond(jnp.all(mean * mean <= MAX_SQUARED_MEAN * var), near, far, x)
    return Stats(jnp.full_like(mean, count), shift, offset, jnp.maximum(var, 0) * count)


def _weighted_stats(x, weights, axis):
    """By three sums; what an element of weight zero holds has no influence, even NaN."""
    acc = accumulator(x.dtype)
    reduced = reduced_axes(x.ndim, axis)
    weights = jnp.broadcast_to(weights.astype(acc), x.shape)
    count = weights.sum(reduced)
    divisor = jnp.where(count > 0, count, 1)
    x = jnp.where(weights > 0, x.astype(acc), 0)
    shift = round_shift((weights * x).sum(reduced) / divisor)
    centered = jnp.where(weights > 0, x - broadcastable(shift, x.ndim, axis), 0)
    offset = (weights * centered).sum(reduced) / divisor
    m2 = (weights * jnp.square(centered)).sum(reduced) - count * jnp.square(offset)
    return Stats(count, shift, offset, jnp.maximum(m2, 0))


def _cotangent(x, dy, affine, saved, weights, axis, activation):
    """dz, written to memory once for the three passes over it; finite where the weight is zero."""
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
    return dz if dz is dy else lax.optimization_barrier(dz)


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


def _isolate(depth, *values):
    """Keep CSE from sharing an input of several reductions: barriers of other depths differ."""
    for _ in range(depth):
        values = barrier(values)
    return values[0] if len(values) == 1 else values


def _cast(array, dtype):
    return None if array is None else array.astype(dtype)
