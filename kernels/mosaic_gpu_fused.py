"""Forward and backward in one Mosaic GPU kernel each, with a barrier across the grid.

The barrier stands between the two passes over x.  The forward kernel keeps x in shared memory.  The
backward kernel reads x and dy, twice that size, which no H200 holds: it goes down them again, the
last tiles first, and finds them in the L2 cache (50 MB).

The barrier is a counter in global memory, which Pallas sets to zero for every launch.  Each program
adds 1 to it and waits until all have done so; hence all programs must run at once.  There are at
most as many as multiprocessors less `blocks.SM_MARGIN`, one on each.  Where other kernels hold more
multiprocessors than that margin, the programs wait until these kernels end.  Two kernels with such
a barrier at the same time, on two streams, could wait for each other for ever; XLA runs the
operations of a program on one stream.  If vmap made one launch with a larger grid of several, they
would share one counter; so such a launch is not `batchable`, and vmap launches one after the other.

JAX 0.10 has no semaphores with a memory scope; there both functions decline.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks
from jbn.kernels import mosaic_gpu_pipeline as pipelines
from jbn.kernels import shared_gpu as gpu
from jbn.kernels.blocks import PipelineTiles
from jbn.kernels.mosaic_gpu_launch import call
from jbn.kernels.mosaic_gpu_pipeline import Pipeline, column_sum, load, store
from jbn.kernels.seam import Affine, Device, Stats, StatsGradient


def _fwd_fused_kernel(
    *refs, tiles: PipelineTiles, activation, bounce, vectors, vectors_barrier, **in_flight
):
    *arrays, params_ref, y_ref, shifts_ref, offsets_ref, m2s_ref, shift_ref, offset_ref, m2_ref = (
        refs
    )
    pipeline = Pipeline.begin(tiles, arrays, **in_flight)
    pipelines.chunk_stats(pipeline, bounce, vectors)
    partials = (shifts_ref, offsets_ref, m2s_ref)
    pipeline.store_partials(vectors, partials)
    _wait_for_all_programs(tiles)
    _merge(pipeline, partials, bounce, vectors)
    totals = (shift_ref, offset_ref, m2_ref)
    pl.when(pipeline.chunk == 0)(lambda: pipeline.store_totals(vectors, totals))
    shift, offset, m2 = (pipeline.spread(vectors.at[k]) for k in range(3))
    pipeline.load_vectors(params_ref, vectors, vectors_barrier)
    scale, bias, eps = (pipeline.spread(vectors.at[k]) for k in range(3))
    gain = scale * lax.rsqrt(m2 * (1 / tiles.rows) + eps)
    affine = Affine(shift, gain, bias - offset * gain)
    pipeline.map_in_place(pipelines.y_of(affine, activation), y_ref)


def _bwd_fused_kernel(
    *refs,
    tiles: PipelineTiles,
    activation,
    num_inputs,
    bounce,
    vectors,
    vectors_barrier,
    result_slots,
    **in_flight,
):
    arrays, vectors_ref, refs = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    *results, sums_dz_ref, sums_dz_x_ref, sum_dz_ref, sum_dz_x_ref = refs
    pipeline = Pipeline.begin(tiles, arrays, **in_flight)
    affine = pipeline.load_affine(vectors_ref, vectors, vectors_barrier)
    offset, rstd, dmean, dvar = (pipeline.spread(vectors.at[k]) for k in range(3, 7))
    pipelines.chunk_sums(pipeline, affine, activation, bounce, vectors)
    partials = (sums_dz_ref, sums_dz_x_ref)
    pipeline.store_partials(vectors, partials)
    _wait_for_all_programs(tiles)
    sums = [
        sum((values[k] for _, values in _parts(pipeline, partials)), start=pipeline.zeros())
        for k in range(2)
    ]
    for k, total in enumerate(sums):
        store(vectors.at[k], column_sum(total, bounce))
    plgpu.commit_smem()
    sum_dz, sum_dz_x = (pipeline.spread(vectors.at[k]) for k in range(2))
    sum_dz_xc = sum_dz_x - offset * sum_dz
    slope = 2 / tiles.rows * (dvar - affine.gain * (rstd * rstd) * 0.5 * sum_dz_xc)
    intercept = 1 / tiles.rows * (dmean - affine.gain * sum_dz) - slope * offset
    totals = (sum_dz_ref, sum_dz_x_ref)
    pl.when(pipeline.chunk == 0)(lambda: pipeline.store_totals(vectors, totals))
    dx_dz = pipelines.dx_dz_of(affine, StatsGradient(slope, intercept), activation)
    pipeline.begin_again().map(dx_dz, result_slots, results)


def _wait_for_all_programs(tiles):
    """Wait until every program has come here; then what each wrote before, all can read."""
    if tiles.num_chunks == 1:
        return  # every program has all rows of its columns, and needs nothing of the others
    counter = pl.get_global(plgpu.SemaphoreType.REGULAR)
    plgpu.semaphore_signal(counter, 1, memory_scope="gpu")
    programs = tiles.num_chunks * tiles.num_columns
    plgpu.semaphore_wait(counter, programs, decrement=False, memory_scope="gpu")


def _merge(pipeline, partials, bounce, vectors):
    """Write shift, offset and m2 of all rows to `vectors`, by the formulas of `pallas.merge`."""
    rows, zeros = pipeline.tiles.rows, pipeline.zeros()
    mean = sum(
        (
            (shift + offset) * (count * (1 / rows))
            for count, (shift, offset, _) in _parts(pipeline, partials)
        ),
        start=zeros,
    )
    store(vectors.at[0], column_sum(mean, bounce))
    plgpu.commit_smem()
    merged = pipeline.spread(vectors.at[0])
    rest = m2 = zeros
    for count, (shift, offset, part_m2) in _parts(pipeline, partials):
        delta = (shift - merged) + offset
        rest = rest + delta * (count * (1 / rows))
        m2 = m2 + part_m2 + delta * delta * count
    rest, m2 = column_sum(rest, bounce), column_sum(m2, bounce)
    store(vectors.at[1], rest)
    store(vectors.at[2], jnp.maximum(m2 - rest * rest * rows, 0.0))
    plgpu.commit_smem()


def _parts(pipeline, partials):
    """Yield (rows of each part in float32, [the partials]), with as many parts as registers hold.

    Where there is no part, the values are zero.
    """
    tiles = pipeline.tiles
    shape = (tiles.register_rows, tiles.block_cols)
    for first in range(0, tiles.num_chunks, tiles.register_rows):
        chunk = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=pipeline.layout) + first
        count = jnp.clip(tiles.rows - chunk * tiles.chunk_rows, 0, tiles.chunk_rows)
        count = count.astype(jnp.float32)
        window = pl.ds(first, tiles.register_rows), pl.ds(pipeline.column, tiles.block_cols)
        parts = [load(ref.at[window], pipeline.layout) for ref in partials]
        yield count, [jnp.where(count > 0, part, 0.0) for part in parts]


def fwd_fused(
    x: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    eps: Array,
    *,
    axis,
    activation,
    dtype,
    device: Device,
    interpret: bool,
) -> tuple[Array, Stats] | None:
    """y and the statistics from one read of x and one write of y.

    None where shared memory does not hold x (and the residual), or JAX is too old.
    """
    del axis
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    arrays = [a.reshape(rows, channels) for a in (x, residual) if a is not None]
    itemsizes = tuple(a.dtype.itemsize for a in arrays)
    tiles = blocks.resident(rows, channels, itemsizes, _programs(device, interpret))
    if tiles is None or jnp.dtype(dtype) != x.dtype or not _HAS_SCOPED_SEMAPHORES:
        return None
    scratch = (
        *pipelines.slots(tiles, arrays),
        *pipelines.vectors(tiles, 3),
        *pipelines.bounce(tiles),
    )
    y, _, _, _, *totals = call(
        _fwd_fused_kernel,
        tiles,
        arrays,
        [jnp.stack((scale, bias, jnp.broadcast_to(eps, scale.shape)))],
        (x.dtype,),
        (*_partials(tiles, 3), *_totals(tiles, 3)),
        scratch,
        interpret=interpret,
        options={"activation": activation},
        batchable=tiles.num_chunks == 1,
    )
    shift, offset, m2 = (total[:channels] for total in totals)
    return y.reshape(x.shape), Stats(jnp.full_like(shift, float(rows)), shift, offset, m2)


def bwd_fused(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    offset: Array,
    rstd: Array,
    d_stats: tuple[Array, Array],
    saved: Array | None,
    axis,
    activation,
    residual_dtype,
    device: Device,
    interpret: bool,
) -> tuple[Array, Array | None, Array, Array] | None:
    """(dx, dresidual, sum dz, sum dz * (x - shift)) from one launch.

    None where the L2 cache does not hold what the kernel reads twice, or JAX is too old.

    Args:
        offset: the batch's mean is affine.shift + offset.
        d_stats: the cotangents of the batch's mean and biased variance.
        The others are as for the other functions of `seam`.
    """
    del axis
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    arrays = [a.reshape(rows, channels) for a in (x, dy, saved) if a is not None]
    dtypes = gpu.cotangent_dtypes(x, activation, residual_dtype)
    itemsizes = tuple(d.itemsize for d in (*(a.dtype for a in arrays), *dtypes))
    programs = _programs(device, interpret)
    tiles = blocks.twice(rows, channels, itemsizes, len(arrays), programs)
    if tiles is None or not _HAS_SCOPED_SEMAPHORES:
        return None
    scratch = (
        *pipelines.slots(tiles, arrays),
        *pipelines.vectors(tiles, 7),
        *pipelines.bounce(tiles),
        *pipelines.result_slots(tiles, dtypes),
    )
    *cotangents, _, _, sum_dz, sum_dz_x = call(
        _bwd_fused_kernel,
        tiles,
        arrays,
        [jnp.stack((*affine, offset, rstd, *d_stats))],
        dtypes,
        (*_partials(tiles, 2), *_totals(tiles, 2)),
        scratch,
        interpret=interpret,
        options={"activation": activation, "num_inputs": len(arrays)},
        batchable=tiles.num_chunks == 1,
    )
    dx, dresidual = gpu.cotangents(cotangents, x, dy, residual_dtype)
    return dx, dresidual, sum_dz[:channels], sum_dz_x[:channels]


_HAS_SCOPED_SEMAPHORES = jax.__version_info__ >= (0, 11)


def _programs(device, interpret):
    """How many programs may wait for each other, as `blocks.resident` takes it.

    Interpret mode knows no barrier across the grid, so there no program may wait for another.
    """
    return None if interpret else device.cores - blocks.SM_MARGIN


def _partials(tiles, number):
    """Shape and dtype of results with a row for each chunk, in whole tiles of registers."""
    rows = -(-tiles.num_chunks // tiles.register_rows) * tiles.register_rows
    return (((rows, tiles.padded_width), jnp.float32),) * number


def _totals(tiles, number):
    return (((tiles.padded_width,), jnp.float32),) * number
