"""The forward and the backward pass of a layer: statistics, a collective, and one pass over x.

On a single device a kernel may do both steps in one launch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core import op, stats
from jbn.core.config import Config
from jbn.kernels.seam import (
    SIGN_PRESERVING,
    Affine,
    BwdApply,
    BwdStats,
    FwdApply,
    Stats,
    StatsGradient,
    broadcastable,
    replace_masked,
)


class Operands(NamedTuple):
    """What derivatives are taken with respect to.

    The vectors and the scalar eps have the accumulator's dtype.  Of tangents and cotangents, None
    stands for those that are known to be zero or that nobody asks for.
    """

    x: Any
    scale: Any
    bias: Any
    residual: Any
    eps: Any


class Point(NamedTuple):
    """What the backward pass keeps: where the derivative is taken.

    Full-size are x in its own dtype, the weights, and at most one more array.
    """

    x: Array
    affine: Affine
    offset: Array  # the mean is affine.shift + offset
    rstd: Array
    count: Array | None  # None where the statistics were given
    weights: Array | None
    saved: Array | None


def forward(
    config: Config, operands: Operands, weights: Array | None, guess: Array
) -> tuple[Array, Stats]:
    """y, and the statistics of the batch over all devices."""
    kernel = _one_kernel("fwd_fused", config, operands.x, weights)
    if kernel is None:
        return _stats_then_apply(config, operands, weights, guess)
    one, two = (functools.partial(f, config) for f in (kernel, _stats_then_apply))
    in_one = lambda operands, weights, guess: one(operands)
    known = {"kernel": in_one, "implementation": config.implementation}
    return op.in_one(two, operands, weights, guess, **known)


def _stats_then_apply(config, operands, weights, guess):
    local = op.fwd_stats(config, operands.x, guess, weights)
    batch = stats.psum_stats(local, config.axis_name, config.axis_index_groups)
    return apply(config, operands, weights, batch, stats.variance(batch)), batch


def apply(config: Config, operands: Operands, weights: Array | None, s: Stats, var: Array) -> Array:
    """y by these statistics."""
    mean = broadcastable(s.shift + s.offset, operands.x.ndim, config.axis)
    x, _ = replace_masked(operands.x, weights, mean)
    return op.fwd_apply(config, FwdApply(x, _affine(operands, s, var)[0], operands.residual))


def point(
    config: Config, operands: Operands, weights: Array | None, s: Stats, var: Array, y: Array
) -> tuple[Array, Point]:
    """(y to go on with, what the backward pass keeps). Statistics without a count were given."""
    affine, rstd = _affine(operands, s, var)
    saved = None
    if config.activation is not None and operands.residual is not None:
        saved = y if config.activation in SIGN_PRESERVING else operands.residual
        if config.activation is jax.nn.relu:
            y = op.output(config, y)
    return y, Point(operands.x, affine, s.offset, rstd, s.count, weights, saved)


def _affine(operands, s, var):
    """(x - mean) * gain + bias about the shift, so that a kernel sees no mean in two numbers."""
    rstd = lax.rsqrt(var + operands.eps)
    gain = operands.scale * rstd
    return Affine(s.shift, gain, operands.bias - s.offset * gain), rstd


def backward(config: Config, point: Point, cotangents: Any, wanted: Any) -> tuple[Operands, Any]:
    """The cotangents of the operands, and of the statistics where they were given.

    Args:
        config: of the layer.
        point: of the forward pass.
        cotangents: (dy, cotangents of the batch's mean and m2, or None where they were given).
        wanted: (Operands, ...) with None for what nobody asks for.
    """
    want_x = wanted[0].x is not None or wanted[0].residual is not None
    residual_dtype = None if wanted[0].residual is None else wanted[0].residual.dtype
    two = functools.partial(_sums_then_dx, config, want_x, residual_dtype)
    kernel = None
    if want_x and cotangents[1] is not None:
        kernel = _one_kernel("bwd_fused", config, point.x, point.weights)
    if kernel is None:
        return two(point, cotangents)
    one = functools.partial(kernel, config, residual_dtype)
    return op.in_one(two, point, cotangents, kernel=one, implementation=config.implementation)


def _sums_then_dx(config, want_x, residual_dtype, point, cotangents):
    """One pass over x and dy for the sums, one for dx if anybody wants it."""
    dy, d_batch = cotangents
    affine, weights = point.affine, point.weights
    mean = broadcastable(affine.shift + point.offset, dy.ndim, config.axis)
    x, replaced = replace_masked(point.x, weights, mean)
    dy = zero_where(replaced, dy)
    arguments = BwdStats(x, dy, affine, point.saved, weights)
    local = op.bwd_stats(config, arguments)
    operands, d_given = _sums_to_cotangents(point, *local)
    stats_gradient = None
    if d_batch is not None:
        total = stats.psum(jnp.stack(local), config.axis_name, config.axis_index_groups)
        psum_cotangent = functools.partial(
            stats.psum_cotangent,
            x=x,
            axis_name=config.axis_name,
            axis_index_groups=config.axis_index_groups,
        )
        d_batch = tuple(map(psum_cotangent, d_batch))
        stats_gradient = _stats_gradient(point, _sums_to_cotangents(point, *total)[1], d_batch)
        d_given = None
    if want_x:
        arguments = BwdApply(x, dy, affine, stats_gradient, point.saved, weights)
        dx, dresidual = op.bwd_apply(config, arguments, residual_dtype)
        operands = operands._replace(x=zero_where(replaced, dx), residual=dresidual)
    return operands, d_given


def _sums_to_cotangents(point, sum_dz, sum_dz_x):
    """From sum dz and sum dz * (x - shift) to the cotangents of all vectors, through y alone."""
    sum_dz_xc = sum_dz_x - point.offset * sum_dz
    gain, rstd = point.affine.gain, point.rstd
    dmean = -gain * sum_dz
    dvar = -gain * jnp.square(rstd) / 2 * sum_dz_xc
    return Operands(None, rstd * sum_dz_xc, sum_dz, None, dvar.sum()), (dmean, dvar)


def _stats_gradient(point, through_y, d_batch):
    """w / n * dmean + w * 2 * xc * dm2, as a line about the shift; dm2 = dvar / n."""
    divisor = stats.divisor(point.count)
    dmean, dm2 = through_y[0] + d_batch[0], through_y[1] / divisor + d_batch[1]
    slope = 2 * dm2
    return StatsGradient(slope, dmean / divisor - slope * point.offset)


def zero_where(replaced: Array | None, array: Array) -> Array:
    """`array`, and zero where an element of x was replaced."""
    return array if replaced is None else jnp.where(replaced, jnp.zeros((), array.dtype), array)


def _one_kernel(name, config, x, weights):
    """The pass in one kernel, a function of (config, ...), if nothing stands between its steps."""
    if weights is not None or config.axis_name is not None:
        return None
    kernel = op.one_kernel(name, config, x)
    if kernel is None:
        return None
    return functools.partial({"fwd_fused": _fwd_fused, "bwd_fused": _bwd_fused}[name], kernel)


def _fwd_fused(kernel, config, operands):
    return kernel(*operands, axis=config.axis, activation=config.activation, dtype=config.dtype)


def _bwd_fused(kernel, config, residual_dtype, point, cotangents):
    dy, (dmean, dm2) = cotangents
    found = kernel(
        point.x,
        dy,
        point.affine,
        offset=point.offset,
        rstd=point.rstd,
        d_stats=(dmean, dm2 * point.count),
        saved=point.saved,
        axis=config.axis,
        activation=config.activation,
        residual_dtype=residual_dtype,
    )
    if found is None:
        return None
    dx, dresidual, *sums = found
    operands, _ = _sums_to_cotangents(point, *sums)
    return operands._replace(x=dx, residual=dresidual), None
