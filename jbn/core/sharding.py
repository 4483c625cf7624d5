"""How arrays lie on devices: functions of types, specs and shapes that compute no value.

Three kinds of axes occur in a mesh.  Over a manual axis (in shard_map and pmap) an array is the
local part, and its type may say over which axes it varies.  Over an explicit axis the type of the
array says how it is split.  Over an automatic axis only the compiler knows.
"""

import contextlib
import math
import string
import sys
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def varying(x: Array) -> frozenset:
    """The manual mesh axes over which x is known to differ: empty without check_vma=True."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def axis_names(axis_name: Hashable) -> tuple:
    """The names that an argument axis_name stands for."""
    return axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)


def axis_sizes(axis_name: Hashable) -> tuple[tuple[Hashable, int], ...]:
    """The names that axis_name stands for, with the sizes of their axes."""
    return tuple((name, lax.axis_size(name)) for name in axis_names(axis_name))


def named_axes(sizes: tuple[tuple[Hashable, int], ...]) -> contextlib.AbstractContextManager:
    """A context in which axes of these names and sizes are bound.

    Where jit, scan or checkpoint stands around a vmap(axis_name=), JAX traces the derivative rule
    of what is inside after it has left the vmap, and maps the rule afterwards.  JAX has no public
    way to bind the name meanwhile: where its private one is gone, the rule raises NameError.
    """

    def is_bound(name):
        try:
            lax.axis_size(name)
        except NameError:
            return False
        return True

    missing = [(name, size) for name, size in sizes if not is_bound(name)]
    bind = getattr(sys.modules.get("jax._src.core"), "extend_axis_env_nd", None)
    return contextlib.nullcontext() if bind is None or not missing else bind(missing)


def vary_alike(tree: Any) -> Any:
    """Mark all arrays of a pytree as varying over the manual axes that any of them varies over.

    This is done outside the derivative rule, so that JAX sums the gradient of a replicated
    parameter over the devices.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(tree)))

    def mark(a):
        missing = tuple(axes - varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, tree)


def split_alike(vectors: Any, x: Array, axis: tuple[int, ...]) -> Any:
    """Split per-channel vectors (a pytree) over an explicit mesh as x is along its feature axes.

    This is done outside the derivative rule, so that JAX brings the gradients back to the shardings
    of their arguments.  Elsewhere the vectors are returned as they are.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return vectors
    spec = padded(sharding.spec, x.ndim)
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*(spec[a] for a in axis)))
    return jax.tree.map(lambda vector: jax.reshard(vector, sharding), vectors)


def zeros_like(x: Array) -> Array:
    """Zeros of the type of x, wherever they are used.

    jnp.zeros_like would put them on the mesh that a closed-over x lies on, which may be another
    mesh than that of the program.
    """
    zeros = jnp.zeros(x.shape, x.dtype)
    type_ = jax.typeof(x)
    if AxisType.Explicit in type_.sharding.mesh.axis_types:
        zeros = jax.reshard(zeros, type_.sharding)
    names = tuple(varying(x))
    return lax.pcast(zeros, names, to="varying") if names else zeros


def is_automatic(x: Array) -> bool:
    """Whether only the compiler may know how x is split: no axis of its mesh says so.

    An array on no mesh is taken to be on that of the context.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = (jax.sharding.get_abstract_mesh() if mesh.empty else mesh).axis_types
    return all(kind == AxisType.Auto for kind in kinds)


def repeated(x: Array, mapped: Array) -> Array:
    """x along a new leading axis that is as long as the first of `mapped`, and split like it."""
    repeats = jnp.broadcast_to(x, (mapped.shape[0], *x.shape))
    sharding = jax.typeof(mapped).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return repeats
    entries = padded(jax.typeof(x).sharding.spec, x.ndim)
    spec = PartitionSpec(sharding.spec[0], *entries)
    return jax.reshard(repeats, NamedSharding(sharding.mesh, spec))


def padded(spec: PartitionSpec, ndim: int) -> tuple:
    """The entries of a spec, one for each dimension."""
    return (*spec, *(None,) * (ndim - len(spec)))


def mesh_axes(entry: Any) -> tuple:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def like(shape: tuple[int, ...], whole: tuple[int, ...], spec: tuple) -> PartitionSpec:
    """The spec of an array that broadcasts against x of shape `whole`, split as `spec` splits x."""
    entries = zip(shape, whole, spec, strict=True)
    return PartitionSpec(*(entry if n == size else None for n, size, entry in entries))


def prime_mesh(sharding: Any, ndim: int) -> tuple[Mesh, tuple]:
    """The devices of a sharding as a mesh whose axes have prime sizes, and its spec on that mesh.

    The user's mesh would not do: after a reshape XLA may split a dimension over a part of a mesh
    axis (half of an axis of 8).  A mesh of prime axes can express every such sharding.
    """
    devices = np.array(sharding._device_assignment)
    sizes = prime_factors(devices.size)
    names = tuple(f"axis{i}" for i in range(len(sizes)))
    mesh = Mesh(devices.reshape(sizes), names)
    tiling = sharding._to_xla_hlo_sharding(ndim)
    if not tiling.is_tiled():
        return mesh, (None,) * ndim
    tiles = np.array(tiling.tile_assignment_devices()).reshape(tiling.tile_assignment_dimensions())
    tile_of = {device: tile for tile, device in np.ndenumerate(tiles)}
    step_of = {name: tile_of[math.prod(sizes[i + 1 :])] for i, name in enumerate(names)}
    spec = []
    for dim in range(ndim):
        # How many tiles a step along each mesh axis moves. The axis of the largest steps comes
        # first: it is the major one.
        steps = {name: tile[dim] - tile_of[0][dim] for name, tile in step_of.items()}
        moving = sorted((name for name in names if steps[name] > 0), key=lambda name: -steps[name])
        spec.append(tuple(moving) or None)
    return mesh, tuple(spec)


def prime_factors(n: int) -> tuple[int, ...]:
    """The prime factors of n, ascending; () for 1."""
    for factor in range(2, math.isqrt(n) + 1):
        if n % factor == 0:
            return (factor, *prime_factors(n // factor))
    return (n,) if n > 1 else ()


def einsum_rule(
    shapes: list[tuple[int, ...]], like_x: list[bool], axis: tuple[int, ...], results: list[bool]
) -> str:
    """The Shardy rule that splits operands and results alike, such as "n h w c, c -> n h w c".

    Args:
        shapes: of the operands, x first.
        like_x: for each operand, whether it broadcasts against x; the others are vectors.
        axis: the axes of x that a vector has.
        results: for each result, whether it is like x.
    """
    letters = iter(string.ascii_letters)
    whole, factors = shapes[0], [next(letters) for _ in shapes[0]]
    vector = " ".join(factors[a] for a in axis)

    def one(shape):
        same = zip(shape, whole, factors, strict=True)
        # An axis of size 1 is nobody's: a letter of its own.
        return " ".join(factor if n == size else next(letters) for n, size, factor in same)

    operands = [one(shape) if full else vector for shape, full in zip(shapes, like_x, strict=True)]
    return f"{', '.join(operands)} -> {', '.join(one(whole) if r else vector for r in results)}"
