"""What the Pallas backends share: how an array reaches a kernel, and how the partial results of one become the whole."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType

from jbn.kernels.seam import Stats, settled


def out_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that differs over the same manual mesh axes as x, so that shard_map's default check passes."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=jax.typeof(x).manual_axis_type.varying))


def channels_last(shape: tuple[int, ...], axis: tuple[int, ...]) -> str | None:
    """Why a kernel on [rows, channels] cannot take an array of this shape without moving it, or None."""
    if axis != (len(shape) - 1,):
        return f"takes channels last, not axis {axis} of {len(shape)}"
    return "has nothing to do on an empty array" if 0 in shape else None


def fold_factor(rows: int, channels: int, lanes: int) -> int:
    """How many rows to put side by side so that their width is a multiple of `lanes`, a power of two.

    [rows, channels] as [rows / k, k * channels] is the same memory.  Where rows has too few factors of two, the width comes
    as near as it can.
    """
    factor = lanes // math.gcd(lanes, channels)
    return math.gcd(factor, rows)


def fold(x: Array, factor: int) -> Array:
    """[..., channels] as [rows / factor, factor * channels]."""
    return x.reshape(-1, factor * x.shape[-1])


def unfold(partials: Any, factor: int) -> Any:
    """Arrays (a pytree) [parts, factor * channels] as [parts * factor, channels]."""
    return jax.tree.map(lambda p: p.reshape(p.shape[0] * factor, p.shape[1] // factor), partials)


def merge(counts: Array, shift: Array, offset: Array, m2: Array) -> Stats:
    """Statistics of the union of parts; the mean of a part is its shift + offset.

    The new shift is the mean of all parts to float32 precision, the new offset what that leaves; so neither depends on the
    order of the parts beyond rounding (Chan, Golub & LeVeque 1979, for many parts at once).

    Args:
        counts: [parts], how many rows each part has.
        shift, offset, m2: [parts, channels].
    """
    total = counts.sum()
    weight = (counts / total)[:, None]
    merged = settled((weight * (shift + offset)).sum(0))
    delta = (shift - merged[None]) + offset
    rest = (weight * delta).sum(0)
    merged_m2 = (m2 + counts[:, None] * jnp.square(delta)).sum(0) - total * jnp.square(rest)
    return Stats(jnp.broadcast_to(total, merged.shape), merged, rest, jnp.maximum(merged_m2, 0))


def launch_primitive(name: str, lower: Callable) -> Primitive:
    """A primitive for the launches of a GPU backend: `bind(*operands, launch=launch)` is launch(*operands), lowered apart.

    Interpret mode mixes arrays that vary over manual mesh axes with its own constants; shard_map's check of that is long
    passed at lowering, and would refuse it before.

    Args:
        name: of the primitive.
        lower: lower(context, launch, *operands) -> the values of `mlir.lower_fun`.

    A launch is hashable, and has the `shapes` of its results and `interpret`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    jitted = jax.jit(primitive.bind, static_argnames="launch")

    @primitive.def_impl
    def _(*operands, launch):
        with jax.disable_jit(False):
            return jitted(*operands, launch=launch)

    @primitive.def_abstract_eval
    def _(*avals, launch):
        # plgpu.kernel forgets what its results vary over.
        found = jax.make_jaxpr(launch)(*avals).out_avals
        return [aval.update(manual_axis_type=avals[0].manual_axis_type) for aval in found]

    def batch(operands, dims, *, launch):
        batched = _Batched(launch, tuple(dims))
        return primitive.bind(*operands, launch=batched), [0] * len(launch.shapes)

    def lowering(context, *operands, launch):
        unvarying = lambda avals: [aval.update(manual_axis_type=ManualAxisType()) for aval in avals]
        context = context.replace(avals_in=unvarying(context.avals_in), avals_out=unvarying(context.avals_out))
        return lower(context, launch, *operands)

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lowering)
    return primitive


class _Batched(NamedTuple):
    """A launch for each of operands mapped over in_axes."""

    launch: Any
    in_axes: tuple

    @property
    def shapes(self):
        return self.launch.shapes

    @property
    def interpret(self):
        return self.launch.interpret

    def __call__(self, *operands):
        return jax.vmap(self.launch, self.in_axes, 0)(*operands)
