"""The four functions in jax.numpy, placed for XLA:GPU, where every pass over memory counts and a
launch costs little.

Statistics take one pass, about a shift that is estimated from a sample of x.  Calls with weights
go to `xla`.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.kernels import xla
from jbn.kernels.seam import (
    MASKING,
    SIGN_PRESERVING,
    Affine,
    Stats,
    StatsGradient,
    accumulator,
    barrier,
    broadcastable,
    input_cotangent,
    num_values,
    pre_activation,
    reduced_axes,
    round_shift,
    through_activation,
)

# The shift is the median of three means of 16 rows each. It lies within about std / 4 of the mean
# and costs reading 48 rows.
GROUP_ROWS = 16


def fwd_stats(x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...]) -> Stats:
    """Count, mean and m2 of each channel, in one pass about a sampled mean.

    `shift` takes the place of sampled values that are not finite.
    """
    if weights is not None:
        return xla.fwd_stats(x, shift, weights, axis=axis)
    reduced = reduced_axes(x.ndim, axis)
    count = num_values(x, axis)
    shift = _near_mean(x, shift, axis)
    centered = x.astype(shift.dtype) - broadcastable(shift, x.ndim, axis)
    total, squares = centered.sum(reduced), jnp.square(centered).sum(reduced)
    offset = total / count
    return Stats(
        jnp.full_like(shift, count), shift, offset, jnp.maximum(squares - total * offset, 0)
    )


def fwd_apply(
    x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype
) -> Array:
    """y = activation((x - shift) * gain + bias + residual)."""
    acc = accumulator(x.dtype)
    vectors = broadcastable(affine, x.ndim, axis)
    if residual is None or activation not in (None, *SIGN_PRESERVING):
        z = pre_activation(
            x.astype(acc), vectors, None if residual is None else residual.astype(acc)
        )
    else:
        # A sum in float32 would make XLA keep the residual for the backward pass, from a fusion of
        # its own.
        narrow = jnp.result_type(x, residual, dtype)
        z = pre_activation(x.astype(acc), vectors).astype(narrow) + residual.astype(narrow)
    y = (z if activation is None else activation(z)).astype(dtype)
    if residual is None:
        # A barrier would keep y out of the fusion of a max-pool, a padding or a projection.
        return _stored_narrow(y) if activation in (jax.nn.silu, jax.nn.gelu) else y
    # Without a barrier XLA computes y again in each of its users; relu's is in `output`.
    return y if activation in (None, jax.nn.relu) else lax.optimization_barrier(y)


def output(y: Array) -> Array:
    """The y = relu(z + residual) that the program goes on with, if the backward pass reads y.

    Without a barrier XLA computes y again in each of its users. The backward pass reads the y
    before the barrier, so that one kernel writes y and the packed mask.
    """
    return lax.optimization_barrier(y)


def _stored_narrow(y):
    """y, for XLA to store in its own dtype.

    XLA drops a conversion to bfloat16 and back, and stores what it does not want to compute twice,
    such as silu, in float32 for two users: 0.6 GB more in EfficientNet-B0.  It does not see that
    the select changes nothing, and fuses it with what comes before and after.
    """
    if y.dtype == accumulator(y.dtype):
        return y
    return jnp.where(jnp.isnan(y), jnp.nan, y)


def bwd_stats(
    x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation
) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - shift)."""
    if weights is not None:
        return xla.bwd_stats(
            x, dy, affine, saved=saved, weights=weights, axis=axis, activation=activation
        )
    acc = accumulator(x.dtype)
    reduced = reduced_axes(x.ndim, axis)
    dz = [
        _cotangent(x, dy, _own(depth, affine), saved, axis, activation).astype(acc)
        for depth in (1, 2)
    ]
    centered = x.astype(acc) - broadcastable(affine.shift, x.ndim, axis)
    if activation in MASKING and saved is None:
        # This changes nothing: dz is zero where x is NaN. But if the first sum needed x for its
        # mask alone, XLA would write the mask in the forward pass, a byte for each element.
        dz[0] = jnp.where(jnp.isnan(centered), 0, dz[0])
    return dz[0].sum(reduced), (dz[1] * centered).sum(reduced)


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
    """(dx, dz): dx = gain * dz + intercept + slope * (x - shift).

    dz is the residual's cotangent, in residual_dtype; None where that is None.
    """
    if weights is not None:
        known = {"saved": saved, "weights": weights, "axis": axis, "activation": activation}
        return xla.bwd_apply(
            x, dy, affine, stats_gradient=stats_gradient, residual_dtype=residual_dtype, **known
        )
    acc = accumulator(x.dtype)
    dz = _cotangent(x, dy, _own(3, affine), saved, axis, activation)
    vectors = broadcastable((affine, stats_gradient), x.ndim, axis)
    dx = input_cotangent(x.astype(acc), dz.astype(acc), *vectors)
    return dx.astype(x.dtype), None if residual_dtype is None else dz.astype(residual_dtype)


def _near_mean(x, guess, axis):
    """A value of each channel near its mean: the median of the means of three groups of rows,
    spread over x.

    One far-off value, wherever it lies, moves one of the three; what is not finite is read as the
    guess, or zero.
    """
    guess = jnp.where(jnp.isfinite(guess), guess, 0)
    reduced = reduced_axes(x.ndim, axis)
    rows = _sample(x, reduced).astype(guess.dtype)
    rows = jnp.where(jnp.isfinite(rows), rows, guess[None])
    if len(rows) < 3:
        return round_shift(rows.mean(0))
    first, second, third = rows[: len(rows) // 3 * 3].reshape(-1, 3, *guess.shape).mean(0)
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    return round_shift(jnp.maximum(low, jnp.minimum(high, third)))


def _sample(x, reduced):
    """About 3 * GROUP_ROWS rows [rows, *features], evenly spread over the reduced axes."""
    long = sum(x.shape[a] > 1 for a in reduced)
    most = math.ceil((3 * GROUP_ROWS) ** (1 / max(long, 1)))
    begin, stride = [0] * x.ndim, [1] * x.ndim
    for a in reduced:
        stride[a] = math.ceil(x.shape[a] / most)
        begin[a] = (x.shape[a] - 1) % stride[a] // 2
    rows = jnp.moveaxis(lax.slice(x, begin, x.shape, stride), reduced, range(len(reduced)))
    return rows.reshape(-1, *rows.shape[len(reduced) :])


def _cotangent(x, dy, affine, saved, axis, activation):
    """dz.

    With relu and a saved y it is computed once, in dy's dtype, and also serves as the residual's
    cotangent.  Otherwise every pass computes it again.
    """
    if activation is jax.nn.relu and saved is not None:
        mask = saved > 0
        if x.shape[-1] % 8 == 0:
            # XLA writes the packed mask beside y and keeps it: an eighth of the bytes of the mask.
            mask = _unpack(_pack(mask))
        return jnp.where(mask, dy, jnp.zeros((), dy.dtype))
    acc = accumulator(x.dtype)
    saved = None if saved is None else saved.astype(acc)
    # In float32, because XLA would share the zeros of a bfloat16 select with those of a max-pool,
    # as a full-size array.
    return through_activation(
        x.astype(acc), dy.astype(acc), broadcastable(affine, x.ndim, axis), saved, activation
    )


def _pack(mask):
    """A bool array as bytes of eight neighbors along the last axis, the first the lowest bit."""
    eights = mask.reshape(*mask.shape[:-1], -1, 8).astype(jnp.uint8)
    return (eights << _bits(eights.ndim)).sum(-1, dtype=jnp.uint8)


def _unpack(packed):
    """The bool array that `_pack` was given."""
    bits = (packed[..., None] >> _bits(packed.ndim + 1)) & 1
    return bits.astype(bool).reshape(*packed.shape[:-1], -1)


def _bits(ndim):
    """0 to 7 along the last of ndim axes."""
    return lax.broadcasted_iota(jnp.uint8, (1,) * (ndim - 1) + (8,), ndim - 1)


def _own(depth, affine):
    """Each pass's own copy of the vectors, behind barriers of another depth.

    With one copy, CSE would compute the relu mask once and store it as a full-size array.
    """
    for _ in range(depth):
        affine = barrier(affine)
    return affine
