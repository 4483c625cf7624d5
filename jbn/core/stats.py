"""Moments of an array, and how the moments of parts become those of the whole."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jbn.kernels.seam import Stats, round_shift
from jbn.types import Moments


def variance(m: Moments, *, unbiased: bool = False) -> Array:
    """m2 / count, or m2 / (count - 1) where unbiased and count > 1; 0 where nothing was counted."""
    divisor = jnp.where(m.count > 1, m.count - 1, m.count) if unbiased else m.count
    return m.m2 / jnp.where(m.count > 0, divisor, 1)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets (Chan, Golub & LeVeque 1979, eq. 2.1), exact and in either order."""
    count = a.count + b.count
    divisor = jnp.where(count > 0, count, 1)
    delta = b.mean - a.mean
    mean = jnp.where(
        b.count > a.count,
        b.mean - delta * (a.count / divisor),
        a.mean + delta * (b.count / divisor),
    )
    return Moments(count, mean, a.m2 + b.m2 + jnp.square(delta) * (a.count * b.count / divisor))


def psum_stats(s: Stats, axis_name: Hashable, axis_index_groups=None) -> Stats:
    """Statistics of the union over a mapped axis, in two all-reduces of per-channel vectors."""
    if axis_name is None:
        return s
    return _union(s, lambda vectors: psum(vectors, axis_name, axis_index_groups))


def psum_moments(m: Moments, axis_name: Hashable, axis_index_groups=None) -> Moments:
    """Moments of the union over a mapped axis."""
    local = Stats(m.count, m.mean, jnp.zeros_like(m.mean), m.m2)
    count, shift, offset, m2 = psum_stats(local, axis_name, axis_index_groups)
    return Moments(count, shift + offset, m2)


def pool(s: Stats) -> Stats:
    """Statistics of the union over the leading axis."""
    union = _union(s, lambda vectors: vectors.sum(1, keepdims=True))
    return Stats(*(vector.squeeze(0) for vector in union))


def _union(s, total):
    """total: the sum over the parts of a stack of per-channel vectors.

    The first finds the mean to float32 precision; the second, relative to it, the rest of the mean
    and m2.
    """
    count, sums = total(jnp.stack([s.count, s.count * (s.shift + s.offset)]))
    divisor = jnp.where(count > 0, count, 1)
    shift = round_shift(sums / divisor)
    delta = (s.shift - shift) + s.offset
    m2, rest = total(jnp.stack([s.m2 + s.count * jnp.square(delta), s.count * delta]))
    offset = rest / divisor
    return Stats(count, shift, offset, jnp.maximum(m2 - rest * offset, 0))


def psum(vectors: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """Sum over a mapped axis; the identity for axis_name None."""
    if axis_name is None:
        return vectors
    if axis_index_groups is not None and varying(vectors):
        raise NotImplementedError(
            f"axis_index_groups {axis_index_groups} in shard_map(check_vma=True): its psum takes no groups, use check_vma=False"
        )
    return lax.psum(vectors, axis_name, axis_index_groups=axis_index_groups)


def psum_cotangent(ct: Array, x: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """The total cotangent of a value that was made by psum from x.

    Under shard_map(check_vma=True) the cotangent of an invariant value is the total already.
    """
    names = _untyped(axis_name, x, ct)
    return psum(ct, names, axis_index_groups) if names else ct


def unmapped(tangent: Array, x: Array, axis_name: Hashable, axis_index_groups=None) -> Array:
    """A tangent that psum from x made equal everywhere, as vmap knows it of the primal: a value without the mapped axis."""
    names = _untyped(axis_name, x, tangent)
    return lax.pmean(tangent, names, axis_index_groups=axis_index_groups) if names else tangent


def _untyped(axis_name, x, value):
    """Those of the mapped axes over which the type of a value made by psum from x does not say that it is equal."""
    names = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    return tuple(name for name in names if name not in varying(x) - varying(value))


def varying(x: Array) -> frozenset:
    """The manual mesh axes over which x is known to differ: empty outside shard_map(check_vma=True)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def split_alike(vectors, x: Array, axis: tuple[int, ...]):
    """Each of a pytree of per-channel vectors split over an explicit mesh as x is along its feature
    axes; elsewhere as it is.

    Done outside the derivative rule, so that JAX brings the gradients back to the shardings of
    their arguments.
    """
    mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return vectors
    padded = (*spec, *(None,) * (x.ndim - len(spec)))
    sharding = NamedSharding(mesh, PartitionSpec(*(padded[a] for a in axis)))
    return jax.tree.map(lambda vector: jax.reshard(vector, sharding), vectors)


def vary_alike(tree):
    """Mark all arrays of a pytree as varying over the manual axes that any of them varies over.

    Done outside the derivative rule, so that JAX sums the gradient of a replicated parameter over
    the devices.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(tree)))

    def mark(a):
        missing = tuple(axes - varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, tree)
