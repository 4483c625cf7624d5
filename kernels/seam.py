"""The contract: what every implementation takes and returns, and the formulas that they share.

An implementation is a module of jbn.kernels with these four functions (backends.py lists those that
are written in Pallas):

    fwd_stats(x, shift, weights, *, axis) -> Stats
    fwd_apply(x, affine, residual, *, axis, activation, dtype) -> y
    bwd_stats(x, dy, affine, saved, weights, *, axis, activation) -> (sum dz, sum dz * (x - shift))
    bwd_apply(x, dy, affine, stats_gradient, saved, weights, *, axis, activation, residual_dtype)
        -> (dx, dresidual)

They are called by keyword; the classes `FwdStats` to `BwdApply` below name their arguments.  x has
any rank.  `axis` is the ascending tuple of its feature axes, everything else is reduced.  A
per-channel vector has the shape of the feature axes and the dtype of `accumulator(x)`.  z is the
value before the activation, and dz its cotangent.  `saved` is y where the activation is in
SIGN_PRESERVING, the residual for other activations, and None where no residual was added.

A Pallas backend (triton, mosaic_gpu, mosaic_tpu) also has:

    interpret=            a keyword of each function: run by Pallas's interpreter, on any platform.
    unsupported(shape, dtype, axis) -> str | None
                          why it cannot take such an x, as the end of a sentence; None if it can.
    unsupported_device(kind) -> str | None
                          why it cannot run on a device, by its `device_kind`.

It takes no weights: weighted statistics run on XLA.  It writes the activations in FUSED and their
derivatives by hand where its compiler does not know jax.custom_jvp (Mosaic GPU).

A backend that can keep x on chip between the two steps of a pass has two more functions.  `device`
says where they will run.  They return None if x does not fit:

    fwd_fused(x, scale, bias, residual, eps, *, axis, activation, dtype, device) -> (y, Stats)
    bwd_fused(x, dy, affine, *, offset, rstd, d_stats, saved, axis, activation, residual_dtype,
              device) -> (dx, dresidual, sum dz, sum dz * (x - shift))

d_stats holds the cotangents of the mean and the biased variance of the batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Their derivative is the same at y = activation(z) as at z. So y, which the next layer keeps
# anyway, can stand in for z in the backward pass.
SIGN_PRESERVING = (jax.nn.relu, jax.nn.leaky_relu)
FUSED = (*SIGN_PRESERVING, jax.nn.relu6, jax.nn.silu, jax.nn.gelu)
# Their derivative is 0, 1 or, at a kink, 1/2: no digit of dy is lost in dy's own dtype.
MASKING = (jax.nn.relu, jax.nn.relu6)


class Device(NamedTuple):
    """What a kernel needs to know of the device it will run on."""

    kind: str  # as JAX names it: "NVIDIA H200", "TPU v5 lite"
    cores: int  # streaming multiprocessors of a GPU


class Options(NamedTuple):
    """The static arguments of the four functions; each of them takes some."""

    axis: tuple[int, ...]  # feature axes, ascending
    x_dtype: Any
    activation: Callable | None
    dtype: Any  # of y
    residual_dtype: Any  # of dresidual; None if there is none


class Stats(NamedTuple):
    """Statistics of each channel; the mean is shift + offset.

    One float32 cannot hold a mean of 1e4 better than 5e-4, which would be an error of y; two can.
    """

    count: Any  # sum of the weights, or the number of elements
    shift: Array  # a value near the data: |offset| is small beside the standard deviation
    offset: Array
    m2: Any  # sum of weight * (x - mean)^2


class Affine(NamedTuple):
    """z = (x - shift) * gain + bias, one value of each per channel."""

    shift: Array
    gain: Array  # scale * rstd
    bias: Array


class StatsGradient(NamedTuple):
    """The part of dx that flows through the mean and the variance of the batch. It is linear in x:

    dx += weights * (intercept + slope * (x - shift))
    """

    slope: Array
    intercept: Array


# The four functions as data: the fields are the array arguments, and below them stands what one
# must know to split, batch and type a call.  `like_x` are the arguments that have the shape of x or
# broadcast to it; all others hold per-channel vectors.  `reduces` is the number of results that are
# per-channel sums.  Where it is 0 the results are like x: `results` names their dtypes in Options,
# and one whose dtype is None does not exist.


class FwdStats(NamedTuple):
    """The arguments of `fwd_stats`, whose results are those of `Stats`."""

    x: Array
    shift: Array
    weights: Array | None

    name = "fwd_stats"
    like_x = ("x", "weights")
    options = ("axis",)
    reduces = len(Stats._fields)
    results = ()


class FwdApply(NamedTuple):
    """The arguments of `fwd_apply`."""

    x: Array
    affine: Affine
    residual: Array | None

    name = "fwd_apply"
    like_x = ("x", "residual")
    options = ("axis", "activation", "dtype")
    reduces = 0
    results = ("dtype",)


class BwdStats(NamedTuple):
    """The arguments of `bwd_stats`."""

    x: Array
    dy: Array
    affine: Affine
    saved: Array | None
    weights: Array | None

    name = "bwd_stats"
    like_x = ("x", "dy", "saved", "weights")
    options = ("axis", "activation")
    reduces = 2
    results = ()


class BwdApply(NamedTuple):
    """The arguments of `bwd_apply`."""

    x: Array
    dy: Array
    affine: Affine
    stats_gradient: StatsGradient | None  # None where the statistics were given
    saved: Array | None
    weights: Array | None

    name = "bwd_apply"
    like_x = ("x", "dy", "saved", "weights")
    options = ("axis", "activation", "residual_dtype")
    reduces = 0
    results = ("x_dtype", "residual_dtype")


def reduced_axes(ndim, axis) -> tuple[int, ...]:
    """All axes but the feature axes."""
    return tuple(a for a in range(ndim) if a not in axis)


def num_values(x, axis):
    """How many values of x each channel has, as a float: an int32 ends at 2^31.

    A dimension that jax.export knows by a symbol only makes it a traced scalar.
    """
    number = math.prod(x.shape[a] for a in reduced_axes(x.ndim, axis))
    if isinstance(number, int):
        return float(number)
    return jnp.asarray(number).astype(accumulator(x.dtype))


def broadcastable(vectors, ndim, axis):
    """Per-channel vectors (a pytree) with axes of size 1, to broadcast against rank ndim."""
    return jax.tree.map(lambda v: jnp.expand_dims(v, reduced_axes(ndim, axis)), vectors)


def round_shift(shift):
    """`shift` with three fewer mantissa bits, so that every use sees exactly the same value.

    XLA turns a division into a product and may contract that with the subtraction x - shift.  Such
    a use would see more digits of the mean than the sums about it are corrected for (measured on
    CPU: y off by 4e-4 at mean 1e4, std 1).
    """
    precision = jnp.finfo(shift.dtype)
    return lax.reduce_precision(shift, precision.nexp, precision.nmant - 3)


def barrier(tree):
    """An optimization barrier for each array of a pytree.

    One barrier for all would not do: JAX 0.12 cannot transpose one over constants and tangents.
    """
    return jax.tree.map(lax.optimization_barrier, tree)


def accumulator(dtype) -> jnp.dtype:
    """The dtype of statistics: float64 for float64, float32 for everything narrower."""
    return np.promote_types(dtype, np.float32)  # JAX's own obeys strict promotion


def pre_activation(x, affine: Affine, residual=None):
    """z of x in the accumulator's dtype; x and the vectors are already broadcastable."""
    z = (x - affine.shift) * affine.gain + affine.bias
    return z if residual is None else z + residual


def input_cotangent(x, dz, affine: Affine, stats_gradient: StatsGradient | None, weights=None):
    """dx in the accumulator's dtype; x and the vectors are already broadcastable.

    x - shift comes first: it is exact where x is near the mean.
    """
    dx = affine.gain * dz
    if stats_gradient is None:
        return dx
    through = (x - affine.shift) * stats_gradient.slope + stats_gradient.intercept
    return dx + (through if weights is None else through * weights)


def through_activation(x, dy, affine: Affine, saved, activation):
    """dz = activation'(z) * dy, with z from the very expression of the forward pass.

    A tangent goes through the activation in the same way.
    """
    if activation is None:
        return dy
    if activation in SIGN_PRESERVING and saved is not None:
        point = saved
    else:
        point = pre_activation(x, affine, saved)
    return jax.jvp(activation, (point,), (dy,))[1]


def is_counted(weights):
    """A bool array: True where the weight is positive."""
    return weights if weights.dtype == jnp.bool_ else weights > 0


def replace_masked(x, weights, mean):
    """Replace the elements that are masked out *and* not finite by the mean.

    Returns the new x, and a mask of the replaced elements (None without weights).
    """
    if weights is None:
        return x, None
    replaced = ~is_counted(weights) & ~jnp.isfinite(x)
    return jnp.where(replaced, mean.astype(x.dtype), x), replaced
