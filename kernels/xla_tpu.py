"""The four functions in jax.numpy, placed for XLA:TPU.

XLA:TPU computes the statistics in the epilogue of the convolution that makes x, and normalizes
where y is read, so that batch norm inside a convolutional network costs almost no pass of its own.
Four things keep these fusions: mean and variance take one pass, about a shift that is known before
x is; there are no barriers; the residual is added, and the cotangent masked, in the dtype of the
activations and not in float32.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.kernels import xla
from jbn.kernels.seam import (
    SIGN_PRESERVING,
    Affine,
    Stats,
    StatsGradient,
    accumulator,
    broadcastable,
    input_cotangent,
    is_counted,
    num_values,
    pre_activation,
    reduced_axes,
    through_activation,
)
from jbn.kernels.xla import MAX_SQUARED_MEAN


def fwd_stats(x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...]) -> Stats:
    """Count, mean and m2 of each channel in one pass about `shift`.

    E[d^2] - E[d]^2 of d = x - shift loses (E[d] / std)^2 roundings of float32, so a second pass is
    taken where `shift` is far from the mean.  Even when it is skipped, its lax.cond costs two small
    kernels and keeps x in on-chip memory for longer.  Million estimated cycles of a ResNet-50 step,
    flax's in brackets: v5e 105.3 (105.2; without the second pass 104.9), four of them 106.1
    (106.8); v6e 55.2 (55.1).

    With a lax.while_loop it takes 105.9 on v5e.  If the cond returned the offset and m2 but the
    shift stayed as it is, 104.6, because later passes over x would not wait for the shift; but y
    would lose digits far from it.
    """
    if weights is not None:
        return xla.fwd_stats(x, shift, weights, axis=axis)
    count = num_values(x, axis)
    # Zero replaces a guess that is NaN or huge: with |shift| >= 1e6, shift + total / count would
    # lose precision. This test stays outside the cond, because inside it the compiler adds a pass
    # over x and keeps x on the chip instead of y (105.5 M cycles).
    shift = jnp.where(jnp.abs(shift) < 1e6, shift, 0)
    total, squares = _sums_about(x, shift, axis)

    def about_mean(x):
        mean = shift + total / count
        return mean, *_sums_about(x, mean, axis)

    near = jnp.all(jnp.square(total) * ((1 + 1 / MAX_SQUARED_MEAN) / count) <= squares)
    shift, total, squares = lax.cond(near, lambda x: (shift, total, squares), about_mean, x)
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
        # Adding in float32 costs 8 % of a ResNet-50 step, because the fusion that makes the
        # residual is then not merged with this one.
        narrow = jnp.result_type(x, residual, dtype)
        z = pre_activation(x.astype(acc), vectors).astype(narrow) + residual.astype(narrow)
    return (z if activation is None else activation(z)).astype(dtype)


def bwd_stats(
    x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation
) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - shift)."""
    acc = accumulator(x.dtype)
    reduced = reduced_axes(x.ndim, axis)
    dz = _cotangent(x, dy, affine, saved, weights, axis, activation).astype(acc)
    sum_dz = dz.sum(reduced)
    sum_dz_x = (dz * (x.astype(acc) - broadcastable(affine.shift, x.ndim, axis))).sum(reduced)
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
    dz = _cotangent(x, dy, affine, saved, weights, axis, activation)
    vectors = broadcastable((affine, stats_gradient), x.ndim, axis)
    weights = None if weights is None else weights.astype(acc)
    dx = input_cotangent(x.astype(acc), dz.astype(acc), *vectors, weights)
    return dx.astype(x.dtype), None if residual_dtype is None else dz.astype(residual_dtype)


def _sums_about(x, shift, axis):
    """Sums of x - shift and of its square."""
    centered = x.astype(shift.dtype) - broadcastable(shift, x.ndim, axis)
    reduced = reduced_axes(x.ndim, axis)
    return centered.sum(reduced), jnp.square(centered).sum(reduced)


def _cotangent(x, dy, affine, saved, weights, axis, activation):
    """dz; relu's stays in dy's dtype."""
    acc = accumulator(x.dtype)
    vectors = broadcastable(affine, x.ndim, axis)
    if activation is None:
        dz = dy
    elif activation is jax.nn.relu:
        y = pre_activation(x.astype(acc), vectors) if saved is None else saved
        dz = jnp.where(y > 0, dy, jnp.zeros((), dy.dtype))
    else:
        saved = None if saved is None else saved.astype(acc)
        dz = through_activation(x.astype(acc), dy.astype(acc), vectors, saved, activation)
    return dz if weights is None else jnp.where(~is_counted(weights) & ~jnp.isfinite(dz), 0, dz)
