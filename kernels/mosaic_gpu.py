"""The four functions as Pallas Mosaic GPU kernels, for Hopper and newer.

A channels-last array is seen as [rows, channels], and rows are put side by side until the width is
a multiple of 512 bytes (`shared_pallas.widen`).  A program goes down a chunk of rows, tile by tile:
the tensor memory accelerator (TMA) copies the next tiles to shared memory while four warps work on
this one, each lane on 16 bytes of columns.  Beyond the end of an array TMA writes nothing, and what
it reads from there is not used.  Reductions leave one partial result per chunk, and XLA merges the
chunks: there are no atomics, so the same bits come out every time.
"""

import math
import re
from typing import Any

import jax.numpy as jnp

from jbn.kernels import blocks
from jbn.kernels import mosaic_gpu_pipeline as pipelines
from jbn.kernels import shared_gpu as gpu
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.blocks import PipelineTiles
from jbn.kernels.mosaic_gpu_fused import bwd_fused, fwd_fused
from jbn.kernels.mosaic_gpu_launch import call
from jbn.kernels.mosaic_gpu_pipeline import Pipeline
from jbn.kernels.seam import StatsGradient

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

# Data-center cards, then the others by series, as CUDA calls them.
_BEFORE_HOPPER = re.compile(
    r"\b(A(2|10G?|16|30|40|100|800)|L(4|20|40S?)|T4G?|[VP]100S?|P40?)\b"
    r"|\b(RTX (A?[2-4]\d{3}|A[56]000|[56]000 Ada)|GTX|TITAN|Quadro)\b"
)


def unsupported(shape: tuple[int, ...], dtype: Any, axis: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take an x of this shape, dtype and feature axes; None if they can.

    The reason is a phrase that goes on after "implementation 'mosaic_gpu'".
    """
    if reason := gpu.unsupported(shape, dtype, axis, blocks.warp_lanes):
        return reason
    channels = shape[-1]
    rows = math.prod(shape[:-1])
    unit = blocks.ALIGNED
    if pallas.widening(rows, channels, unit) * channels % unit:
        return (
            f"takes arrays whose rows can be put together to multiples of {unit} channels, "
            f"not {rows} rows of {channels}"
        )
    return None


def unsupported_device(kind: str) -> str | None:
    """Why the kernels cannot be lowered for such a device, a phrase as of `unsupported`, or None.

    JAX itself would fail there, and JAX 0.12 would end the process.
    """
    if _BEFORE_HOPPER.search(kind) is None:
        return None
    return (
        f"needs compute capability 9.0 (Hopper) or newer, which {kind} has not: "
        "use implementation='triton' or None"
    )


# Kernel bodies.


def _fwd_stats_kernel(
    x_ref, shift_ref, offset_ref, m2_ref, *, tiles: PipelineTiles, bounce, vectors, **in_flight
):
    """The statistics of one chunk: the mean as shift + offset, and m2."""
    pipeline = Pipeline.begin(tiles, (x_ref,), **in_flight)
    pipelines.chunk_stats(pipeline, bounce, vectors)
    pipeline.store_partials(vectors, (shift_ref, offset_ref, m2_ref))


def _bwd_stats_kernel(
    *refs, tiles: PipelineTiles, activation, bounce, vectors, vectors_barrier, **in_flight
):
    """The sums over one chunk of dz and of dz * (x - shift)."""
    *arrays, vectors_ref, sum_dz_ref, sum_dz_x_ref = refs
    pipeline = Pipeline.begin(tiles, arrays, **in_flight)
    affine = pipeline.load_affine(vectors_ref, vectors, vectors_barrier)
    pipelines.chunk_sums(pipeline, affine, activation, bounce, vectors)
    pipeline.store_partials(vectors, (sum_dz_ref, sum_dz_x_ref))


def _fwd_apply_kernel(
    *refs, tiles: PipelineTiles, activation, vectors, vectors_barrier, result_slots, **in_flight
):
    *arrays, vectors_ref, y_ref = refs
    pipeline = Pipeline.begin(tiles, arrays, **in_flight)
    affine = pipeline.load_affine(vectors_ref, vectors, vectors_barrier)
    pipeline.map(pipelines.y_of(affine, activation), result_slots, (y_ref,))


def _bwd_apply_kernel(
    *refs,
    tiles: PipelineTiles,
    activation,
    num_inputs,
    vectors,
    vectors_barrier,
    result_slots,
    **in_flight,
):
    arrays, vectors_ref, results = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    pipeline = Pipeline.begin(tiles, arrays, **in_flight)
    affine = pipeline.load_affine(vectors_ref, vectors, vectors_barrier)
    stats_gradient = StatsGradient(*(pipeline.spread(vectors.at[k]) for k in (3, 4)))
    dx_dz = pipelines.dx_dz_of(affine, stats_gradient, activation)
    pipeline.map(dx_dz, result_slots, results)


# Launches.


def _reduce(kernel, arrays, vectors, num_results, interpret, **options):
    tiles = _tiles(arrays, least_tiles=blocks.MIN_REDUCED_TILES)
    # Whole tiles: the copy of one row is clipped at the end of the array, not at that of the row.
    others = (((tiles.num_chunks, tiles.padded_width), jnp.float32),) * num_results
    scratch = (
        *pipelines.slots(tiles, arrays),
        *pipelines.vectors(tiles, 3, loaded=bool(vectors)),
        *pipelines.bounce(tiles),
    )
    partials = call(
        kernel, tiles, arrays, vectors, (), others, scratch, interpret=interpret, options=options
    )
    return tiles, [partial[:, : tiles.width] for partial in partials]


def _map(kernel, arrays, vectors, dtypes, interpret, **options):
    tiles = _tiles(arrays, dtypes)
    scratch = (
        *pipelines.slots(tiles, arrays),
        *pipelines.vectors(tiles, vectors[0].shape[0]),
        *pipelines.result_slots(tiles, dtypes),
    )
    return call(
        kernel, tiles, arrays, vectors, dtypes, (), scratch, interpret=interpret, options=options
    )


def _tiles(arrays, dtypes=(), **options):
    itemsizes = tuple(dtype.itemsize for dtype in (*(a.dtype for a in arrays), *dtypes))
    return blocks.pipelined(*arrays[0].shape, itemsizes, **options)


_kernels = _fwd_stats_kernel, _fwd_apply_kernel, _bwd_stats_kernel, _bwd_apply_kernel
_backend = gpu.Backend(*_kernels, blocks.warp_lanes, _reduce, _map)
fwd_stats, fwd_apply, bwd_stats, bwd_apply = (
    _backend.fwd_stats,
    _backend.fwd_apply,
    _backend.bwd_stats,
    _backend.bwd_apply,
)
