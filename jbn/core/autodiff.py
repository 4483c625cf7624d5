"""The one derivative rule, for batch statistics and for given ones.

Per channel, with w the weights, n their sum, xc = x - mean, rstd = (var + eps)^(-1/2), gain = scale
* rstd, z = gain * xc + bias + residual and y = activation(z):

    dz    = activation'(z) * dy        dresidual = dz        dbias = sum dz        dscale = rstd * sum dz * xc
    dmean = -gain * sum dz             dvar = -1/2 * gain * rstd^2 * sum dz * xc   deps = sum of dvar over the channels
    dx    = gain * dz

Where the statistics are the batch's own, mean = sum(w x) / n and var = sum(w xc^2) / n, the
cotangents of these two outputs join dmean and dvar, and both flow back (Ioffe & Szegedy 2015,
section 3):

    dx   += w / n * (dmean + 2 * dvar * xc)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jbn.core import dispatch, partition, stats
from jbn.core.linear import linear
from jbn.kernels.seam import (
    SIGN_PRESERVING,
    Affine,
    StatsGradient,
    broadcastable,
    reduced_axes,
    replace_masked,
    through_activation,
)


class Spec(NamedTuple):
    """What is known before tracing."""

    axis: tuple[int, ...]  # feature axes, ascending
    activation: Callable | None
    dtype: Any  # of y
    implementation: str | None
    residual_dtype: Any = None
    axis_name: Any = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None


class Operands(NamedTuple):
    """What derivatives are taken with respect to; vectors and the scalar eps in the accumulator's
    dtype.

    Of tangents and cotangents, None stands for those known to be zero or not asked for.
    """

    x: Any
    scale: Any
    bias: Any
    residual: Any
    eps: Any


class BatchStats(NamedTuple):
    """Of each channel over the whole batch; the mean is shift + offset, var is biased."""

    count: Any  # None where the statistics were given
    shift: Array
    offset: Array
    var: Array


class _Residuals(NamedTuple):
    """What the backward pass keeps: x in its own dtype, per-channel vectors, the weights, at most one more full-size array."""

    x: Array
    affine: Affine
    offset: Array  # the mean is affine.shift + offset
    rstd: Array
    count: Array | None  # None where the statistics were given
    weights: Array | None
    saved: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_norm(
    spec: Spec, operands: Operands, weights: Array | None, guess: Array
) -> tuple[Array, BatchStats]:
    """y and the batch statistics it was normalized by; `guess` is any value near the mean, known before x is."""
    args = operands, weights, guess
    apart = functools.partial(_stats_then_apply, spec)
    kernel = _fused("fwd_fused", spec, operands.x, weights)
    if kernel is None:
        return apart(*args)
    return dispatch.on_one_device(
        spec.implementation, functools.partial(_fused_forward, spec, kernel), apart, *args
    )


def _fused(name, spec, x, weights):
    """The kernel for both passes, where nothing stands between them."""
    if weights is not None or spec.axis_name is not None:
        return None
    return dispatch.fused(name, spec.implementation, x, spec.axis)


def _fused_forward(spec, kernel, operands, weights, guess):
    found = kernel(*operands, axis=spec.axis, activation=spec.activation, dtype=spec.dtype)
    if found is None:
        return None
    y, (count, shift, offset, m2) = found
    return y, BatchStats(count, shift, offset, m2 / _divisor(count))


def _stats_then_apply(spec, operands, weights, guess):
    local = partition.fwd_stats(spec.implementation, operands.x, guess, weights, axis=spec.axis)
    count, shift, offset, m2 = stats.psum_stats(local, spec.axis_name, spec.axis_index_groups)
    batch = BatchStats(count, shift, offset, m2 / _divisor(count))
    return _apply(spec, operands, weights, batch), batch


@functools.partial(batch_norm.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    operands, weights, guess = primals
    y, batch = batch_norm(spec, operands, weights, guess)
    residuals = _residuals(spec, operands, weights, batch, y)
    t_y, t_stats = linear(_tangent, _cotangent, spec, residuals, (_present(tangents[0]), None))
    t_mean, t_var = (
        stats.unmapped(t, residuals.x, spec.axis_name, spec.axis_index_groups) for t in t_stats
    )
    return (y, batch), (
        t_y,
        BatchStats(jnp.zeros_like(batch.count), jnp.zeros_like(batch.shift), t_mean, t_var),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(spec: Spec, operands: Operands, mean: Array, var: Array) -> Array:
    """y by given statistics."""
    return _apply(spec, operands, None, _given(mean, var))


@functools.partial(normalize.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    operands, mean, var = primals
    y = normalize(spec, operands, mean, var)
    residuals = _residuals(spec, operands, None, _given(mean, var), y)
    t_y, _ = linear(
        _tangent, _cotangent, spec, residuals, (_present(tangents[0]), _present(tangents[1:]))
    )
    return y, t_y


def _present(tangents):
    """None for the tangents known to be zero, so that no array of zeros is ever made, saved or passed over."""
    is_zero = lambda t: isinstance(t, SymbolicZero)
    return jax.tree.map(lambda t: None if is_zero(t) else t, tangents, is_leaf=is_zero)


def _given(mean, var):
    return BatchStats(None, mean, jnp.zeros_like(mean), var)


def _apply(spec, operands, weights, batch):
    x, scale, bias, residual, eps = operands
    x, _ = replace_masked(x, weights, broadcastable(batch.shift + batch.offset, x.ndim, spec.axis))
    affine = _affine(batch, scale * lax.rsqrt(batch.var + eps), bias)
    return partition.fwd_apply(
        spec.implementation,
        x,
        affine,
        residual,
        axis=spec.axis,
        activation=spec.activation,
        dtype=spec.dtype,
    )


def _residuals(spec, operands, weights, batch, y):
    x, scale, bias, residual, eps = operands
    rstd = lax.rsqrt(batch.var + eps)
    saved = None
    if spec.activation is not None and residual is not None:
        saved = y if spec.activation in SIGN_PRESERVING else residual
    return _Residuals(
        x, _affine(batch, scale * rstd, bias), batch.offset, rstd, batch.count, weights, saved
    )


def _affine(batch, gain, bias):
    """(x - mean) * gain + bias; all that is said to a kernel of a mean in two numbers."""
    return Affine(batch.shift, gain, bias - batch.offset * gain)


def _tangent(spec, residuals, tangents):
    """Forward mode: from tangents of the operands (and statistics, if given) to those of y (and statistics, if not)."""
    t, t_given = tangents
    affine, offset, rstd, weights = (
        residuals.affine,
        residuals.offset,
        residuals.rstd,
        residuals.weights,
    )
    ndim, axis = residuals.x.ndim, spec.axis
    vectors = functools.partial(broadcastable, ndim=ndim, axis=axis)
    x, replaced = replace_masked(residuals.x, weights, vectors(affine.shift + offset))
    x = x.astype(rstd.dtype)
    xc = (x - vectors(affine.shift)) - vectors(offset)
    t_x = jnp.zeros_like(x) if t.x is None else _zero_where(replaced, t.x.astype(x.dtype))
    if residuals.count is not None:
        weighted = t_x if weights is None else t_x * weights.astype(x.dtype)
        sums = jnp.stack([v.sum(reduced_axes(ndim, axis)) for v in (weighted, 2 * weighted * xc)])
        t_mean, t_var = (
            stats.psum(sums, spec.axis_name, spec.axis_index_groups)
            / _divisor(residuals.count)[None]
        )
    else:
        t_mean, t_var = (jnp.zeros_like(rstd) if v is None else v for v in t_given)
    t_gain = -affine.gain * jnp.square(rstd) / 2 * (t_var if t.eps is None else t_var + t.eps)
    t_gain = t_gain if t.scale is None else t_gain + t.scale * rstd
    t_z = (
        vectors(affine.gain) * (t_x - _zero_where(replaced, vectors(t_mean))) + vectors(t_gain) * xc
    )
    t_z = t_z if t.bias is None else t_z + vectors(t.bias)
    t_z = t_z if t.residual is None else t_z + t.residual.astype(x.dtype)
    t_z = _zero_where(replaced, t_z)  # as in reverse mode: what is not read influences no gradient
    saved = None if residuals.saved is None else residuals.saved.astype(x.dtype)
    t_y = through_activation(x, t_z, vectors(affine), saved, spec.activation).astype(spec.dtype)
    return t_y, None if residuals.count is None else (t_mean, t_var)


def _cotangent(spec, residuals, cotangents, wanted):
    """Reverse mode, the transpose of `_tangent`, by the kernels."""
    args = residuals, cotangents
    want_x = wanted[0].x or wanted[0].residual
    apart = functools.partial(_sums_then_apply, spec, want_x)
    of_batch = cotangents[1] is not None
    kernel = (
        _fused("bwd_fused", spec, residuals.x, residuals.weights) if want_x and of_batch else None
    )
    if kernel is None:
        return apart(*args)
    return dispatch.on_one_device(
        spec.implementation, functools.partial(_fused_backward, spec, kernel), apart, *args
    )


def _fused_backward(spec, kernel, residuals, cotangents):
    x, affine, offset, rstd, _, _, saved = residuals
    static = {
        "axis": spec.axis,
        "activation": spec.activation,
        "residual_dtype": spec.residual_dtype,
    }
    found = kernel(
        x,
        cotangents[0],
        affine,
        offset=offset,
        rstd=rstd,
        d_stats=cotangents[1],
        saved=saved,
        **static,
    )
    if found is None:
        return None
    dx, dresidual, *sums = found
    dscale, dbias, _, dvar = _vector_cotangents(residuals, *sums)
    return Operands(dx, dscale, dbias, dresidual, dvar.sum()), None


def _sums_then_apply(spec, want_x, residuals, cotangents):
    """One pass for the sums, one for dx if anybody wants it."""
    dy, d_batch = cotangents
    affine, offset, weights = residuals.affine, residuals.offset, residuals.weights
    x, replaced = replace_masked(
        residuals.x, weights, broadcastable(affine.shift + offset, dy.ndim, spec.axis)
    )
    dy = _zero_where(replaced, dy)
    common = {
        "saved": residuals.saved,
        "weights": weights,
        "axis": spec.axis,
        "activation": spec.activation,
    }
    sums = partition.bwd_stats(spec.implementation, x, dy, affine, **common)
    dscale, dbias, dmean, dvar = _vector_cotangents(residuals, *sums)
    stats_gradient, d_given = None, (dmean, dvar)
    if d_batch is not None:
        total = lambda ct: stats.psum_cotangent(ct, x, spec.axis_name, spec.axis_index_groups)
        sums = stats.psum(jnp.stack(sums), spec.axis_name, spec.axis_index_groups)
        _, _, through_mean, through_var = _vector_cotangents(residuals, *sums)
        divisor = _divisor(residuals.count)
        slope = 2 * (through_var + total(d_batch[1])) / divisor
        stats_gradient = StatsGradient(
            slope, (through_mean + total(d_batch[0])) / divisor - slope * offset
        )
        d_given = None
    dx = dresidual = None
    if want_x:
        dx, dresidual = partition.bwd_apply(
            spec.implementation,
            x,
            dy,
            affine,
            stats_gradient=stats_gradient,
            residual_dtype=spec.residual_dtype,
            **common,
        )
        dx = _zero_where(replaced, dx)
    return Operands(dx, dscale, dbias, dresidual, dvar.sum()), d_given


def _zero_where(replaced, array):
    return array if replaced is None else jnp.where(replaced, 0, array)


def _vector_cotangents(residuals, sum_dz, sum_dz_x):
    """dscale, dbias, and dmean and dvar through y."""
    gain, rstd = residuals.affine.gain, residuals.rstd
    sum_dz_xc = sum_dz_x - residuals.offset * sum_dz
    return rstd * sum_dz_xc, sum_dz, -gain * sum_dz, -gain * jnp.square(rstd) / 2 * sum_dz_xc


def _divisor(count):
    return jnp.where(count > 0, count, 1)
