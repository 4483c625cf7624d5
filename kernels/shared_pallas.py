"""What the Pallas backends share: how an array reaches a kernel, and how partial results merge."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import ManualAxisType

from jbn.kernels.seam import Stats, round_shift

# Kernels number the rows and channels of an array in int32. The last program's tiles may reach
# beyond the end of the array, but by fewer than 2^20.
MAX_SIZE = 2**31 - 2**20


def out_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the same manual mesh axes as x.

    With it shard_map's default check (check_vma) passes.
    """
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        manual_axis_type=ManualAxisType(varying=jax.typeof(x).manual_axis_type.varying),
    )


def channels_last(shape: tuple[int, ...], axis: tuple[int, ...]) -> str | None:
    """Why a kernel on [rows, channels] cannot take an array of this shape as it lies, or None."""
    if axis != (len(shape) - 1,):
        return f"takes channels last, not axis {axis} of {len(shape)}"
    return "has nothing to do on an empty array" if 0 in shape else None


def too_long(*sizes: int) -> str | None:
    """Why a kernel cannot number the rows and channels of an array of these sizes, or None."""
    if max(sizes) <= MAX_SIZE:
        return None
    return (
        f"numbers rows and channels in int32, and takes at most {MAX_SIZE} of them in one "
        f"dimension, not {max(sizes)}"
    )


def widening(rows: int, channels: int, lanes: int) -> int:
    """How many rows to put side by side so that their width is a multiple of `lanes`.

    [rows, channels] and [rows / k, k * channels] are the same memory.  `lanes` is a power of two.
    Where rows has too few factors of two, the width comes as near to a multiple as it can.
    """
    factor = lanes // math.gcd(lanes, channels)
    return math.gcd(factor, rows)


def widen(x: Array, factor: int) -> Array:
    """[..., channels] as [rows / factor, factor * channels]."""
    return x.reshape(-1, factor * x.shape[-1])


def narrow(partials: Any, factor: int) -> Any:
    """Arrays (a pytree) [parts, factor * channels] as [parts * factor, channels]."""
    return jax.tree.map(lambda p: p.reshape(p.shape[0] * factor, p.shape[1] // factor), partials)


def merge(counts: Array, shift: Array, offset: Array, m2: Array) -> Stats:
    """Statistics of the union of parts; the mean of a part is its shift + offset.

    The new shift is the mean of all parts in float32, and the new offset is the remainder.  So
    neither depends on the order of the parts, except for rounding.  (Chan, Golub & LeVeque 1979,
    for many parts at once.)

    Args:
        counts: [parts], how many rows each part has.
        shift, offset, m2: [parts, channels].
    """
    total = counts.sum()
    weight = (counts / total)[:, None]
    merged = round_shift((weight * (shift + offset)).sum(0))
    delta = (shift - merged[None]) + offset
    rest = (weight * delta).sum(0)
    merged_m2 = (m2 + counts[:, None] * jnp.square(delta)).sum(0) - total * jnp.square(rest)
    return Stats(jnp.broadcast_to(total, merged.shape), merged, rest, jnp.maximum(merged_m2, 0))
