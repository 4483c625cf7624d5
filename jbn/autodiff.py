"""The one derivative rule, for batch statistics and for given ones.

Per channel, with w the weights, n their sum, xc = x - mean, rstd = (var + eps)^(-1/2), gain = scale * rstd,
z = gain * xc + bias + residual and y = activation(z):

    dz    = activation'(z) * dy        dresidual = dz        dbias = sum dz        dscale = rstd * sum dz * xc
    dmean = -gain * sum dz             dvar = -1/2 * gain * rstd^2 * sum dz * xc   deps = sum of dvar over the channels
    dx    = gain * dz

Where the statistics are the batch's own, mean = sum(w x) / n and var = sum(w xc^2) / n, the cotangents of these two outputs
join dmean and dvar, and both flow back (Ioffe & Szegedy 2015, section 3):

    dx   += w / n * (dmean + 2 * dvar * xc)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn import partition, stats
from jbn.kernels.seam import SIGN_PRESERVING, Affine, Pull, accumulator, read, reduced_axes, through_activation, wide
from jbn.linear import linear


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
    """What derivatives are taken with respect to. Vectors and the scalar eps have the accumulator's dtype."""

    x: Array
    scale: Array
    bias: Array
    residual: Array | None
    eps: Array


class BatchStats(NamedTuple):
    """Of each channel over the whole batch; the mean is shift + offset, var is biased."""

    count: Array
    shift: Array
    offset: Array
    var: Array


class _Residuals(NamedTuple):
    """What the backward pass keeps: x in its own dtype, per-channel vectors, the weights, at most one more full-size array."""

    x: Array
    affine: Affine
    rstd: Array
    count: Array | None  # None where the statistics were given
    weights: Array | None
    saved: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_norm(spec: Spec, operands: Operands, weights: Array | None, guess: Array) -> tuple[Array, BatchStats]:
    """y and the batch statistics it was normalized by; `guess` is any value near the mean, known before x is."""
    local = partition.fwd_stats(spec.implementation, operands.x, guess, weights, axis=spec.axis)
    count, shift, offset, m2 = stats.psum_stats(local, spec.axis_name, spec.axis_index_groups)
    batch = BatchStats(count, shift, offset, m2 / _divisor(count))
    return _apply(spec, operands, weights, batch), batch


@batch_norm.defjvp
def _(spec, primals, tangents):
    operands, weights, guess = primals
    y, batch = batch_norm(spec, operands, weights, guess)
    residuals = _residuals(spec, operands, weights, batch, y)
    t_y, (t_mean, t_var) = linear(_tangent, _cotangent, spec, residuals, (tangents[0], None))
    return (y, batch), (t_y, BatchStats(jnp.zeros_like(batch.count), jnp.zeros_like(batch.shift), t_mean, t_var))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(spec: Spec, operands: Operands, mean: Array, var: Array) -> Array:
    """y by given statistics."""
    return _apply(spec, operands, None, _given(mean, var))


@normalize.defjvp
def _(spec, primals, tangents):
    operands, mean, var = primals
    y = normalize(spec, operands, mean, var)
    residuals = _residuals(spec, operands, None, _given(mean, var), y)
    t_y, _ = linear(_tangent, _cotangent, spec, residuals, (tangents[0], tangents[1:]))
    return y, t_y


def _given(mean, var):
    return BatchStats(None, mean, jnp.zeros_like(mean), var)


def _apply(spec, operands, weights, batch):
    x, scale, bias, residual, eps = operands
    x, _ = read(x, weights, wide(batch.shift + batch.offset, x.ndim, spec.axis))
    affine = Affine(batch.shift, batch.offset, scale * lax.rsqrt(batch.var + eps), bias)
    return partition.fwd_apply(
        spec.implementation, x, affine, residual, axis=spec.axis, activation=spec.activation, dtype=spec.dtype
    )


def _residuals(spec, operands, weights, batch, y):
    x, scale, bias, residual, eps = operands
    rstd = lax.rsqrt(batch.var + eps)
    saved = None
    if spec.activation is not None and residual is not None:
        saved = y if spec.activation in SIGN_PRESERVING else residual
    return _Residuals(x, Affine(batch.shift, batch.offset, scale * rstd, bias), rstd, batch.count, weights, saved)


def _tangent(spec, residuals, tangents):
    """Forward mode: from tangents of the operands, and of (mean, var) where given, to that of y, and of (mean, var) otherwise."""
    t, t_given = tangents
    affine, rstd = residuals.affine, residuals.rstd
    acc = accumulator(t.x.dtype)
    ndim, axis = t.x.ndim, spec.axis
    x, unread = read(residuals.x, residuals.weights, wide(affine.shift + affine.offset, ndim, axis))
    x, t_x = x.astype(acc), t.x.astype(acc)
    xc = (x - wide(affine.shift, ndim, axis)) - wide(affine.offset, ndim, axis)
    if t_given is None:
        weighted = t_x if unread is None else jnp.where(unread, 0, t_x) * residuals.weights.astype(acc)
        sums = jnp.stack([weighted.sum(reduced_axes(ndim, axis)), 2 * (weighted * xc).sum(reduced_axes(ndim, axis))])
        t_mean, t_var = stats.psum(sums, spec.axis_name, spec.axis_index_groups) / _divisor(residuals.count)
    else:
        t_mean, t_var = t_given
    t_gain = t.scale * rstd - affine.gain * jnp.square(rstd) / 2 * (t_var + t.eps)
    t_xc = t_x - wide(t_mean, ndim, axis)
    t_xc = t_xc if unread is None else jnp.where(unread, 0, t_xc)
    t_z = wide(affine.gain, ndim, axis) * t_xc + wide(t_gain, ndim, axis) * xc + wide(t.bias, ndim, axis)
    if t.residual is not None:
        t_z = t_z + t.residual.astype(acc)
    saved = None if residuals.saved is None else residuals.saved.astype(acc)
    t_y = through_activation(x, t_z, wide(affine, ndim, axis), saved, spec.activation).astype(spec.dtype)
    return t_y, (t_mean, t_var) if t_given is None else None


def _cotangent(spec, residuals, cotangents, wanted):
    """Reverse mode, the transpose of `_tangent`, by the kernels: one pass for the sums, one for dx if anybody wants it."""
    dy, d_batch = cotangents
    affine, rstd, weights = residuals.affine, residuals.rstd, residuals.weights
    x, unread = read(residuals.x, weights, wide(affine.shift + affine.offset, dy.ndim, spec.axis))
    dy = dy if unread is None else jnp.where(unread, 0, dy)
    common = {"saved": residuals.saved, "weights": weights, "axis": spec.axis, "activation": spec.activation}
    sum_dz, sum_dz_xc = partition.bwd_stats(spec.implementation, x, dy, affine, **common)
    dmean, dvar = _to_given(residuals, sum_dz, sum_dz_xc)
    d_operands = Operands(None, rstd * sum_dz_xc, sum_dz, None, dvar.sum())
    pull = None
    if d_batch is not None:
        total = lambda ct: stats.psum_cotangent(ct, x, spec.axis_name, spec.axis_index_groups)
        sums = stats.psum(jnp.stack([sum_dz, sum_dz_xc]), spec.axis_name, spec.axis_index_groups)
        through_mean, through_var = _to_given(residuals, *sums)
        divisor = _divisor(residuals.count)
        pull = Pull(2 * (through_var + total(d_batch[1])) / divisor, (through_mean + total(d_batch[0])) / divisor)
    if wanted[0].x or wanted[0].residual:
        dx, dresidual = partition.bwd_apply(
            spec.implementation, x, dy, affine, pull=pull, residual_dtype=spec.residual_dtype, **common
        )
        dx = dx if unread is None else jnp.where(unread, 0, dx)
    else:
        dx = jnp.zeros_like(x)
        dresidual = None if spec.residual_dtype is None else jnp.zeros_like(x, spec.residual_dtype)
    return d_operands._replace(x=dx, residual=dresidual), (dmean, dvar) if d_batch is None else None


def _to_given(residuals, sum_dz, sum_dz_xc):
    """Cotangents of mean and var through y."""
    gain = residuals.affine.gain
    return -gain * sum_dz, -gain * jnp.square(residuals.rstd) / 2 * sum_dz_xc


def _divisor(count):
    return jnp.where(count > 0, count, 1)
