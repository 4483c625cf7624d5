"""The four functions as Pallas Mosaic GPU kernels, for Hopper and newer.

A channels-last array is seen as [rows, channels], and folded so that its width is a multiple of 512
bytes.  A program walks
down a chunk of rows, tile by tile: copies of the tensor memory accelerator (TMA) bring the next
    tiles to shared memory while
four warps read this one, each lane 16 bytes of columns.  Beyond the end of an array such a copy
writes nothing, and what it reads from there is not used.
Reductions leave one partial result per chunk, and XLA merges the chunks: no atomics, the same bits
every time.
"""

import math
import re
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks
from jbn.kernels import shared_gpu as gpu
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.blocks import Ring
from jbn.kernels.mosaic_gpu_fused import bwd_fused, fwd_fused
from jbn.kernels.mosaic_gpu_launch import Launch, launch_p
from jbn.kernels.mosaic_gpu_walk import Walk, chunk_stats, chunk_sums, dx_dz_of, in_flight, y_of

__all__ = [
    "bwd_apply",
    "bwd_fused",
    "bwd_stats",
    "fwd_apply",
    "fwd_fused",
    "fwd_stats",
    "unsupported",
    "unsupported_device",
]

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Data-center cards, then the others by series, as CUDA calls them.
_BEFORE_HOPPER = re.compile(
    r"\b(A(2|10G?|16|30|40|100|800)|L(4|20|40S?)|T4G?|[VP]100S?|P40?)\b"
    r"|\b(RTX (A?[2-4]\d{3}|A[56]000|[56]000 Ada)|GTX|TITAN|Quadro)\b"
)


def unsupported(shape: tuple[int, ...], dtype: Any, axis: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take such an x (a phrase with the implementation for its subject), or None."""
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {jnp.dtype(dtype).name}"
    reason = pallas.channels_last(shape, axis)
    if reason is not None:
        return reason
    channels = shape[-1]
    rows = math.prod(shape[:-1])
    unit = blocks.ALIGNED
    if pallas.widening(rows, channels, unit) * channels % unit:
        return f"takes arrays whose rows can be put together to multiples of {unit} channels, not {rows} rows of {channels}"
    return None


def unsupported_device(kind: str) -> str | None:
    """Why the kernels cannot be lowered for such a device (a phrase as of `unsupported`), or None.

    JAX would fail there, and 0.12 ends the process.
    """
    if _BEFORE_HOPPER.search(kind) is None:
        return None
    return f"needs compute capability 9.0 (Hopper) or newer, which {kind} has not: use implementation='triton' or None"


# Kernel bodies.


def _fwd_stats_kernel(
    x_ref, shift_ref, offset_ref, m2_ref, *, ring: Ring, bounce, vectors, **in_flight
):
    """Of one chunk: the mean as shift + offset, and m2."""
    walk = Walk.begin(ring, (x_ref,), **in_flight)
    chunk_stats(walk, bounce, vectors)
    walk.store_partials(vectors, (shift_ref, offset_ref, m2_ref))


def _bwd_stats_kernel(*refs, ring: Ring, activation, bounce, vectors, arrived, **in_flight):
    """Of one chunk: the sums of dz and of dz * (x - shift)."""
    *arrays, vectors_ref, sum_dz_ref, sum_dz_x_ref = refs
    walk = Walk.begin(ring, arrays, **in_flight)
    chunk_sums(walk, walk.affine(vectors_ref, vectors, arrived), activation, bounce, vectors)
    walk.store_partials(vectors, (sum_dz_ref, sum_dz_x_ref))


def _fwd_apply_kernel(*refs, ring: Ring, activation, vectors, arrived, leaving, **in_flight):
    *arrays, vectors_ref, y_ref = refs
    walk = Walk.begin(ring, arrays, **in_flight)
    walk.map(y_of(walk.affine(vectors_ref, vectors, arrived), activation), leaving, (y_ref,))


def _bwd_apply_kernel(
    *refs, ring: Ring, activation, vectors, arrived, leaving, num_inputs, **in_flight
):
    arrays, vectors_ref, results = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    walk = Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    slope, intercept = (walk.spread(vectors.at[k]) for k in (3, 4))
    walk.map(dx_dz_of(affine, slope, intercept, activation), leaving, results)


# Launches.


def _reduce(kernel, arrays, vectors, num_results, interpret, **options):
    ring = _ring(arrays, least_tiles=blocks.MIN_REDUCED_TILES)
    # Of whole tiles: a copy of one row is clipped at the end of the array, not of the row.
    shapes = ((ring.num_chunks, ring.num_columns * ring.block_cols),) * num_results
    scratch = (
        *in_flight(ring, arrays),
        ("vectors", plgpu.SMEM((3, ring.block_cols), jnp.float32)),
        ("bounce", plgpu.SMEM((ring.register_rows, ring.block_cols), jnp.float32)),
        *([("arrived", plgpu.Barrier())] if vectors else []),
    )
    dtypes = (jnp.dtype(jnp.float32),) * num_results
    launch = Launch(kernel, ring, shapes, dtypes, scratch, tuple(options.items()), interpret)
    return ring, [
        partial[:, : ring.width] for partial in launch_p.bind(*arrays, *vectors, launch=launch)
    ]


def _map(kernel, arrays, vectors, dtypes, interpret, **options):
    ring = _ring(arrays, dtypes)
    scratch = (
        *in_flight(ring, arrays),
        *(("vectors", plgpu.SMEM((v.shape[0], ring.block_cols), jnp.float32)) for v in vectors),
        ("arrived", plgpu.Barrier()),
        ("leaving", tuple(plgpu.SMEM(ring.slots, dtype) for dtype in dtypes)),
    )
    launch = Launch(
        kernel,
        ring,
        (arrays[0].shape,) * len(dtypes),
        dtypes,
        scratch,
        tuple(options.items()),
        interpret,
    )
    return launch_p.bind(*arrays, *vectors, launch=launch)


def _ring(arrays, dtypes=(), **options):
    itemsizes = tuple(dtype.itemsize for dtype in (*(a.dtype for a in arrays), *dtypes))
    return blocks.ring(*arrays[0].shape, itemsizes, **options)


_kernels = _fwd_stats_kernel, _fwd_apply_kernel, _bwd_stats_kernel, _bwd_apply_kernel
_backend = gpu.Backend(*_kernels, blocks.warp_lanes, _reduce, _map)
fwd_stats, fwd_apply, bwd_stats, bwd_apply = (
    _backend.fwd_stats,
    _backend.fwd_apply,
    _backend.bwd_stats,
    _backend.bwd_apply,
)
