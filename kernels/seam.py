"""What every implementation takes and returns, and the elementwise formulas they share.

An implementation is a module with four functions of the same names and signatures:

    fwd_stats(x, shift, weights, *, axis) -> Stats
    fwd_apply(x, affine, residual, *, axis, activation, dtype) -> y
    bwd_stats(x, dy, affine, *, saved, weights, axis, activation) -> (sum dz, sum dz * (x - shift))
    bwd_apply(x, dy, affine, *, stats_gradient, saved, weights, axis, activation, residual_dtype) ->
    (dx, dresidual)

One that keeps x on chip between the two passes over it has two more, and `device` says where it
will run. They return None where x does not fit:

    fwd_fused(x, scale, bias, residual, eps, *, axis, activation, dtype, device) -> (y, Stats)
    bwd_fused(x, dy, affine, *, offset, rstd, d_stats, saved, axis, activation, residual_dtype,
    device)
        -> (dx, dresidual, sum dz, sum dz * (x - shift)); d_stats: the cotangents of the batch's
        mean and biased variance

x has any rank; `axis` is the ascending tuple of its feature axes, everything else is reduced.  A
per-channel vector has the
shape of the feature axes and the dtype of `accumulator(x)`.  z is the value before the activation
and dz its cotangent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Their derivative is the same at y = activation(z) as at z, so y (which the next layer keeps
# anyway) stands in for z.
SIGN_PRESERVING = (jax.nn.relu, jax.nn.leaky_relu)
FUSED = (*SIGN_PRESERVING, jax.nn.silu, jax.nn.gelu)


class Device(NamedTuple):
    """What a kernel needs to know of the device it will run on."""

    kind: str  # as JAX names it: "NVIDIA H200", "TPU v5 lite"
    cores: int  # streaming multiprocessors of a GPU


class Stats(NamedTuple):
    """Statistics of each channel; the mean is shift + offset.

    One float32 cannot hold a mean of 1e4 better than 5e-4, which would be an error of y; two can.
    """

    count: Array  # sum of the weights, or the number of elements
    shift: Array  # a value near the data: |offset| is small beside the standard deviation
    offset: Array
    m2: Array  # sum of weight * (x - mean)^2


class Affine(NamedTuple):
    """z = (x - shift) * gain + bias, one value of each per channel; gain = scale * rstd."""

    shift: Array
    gain: Array
    bias: Array


class StatsGradient(NamedTuple):
    """What the statistics send back to x: dx += weights * (intercept + slope * (x - shift))."""

    slope: Array
    intercept: Array


def reduced_axes(ndim, axis) -> tuple[int, ...]:
    """All axes but the feature axes."""
    return tuple(a for a in range(ndim) if a not in axis)


def broadcastable(vectors, ndim, axis):
    """Per-channel vectors (a pytree of them) made broadcastable against an array of rank ndim."""
    return jax.tree.map(lambda v: jnp.expand_dims(v, reduced_axes(ndim, axis)), vectors)


def round_shift(shift):
    """The shift without its last three bits: a number that every use reads alike.

    XLA makes a division a product and may contract that with the subtraction x - shift: this one
    use would then see more digits of the mean than the sums about it are corrected for (measured on
    CPU: y off by 4e-4 at mean 1e4, std 1).
    """
    precision = jnp.finfo(shift.dtype)
    return lax.reduce_precision(shift, precision.nexp, precision.nmant - 3)


def barrier(tree):
    """An optimization barrier for each array apart: JAX 0.12 cannot transpose one over both constants and tangents."""
    return jax.tree.map(lax.optimization_barrier, tree)


def accumulator(dtype) -> jnp.dtype:
    """The dtype of statistics: float64 for float64, float32 for everything narrower."""
    return np.promote_types(dtype, np.float32)  # JAX's own obeys strict promotion


def pre_activation(x, affine: Affine, residual=None):
    """z of x in the accumulator dtype; x and the vectors are already broadcastable."""
    z = (x - affine.shift) * affine.gain + affine.bias
    return z if residual is None else z + residual


def through_activation(x, dy, affine: Affine, saved, activation):
    """dz = activation'(z) * dy, with z from the very expression of the forward pass; a tangent goes
    through the same way.

    saved: y where the activation preserves signs, the residual otherwise, None where no residual
        was added.
    """
    if activation is None:
        return dy
    if activation in SIGN_PRESERVING and saved is not None:
        point = saved
    else:
        point = pre_activation(x, affine, saved)
    return jax.jvp(activation, (point,), (dy,))[1]


def is_counted(weights):
    """Where a weight is positive: a mask already is that."""
    return weights if weights.dtype == jnp.bool_ else weights > 0


def replace_masked(x, weights, mean):
    """(x as the formulas read it, where it was replaced): a zero-weight element that is not finite is read as the mean."""
    if weights is None:
        return x, None
    replaced = ~is_counted(weights) & ~jnp.isfinite(x)
    return jnp.where(replaced, mean.astype(x.dtype), x), replaced
