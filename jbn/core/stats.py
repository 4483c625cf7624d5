"""Moments of an array, and how the moments of parts become those of the whole."""

from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array, lax

from jbn.core.sharding import axis_names, varying
from jbn.kernels.seam import Stats, accumulator, reduced_axes, round_shift
from jbn.types import Moments


def divisor(count: Array) -> Array:
    """`count`, or 1 where nothing was counted."""
    return jnp.where(count > 0, count, 1)


def variance(m: Moments | Stats, *, unbiased: bool = False) -> Array:
    """m2 / count, or m2 / (count - 1) where unbiased; 0 where nothing was counted.

    Below a count of 2 the biased variance is kept: weights may sum to just above 1.
    """
    degrees = jnp.where(m.count >= 2, m.count - 1, m.count) if unbiased else m.count
    return m.m2 / divisor(degrees)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets (Chan, Golub & LeVeque 1979, eq. 2.1), in either order."""
    count = a.count + b.count
    delta = b.mean - a.mean
    share_a, share_b = a.count / divisor(count), b.count / divisor(count)
    # From the larger set's mean, which is then exact where the other set is empty.
    mean = jnp.where(b.count > a.count, b.mean - delta * share_a, a.mean + delta * share_b)
    # count_a * count_b / count without a product that overflows, and alike in either order.
    between = jnp.minimum(a.count, b.count) * jnp.maximum(share_a, share_b)
    return Moments(count, mean, a.m2 + b.m2 + jnp.square(delta) * between)


def rescale(
    weights: Array | None, axis: tuple[int, ...], axis_name: Hashable = None
) -> tuple[Array | None, Array]:
    """Float weights times a power of two per channel that brings the largest to 2^-32 .. 2^32.

    A common factor of all weights changes nothing, but weights of 1e38 add up to infinity, and XLA
    reads 1e-38 as zero, like every float32 below 2^-126: such numbers are told apart by their bits.
    Within the bounds the power is 1; beyond them n / (n - 1) does not depend on it.

    Returns:
        (weights, unit): the weights given are `weights * unit`.  unit broadcasts against the
        feature axes.
    """
    if weights is None or weights.dtype == jnp.bool_:
        return weights, jnp.ones(())
    weights = lax.stop_gradient(weights.astype(accumulator(weights.dtype)))
    precision = jnp.finfo(weights.dtype)
    integers, mantissa, bias = f"int{precision.bits}", precision.nmant, precision.maxexp - 1
    bits = lax.bitcast_convert_type(weights, integers)
    power = lambda exponent: lax.bitcast_convert_type(
        jnp.maximum(exponent + bias, 0) << mantissa, weights.dtype
    )
    # Of floats that are not negative, the largest has the largest bits.
    reduced = reduced_axes(weights.ndim, axis)
    largest = jnp.maximum(bits.max(reduced), 0)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    exponent = (largest >> mantissa) - bias
    up = jnp.clip(exponent, -32, 32) - exponent
    across = jnp.expand_dims(up, reduced)
    subnormal = (bits > 0) & (bits < 1 << mantissa)
    scaled = jnp.where(
        subnormal,
        bits.astype(weights.dtype) * power(across + precision.minexp - mantissa),
        weights * power(across),
    )
    return scaled, power(-up)


def psum_stats(s: Stats, axis_name: Hashable, axis_index_groups=None) -> Stats:
    """Statistics of the union over a mapped axis, in two all-reduces of per-channel vectors."""
    if axis_name is None:
        return s
    return _union(s, lambda vectors: psum(vectors, axis_name, axis_index_groups))


def psum_moments(m: Moments, axis_name: Hashable, axis_index_groups=None) -> Moments:
    """Moments of the union over a mapped axis."""
    local = Stats(m.count, m.mean, jnp.zeros(m.mean.shape, m.mean.dtype), m.m2)
    return as_moments(psum_stats(local, axis_name, axis_index_groups))


def as_moments(s: Stats) -> Moments:
    """The same with the mean as one number."""
    return Moments(s.count, s.shift + s.offset, s.m2)


def pool(s: Stats) -> Stats:
    """Statistics of the union over the leading axis."""
    union = _union(s, lambda vectors: vectors.sum(1, keepdims=True))
    return Stats(*(vector.squeeze(0) for vector in union))


def _union(s, sum_over_parts):
    """The statistics of all parts.

    The first sum finds the mean to float32 precision.  The second, relative to that mean, finds the
    rest of it and m2.
    """
    count, sums = sum_over_parts(jnp.stack([s.count, s.count * (s.shift + s.offset)]))
    shift = round_shift(sums / divisor(count))
    delta = (s.shift - shift) + s.offset
    terms = jnp.stack([s.m2 + s.count * jnp.square(delta), s.count * delta])
    m2, rest = sum_over_parts(terms)
    offset = rest / divisor(count)
    return Stats(count, shift, offset, jnp.maximum(m2 - rest * offset, 0))


def psum(vectors: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """Sum over a mapped axis; the identity for axis_name None."""
    if axis_name is None:
        return vectors
    if axis_index_groups is not None and varying(vectors):
        raise NotImplementedError(
            f"axis_index_groups {axis_index_groups} in shard_map(check_vma=True): its psum takes "
            "no groups, use check_vma=False"
        )
    return lax.psum(vectors, axis_name, axis_index_groups=axis_index_groups)


def psum_cotangent(ct: Array, x: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """The total cotangent of a value that was made by psum from x.

    Under shard_map(check_vma=True) the cotangent of an invariant value is the total already.
    """
    names = _untyped(axis_name, x, ct)
    return psum(ct, names, axis_index_groups) if names else ct


def unmapped(tangent: Array, x: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """A tangent that psum made equal on all members of the axis, without the mapped axis.

    vmap still thinks that it varies.  pmean changes no value, and removes the axis from its type.
    """
    names = _untyped(axis_name, x, tangent)
    return lax.pmean(tangent, names, axis_index_groups=axis_index_groups) if names else tangent


def _untyped(axis_name, x, value):
    """The mapped axes over which `value` is equal, as psum made it from x, though its type does not
    say so."""
    typed = varying(x) - varying(value)
    return tuple(name for name in axis_names(axis_name) if name not in typed)
