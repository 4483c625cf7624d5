"""One call across devices: the four functions of the seam, on the whole array wherever its parts
are.

Inside shard_map and pmap the arrays are the local parts, and the caller names the axis to sum over:
nothing to do here.
On an explicit mesh the type of x says how it is split.  Under automatic sharding only the compiler
knows, and asks
`_partition` for the program of one shard.  Both run the same `_on_shard`: local sums, then one or
two all-reduces of
per-channel vectors.  XLA's own partitioner would do too where x is split along one reduced axis;
along two it makes an
all-reduce for each.  TPU has no hook to ask through (jax#38196), but folds those all-reduces by
itself.
"""

import functools
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.core import dispatch, stats
from jbn.core.lowering import at_lowering
from jbn.kernels.seam import Affine, Stats, StatsGradient, broadcastable

FULL_SIZE = (
    "dy",
    "residual",
    "saved",
    "weights",
)  # arrays like x; all others are per-channel vectors


def fwd_stats(implementation, x: Array, shift: Array, weights: Array | None, *, axis) -> Stats:
    local = Stats(
        *_run("fwd_stats", implementation, x, {"shift": shift, "weights": weights}, {"axis": axis})
    )
    if weights is not None or AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types:
        return local
    # A constant, so that what depends on it alone (was anything counted?) takes no communication
    # between channels.
    count = jnp.full(
        local.count.shape, x.size // math.prod(x.shape[a] for a in axis), local.count.dtype
    )
    return local._replace(count=count)


def fwd_apply(
    implementation, x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype
) -> Array:
    static = {"axis": axis, "activation": activation, "dtype": dtype}
    return _run("fwd_apply", implementation, x, {"affine": affine, "residual": residual}, static)[0]


def bwd_stats(
    implementation, x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation
) -> tuple[Array, Array]:
    arrays = {"dy": dy, "affine": affine, "saved": saved, "weights": weights}
    sum_dz, sum_dz_xc = _run(
        "bwd_stats", implementation, x, arrays, {"axis": axis, "activation": activation}
    )
    return sum_dz, sum_dz_xc


def bwd_apply(
    implementation,
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
    arrays = {
        "dy": dy,
        "affine": affine,
        "stats_gradient": stats_gradient,
        "saved": saved,
        "weights": weights,
    }
    static = {"axis": axis, "activation": activation, "residual_dtype": residual_dtype}
    dx, *dresidual = _run("bwd_apply", implementation, x, arrays, static)
    return dx, dresidual[0] if dresidual else None


class _Call(NamedTuple):
    """One of the four functions, of the leaves of (x, other arrays), after `mapped` vmaps over axis 0 of every leaf."""

    name: str
    implementation: str | None
    static: tuple[tuple[str, Any], ...]
    tree: Any
    mapped: int = 0

    def __call__(self, *leaves):
        def run(*leaves):
            x, others = jax.tree.unflatten(self.tree, leaves)
            return jax.tree.leaves(
                dispatch.run(self.name, self.implementation, {"x": x, **others}, dict(self.static))
            )

        for _ in range(self.mapped):
            run = jax.vmap(run)
        return run(*leaves)

    @property
    def axis(self):
        """The axes of a leaf like x that a per-channel vector has, mapped ones included."""
        return (*range(self.mapped), *(a + self.mapped for a in dict(self.static)["axis"]))

    def full_size(self):
        """For each leaf, whether it is like x."""
        _, others = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        return jax.tree.leaves(
            (
                True,
                {
                    key: jax.tree.map(lambda _, k=key: k in FULL_SIZE, v)
                    for key, v in others.items()
                },
            )
        )


def _run(name, implementation, x, others, static):
    leaves, tree = jax.tree.flatten((x, others))
    call = _Call(name, implementation, tuple(static.items()), tree)
    mesh = jax.typeof(x).sharding.mesh
    elementwise = name.endswith("apply") and dispatch.on_xla(implementation, others.get("weights"))
    if elementwise or AxisType.Manual in mesh.axis_types:
        return call(*leaves)
    return _across(call, *leaves)


def _across(call, *leaves):
    """Derivatives of second and higher order take the jnp twin, on whole arrays."""
    mesh = jax.typeof(leaves[0]).sharding.mesh
    twin = call._replace(implementation="xla")
    vmapped = functools.partial(_across, call._replace(mapped=call.mapped + 1))
    if AxisType.Explicit in mesh.axis_types:
        return at_lowering(
            lambda _: 0, (functools.partial(_explicit, call, mesh),), twin, *leaves, vmapped=vmapped
        )
    return at_lowering(
        _by_hook_or_local,
        (functools.partial(_partitioned, call), call),
        twin,
        *leaves,
        vmapped=vmapped,
    )


def _by_hook_or_local(module_context):
    """1, the local program for XLA to partition, where there is no hook: on TPU, and in what is exported."""
    platforms = module_context.platforms
    return int(
        len(platforms) > 1 or "tpu" in platforms or module_context.lowering_parameters.for_export
    )


def _explicit(call, mesh, *leaves):
    """shard_map over the axes that the type of x names."""
    spec = _padded(jax.typeof(leaves[0]).sharding.spec, leaves[0].ndim)
    in_specs, out_specs = _specs(call, spec, leaves)
    names = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    on_shard = functools.partial(_on_shard, call, spec, leaves[0].shape)
    placed = [
        jax.reshard(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, in_specs, strict=True)
    ]
    # The derivative rule of `_across` stands above, so nothing is left for check_vma to transpose.
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=names,
        check_vma=False,
    )
    return mapped(*placed)


def _partition(call, mesh, operands, results):
    """The program of one shard; everything is placed as x is."""
    del mesh, results
    mesh, spec = _by_primes(operands[0].sharding, len(operands[0].shape))
    placed = lambda specs: [NamedSharding(mesh, spec) for spec in specs]
    in_specs, out_specs = _specs(call, spec, operands)
    return (
        mesh,
        functools.partial(_on_shard, call, spec, operands[0].shape),
        placed(out_specs),
        tuple(placed(in_specs)),
    )


def _by_primes(sharding, ndim):
    """The devices as a mesh whose axes have prime sizes, and the spec of the sharding on it.

    The user's axes would not do: where a split axis is reshaped, XLA splits the parts over a
    fraction of a mesh axis.
    """
    devices = np.array(sharding._device_assignment)
    sizes = _prime_factors(devices.size)
    names = tuple(f"axis{i}" for i in range(len(sizes)))
    mesh = Mesh(devices.reshape(sizes), names)
    tiling = sharding._to_xla_hlo_sharding(ndim)
    if not tiling.is_tiled():
        return mesh, (None,) * ndim
    tiles = np.array(tiling.tile_assignment_devices()).reshape(tiling.tile_assignment_dimensions())
    tile_of = {device: tile for tile, device in np.ndenumerate(tiles)}
    spec = []
    for dim in range(ndim):
        # How many tiles a step along each mesh axis moves; the axis of the largest steps is the
        # major one.
        steps = {
            name: tile_of[math.prod(sizes[i + 1 :])][dim] - tile_of[0][dim]
            for i, name in enumerate(names)
        }
        moving = sorted((name for name in names if steps[name] > 0), key=lambda name: -steps[name])
        spec.append(tuple(moving) or None)
    return mesh, tuple(spec)


def _prime_factors(n):
    for factor in range(2, math.isqrt(n) + 1):
        if n % factor == 0:
            return (factor, *_prime_factors(n // factor))
    return (n,) if n > 1 else ()


def _sharding_rule(call, mesh, operands, results):
    """Which axes of the operands and results are split alike, as in einsum; an axis of size 1 is alone."""
    del mesh, results
    letters = iter(string.ascii_letters)
    factors = [next(letters) for _ in operands[0].shape]

    def of(value, full_size):
        if not full_size:
            return " ".join(factors[a] for a in call.axis)
        whole = operands[0].shape
        same = zip(value.shape, whole, factors, strict=True)
        return " ".join(factor if n == size else next(letters) for n, size, factor in same)

    inputs = [of(*pair) for pair in zip(operands, call.full_size(), strict=True)]
    outputs = [of(operands[0], call.name.endswith("apply"))] * _num_results(call)
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


_partitioned = custom_partitioning(lambda call, *leaves: call(*leaves), static_argnums=(0,))
_partitioned.def_partition(_partition, sharding_rule=_sharding_rule, decode_shardings=False)


def _num_results(call):
    if call.name == "bwd_apply":
        return 1 if dict(call.static)["residual_dtype"] is None else 2
    return {"fwd_stats": len(Stats._fields), "fwd_apply": 1, "bwd_stats": 2}[call.name]


def _specs(call, spec, leaves):
    """The specs of the operands and of the results that belong to this spec of x."""
    vector = PartitionSpec(*(spec[a] for a in call.axis))
    like_x = lambda leaf: PartitionSpec(
        *(None if n == 1 else entry for n, entry in zip(leaf.shape, spec, strict=True))
    )
    operands = tuple(
        like_x(v) if full else vector for v, full in zip(leaves, call.full_size(), strict=True)
    )
    result = PartitionSpec(*spec) if call.name.endswith("apply") else vector
    return operands, [result] * _num_results(call)


def _on_shard(call, spec, shape, *leaves):
    """The function on one shard of arrays like x of the given global shape, summed over the devices."""
    reduced = [a for a in range(len(shape)) if a not in call.axis]
    names = tuple(name for a in reduced for name in _names(spec[a]))
    if not names or call.name.endswith("apply"):
        return call(*leaves)
    call, leaves = _without_padding(call, spec, shape, reduced, leaves)
    out = call(*leaves)
    if call.name == "fwd_stats":
        return list(stats.psum_stats(Stats(*out), names))
    return list(stats.psum(jnp.stack(out), names))


def _without_padding(call, spec, shape, reduced, leaves):
    """The last shard of an axis that does not divide evenly ends in padding: it counts nothing and has no cotangent."""
    valid = None
    for a in reduced:
        if not spec[a] or shape[a] % math.prod(map(lax.axis_size, _names(spec[a]))) == 0:
            continue
        size = leaves[0].shape[a]
        inside = lax.axis_index(_names(spec[a])) * size + jnp.arange(size) < shape[a]
        inside = jnp.expand_dims(inside, [other for other in range(len(shape)) if other != a])
        valid = inside if valid is None else valid & inside
    if valid is None:
        return call, leaves
    x, others = jax.tree.unflatten(call.tree, leaves)
    if call.name == "fwd_stats":
        weights = others["weights"]
        weights = valid if weights is None else jnp.where(valid, weights, jnp.zeros_like(weights))
        leading = leaves[0].shape[: call.mapped]
        others = {
            **others,
            "weights": jnp.broadcast_to(weights, (*leading, *weights.shape[call.mapped :])),
        }
    else:
        zero = lambda array: (
            None if array is None else jnp.where(valid, array, jnp.zeros_like(array))
        )
        x = jnp.where(
            valid, x, broadcastable(others["affine"].shift, x.ndim, call.axis).astype(x.dtype)
        )
        others = {**others, "dy": zero(others["dy"]), "saved": zero(others["saved"])}
    leaves, tree = jax.tree.flatten((x, others))
    return call._replace(tree=tree), leaves


def _padded(spec, ndim):
    return (*spec, *(None,) * (ndim - len(spec)))


def _names(entry):
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
