"""The one derivative rule, for the statistics of the batch and for given ones.

Per channel, with w the weights, n their sum, xc = x - mean, rstd = (var + eps)^(-1/2) and
gain = scale * rstd, the layer computes

    mean = sum(w x) / n        m2 = sum(w xc^2)        var = m2 / n
    z = gain * xc + bias + residual                    y = activation(z)

Forward mode.  Let t_ mark tangents.  sum(w xc) is zero, so t_mean drops out of t_m2:

    (a)  t_mean = sum(w t_x) / n        t_m2 = sum(2 w xc t_x)        t_var = t_m2 / n
    (b)  t_gain = t_scale * rstd - gain * rstd^2 / 2 * (t_var + t_eps)
    (c)  t_z = gain * (t_x - t_mean) + t_gain * xc + t_bias + t_residual
    (d)  t_y = activation'(z) * t_z

Reverse mode is the transpose.  From (d) and (c), with dz = activation'(z) * dy:

    (e)  dresidual = dz        dbias = sum dz        dx = gain * dz
    (f)  dmean = -gain * sum dz        dgain = sum dz * xc

from (b):

    (g)  dscale = rstd * dgain        dvar = -gain * rstd^2 / 2 * dgain        deps = sum of dvar

and from (a), where the statistics are the batch's own.  They are also outputs of the layer, whose
cotangents join here (Ioffe & Szegedy 2015, section 3):

    (h)  dm2 = dvar / n + d(output m2)        dmean += d(output mean)
         dx += w * (dmean / n + 2 * xc * dm2)

The forward mode stands in `_tangent` below, in jax.numpy.  The reverse mode is `passes.backward`,
which runs in two passes over x: one for the two sums, one for dx.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jbn.core import op, passes, stats
from jbn.core.config import Config
from jbn.core.linear import linear
from jbn.core.passes import Operands, zero_where
from jbn.core.sharding import is_automatic, named_axes, zeros_like
from jbn.kernels.seam import (
    Stats,
    broadcastable,
    is_counted,
    reduced_axes,
    replace_masked,
    through_activation,
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_norm(
    config: Config, operands: Operands, weights: Array | None, guess: Array
) -> tuple[Array, Stats]:
    """y and the statistics of the batch.

    `guess` is an estimate of the mean that does not depend on x, such as the running mean.  It
    affects rounding only.
    """
    return passes.forward(config, operands, weights, guess)


@functools.partial(batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(config, primals, tangents):
    operands, weights, guess = primals
    with named_axes(config.axis_sizes):
        y, batch = batch_norm(config, operands, weights, guess)
        y, point = passes.point(config, operands, weights, batch, stats.variance(batch), y)
        mean = batch.shift + batch.offset
        t_y, t_stats = _linear(config, point, (_present(tangents[0]), None), (y, (mean, batch.m2)))
        t_mean, t_m2 = (
            stats.unmapped(t, point.x, config.axis_name, config.axis_index_groups) for t in t_stats
        )
    return (y, batch), (t_y, Stats(zeros_like(batch.count), zeros_like(batch.shift), t_mean, t_m2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(config: Config, operands: Operands, mean: Array, var: Array) -> Array:
    """y by given statistics."""
    return passes.apply(config, operands, None, _given(mean), var)


@functools.partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(config, primals, tangents):
    operands, mean, var = primals
    y = normalize(config, operands, mean, var)
    y, point = passes.point(config, operands, None, _given(mean), var, y)
    t_y, _ = _linear(config, point, (_present(tangents[0]), _present(tangents[1:])), (y, None))
    return y, t_y


def _linear(config, point, tangents, like):
    contains = op.needs_devices() if is_automatic(point.x) else None
    return linear(_tangent, passes.backward, config, point, tangents, like, contains)


def _present(tangents):
    """None for the tangents known to be zero, so that no array of zeros is made or saved."""
    is_zero = lambda t: isinstance(t, SymbolicZero)
    return jax.tree.map(lambda t: None if is_zero(t) else t, tangents, is_leaf=is_zero)


def _given(mean):
    return Stats(None, mean, zeros_like(mean), None)


def _tangent(config, point, tangents):
    """From the tangents of the operands (and of statistics that were given) to those of y (and of
    the statistics of the batch)."""
    t, t_given = tangents
    affine, rstd, weights = point.affine, point.rstd, point.weights
    vectors = functools.partial(broadcastable, ndim=point.x.ndim, axis=config.axis)
    x, replaced = replace_masked(point.x, weights, vectors(affine.shift + point.offset))
    x = x.astype(rstd.dtype)
    xc = (x - vectors(affine.shift)) - vectors(point.offset)
    t_x = zeros_like(x) if t.x is None else zero_where(replaced, t.x.astype(x.dtype))
    t_stats = None
    if point.count is not None:
        # (a) The two sums travel in one collective.
        weighted = t_x
        if weights is not None:  # where nothing is counted, t_x may be anything
            weighted = jnp.where(is_counted(weights), t_x * weights.astype(x.dtype), 0)
        reduced = reduced_axes(x.ndim, config.axis)
        sums = jnp.stack([weighted.sum(reduced), (2 * weighted * xc).sum(reduced)])
        sum_t_x, t_m2 = stats.psum(sums, config.axis_name, config.axis_index_groups)
        divisor = stats.divisor(point.count)
        t_mean, t_var = sum_t_x / divisor, t_m2 / divisor
        t_stats = t_mean, t_m2
    else:
        t_mean, t_var = (zeros_like(rstd) if v is None else v for v in t_given)
    # (b)
    t_gain = -affine.gain * jnp.square(rstd) / 2 * (t_var if t.eps is None else t_var + t.eps)
    t_gain = t_gain if t.scale is None else t_gain + t.scale * rstd
    # (c) A replaced element influences no gradient, as in reverse mode.
    t_z = vectors(affine.gain) * (t_x - vectors(t_mean)) + vectors(t_gain) * xc
    t_z = t_z if t.bias is None else t_z + vectors(t.bias)
    t_z = t_z if t.residual is None else t_z + t.residual.astype(x.dtype)
    t_z = zero_where(replaced, t_z)
    # (d)
    saved = None if point.saved is None else point.saved.astype(x.dtype)
    t_y = through_activation(x, t_z, vectors(affine), saved, config.activation)
    return t_y.astype(config.dtype), t_stats
