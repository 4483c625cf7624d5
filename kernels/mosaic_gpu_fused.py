"""Forward and backward in one Mosaic GPU kernel each, with a barrier across the grid between the
two passes over x.

The forward kernel keeps x in shared memory.  The backward kernel has x and dy twice that size,
which no H200 holds: it walks down them again, the last tiles first, and finds them in the
    second-level cache (50 MB).

The barrier is a counter in global memory, zero at every launch (Pallas zeroes it), which each
program adds 1 to and waits for.
All programs must run at once: there are no more of them than multiprocessors less
    `blocks.SM_MARGIN`, one on each.  Where
other kernels hold more multiprocessors than that margin, the programs that run wait until these
end.  Two such kernels at once,
on two streams, could wait for each other for ever: XLA runs the operations of one program on one
    stream.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks
from jbn.kernels import shared_gpu as gpu
from jbn.kernels.blocks import Ring
from jbn.kernels.mosaic_gpu_launch import Launch, launch_p
from jbn.kernels.mosaic_gpu_walk import (
    Walk,
    chunk_stats,
    chunk_sums,
    column_sum,
    dx_dz_of,
    in_flight,
    load,
    store,
    y_of,
)
from jbn.kernels.seam import Affine, Device, Stats


def _fwd_fused_kernel(*refs, ring: Ring, activation, bounce, vectors, arrived, **in_flight):
    *arrays, params_ref, y_ref, shifts_ref, offsets_ref, m2s_ref, shift_ref, offset_ref, m2_ref = (
        refs
    )
    walk = Walk.begin(ring, arrays, **in_flight)
    chunk_stats(walk, bounce, vectors)
    partials = (shifts_ref, offsets_ref, m2s_ref)
    walk.store_partials(vectors, partials)
    _barrier(ring)
    _merge(walk, partials, bounce, vectors)
    pl.when(walk.chunk == 0)(lambda: walk.store_whole(vectors, (shift_ref, offset_ref, m2_ref)))
    shift, offset, m2 = (walk.spread(vectors.at[k]) for k in range(3))
    walk.load_vectors(params_ref, vectors, arrived)
    scale, bias, eps = (walk.spread(vectors.at[k]) for k in range(3))
    gain = scale * lax.rsqrt(m2 * (1 / ring.rows) + eps)
    walk.rewrite(y_of(Affine(shift, gain, bias - offset * gain), activation), y_ref)


def _bwd_fused_kernel(
    *refs, ring: Ring, activation, num_inputs, bounce, vectors, arrived, leaving, **in_flight
):
    arrays, vectors_ref, refs = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    *results, sums_dz_ref, sums_dz_x_ref, sum_dz_ref, sum_dz_x_ref = refs
    walk = Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    offset, rstd, dmean, dvar = (walk.spread(vectors.at[k]) for k in range(3, 7))
    chunk_sums(walk, affine, activation, bounce, vectors)
    partials = (sums_dz_ref, sums_dz_x_ref)
    walk.store_partials(vectors, partials)
    _barrier(ring)
    totals = [
        sum((values[k] for _, values in _parts(walk, partials)), start=walk.zeros())
        for k in range(2)
    ]
    for k, total in enumerate(totals):
        store(vectors.at[k], column_sum(total, bounce))
    plgpu.commit_smem()
    sum_dz, sum_dz_x = (walk.spread(vectors.at[k]) for k in range(2))
    sum_dz_xc = sum_dz_x - offset * sum_dz
    slope = 2 / ring.rows * (dvar - affine.gain * (rstd * rstd) * 0.5 * sum_dz_xc)
    intercept = 1 / ring.rows * (dmean - affine.gain * sum_dz) - slope * offset
    pl.when(walk.chunk == 0)(lambda: walk.store_whole(vectors, (sum_dz_ref, sum_dz_x_ref)))
    walk.again().map(dx_dz_of(affine, slope, intercept, activation), leaving, results)


def _barrier(ring):
    """Until all programs are here. What each wrote before, all can read after."""
    if ring.num_chunks == 1:
        return  # every program has all rows of its columns
    here = pl.get_global(plgpu.SemaphoreType.REGULAR)
    plgpu.semaphore_signal(here, 1, memory_scope="gpu")
    plgpu.semaphore_wait(
        here, ring.num_chunks * ring.num_columns, decrement=False, memory_scope="gpu"
    )


def _merge(walk, partials, bounce, vectors):
    """Into `vectors`: shift, offset and m2 of the whole, as `pallas.merge` does it."""
    rows, zeros = walk.ring.rows, walk.zeros()
    mean = sum(
        (
            (shift + offset) * (count * (1 / rows))
            for count, (shift, offset, _) in _parts(walk, partials)
        ),
        start=zeros,
    )
    store(vectors.at[0], column_sum(mean, bounce))
    plgpu.commit_smem()
    merged = walk.spread(vectors.at[0])
    rest = m2 = zeros
    for count, (shift, offset, part_m2) in _parts(walk, partials):
        delta = (shift - merged) + offset
        rest = rest + delta * (count * (1 / rows))
        m2 = m2 + part_m2 + delta * delta * count
    rest, m2 = column_sum(rest, bounce), column_sum(m2, bounce)
    store(vectors.at[1], rest)
    store(vectors.at[2], jnp.maximum(m2 - rest * rest * rows, 0.0))
    plgpu.commit_smem()


def _parts(walk, partials):
    """(rows of each part in float32, [the partials]) in registers, zero where there is no part."""
    ring = walk.ring
    for first in range(0, ring.num_chunks, ring.register_rows):
        chunk = (
            plgpu.broadcasted_iota(
                jnp.int32, (ring.register_rows, ring.block_cols), 0, layout=walk.layout
            )
            + first
        )
        count = jnp.clip(ring.rows - chunk * ring.chunk_rows, 0, ring.chunk_rows).astype(
            jnp.float32
        )
        parts = [
            load(
                ref.at[pl.ds(first, ring.register_rows), pl.ds(walk.column, ring.block_cols)],
                walk.layout,
            )
            for ref in partials
        ]
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
    """y and the statistics by one read of x and one write of y, or None where shared memory does not hold x (and residual)."""
    del axis
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    arrays = [a.reshape(rows, channels) for a in (x, residual) if a is not None]
    itemsizes = tuple(a.dtype.itemsize for a in arrays)
    ring = blocks.resident(
        rows, channels, itemsizes, _programs(device, interpret, channels, itemsizes[0])
    )
    if ring is None or jnp.dtype(dtype) != x.dtype:
        return None
    scratch = (*in_flight(ring, arrays), *_vectors(ring, 3))
    shapes = (arrays[0].shape, *(_partial_shape(ring),) * 3, *((channels,),) * 3)
    dtypes = (x.dtype, *(jnp.dtype(jnp.float32),) * 6)
    launch = Launch(
        _fwd_fused_kernel, ring, shapes, dtypes, scratch, (("activation", activation),), interpret
    )
    params = jnp.stack((scale, bias, jnp.broadcast_to(eps, scale.shape)))
    y, _, _, _, shift, offset, m2 = launch_p.bind(*arrays, params, launch=launch)
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
    """(dx, dresidual, sum dz, sum dz * (x - mean)) by one launch, or None where the cache does not
    hold what it reads twice.

    d_stats: the cotangents of the batch's mean and biased variance.
    """
    del axis
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    arrays = [a.reshape(rows, channels) for a in (x, dy, saved) if a is not None]
    dtypes = gpu.cotangent_dtypes(x, activation, residual_dtype)
    itemsizes = tuple(d.itemsize for d in (*(a.dtype for a in arrays), *dtypes))
    ring = blocks.twice(
        rows, channels, itemsizes, len(arrays), _programs(device, interpret, channels, itemsizes[0])
    )
    if ring is None:
        return None
    leaving = ("leaving", tuple(plgpu.SMEM(ring.slots, d) for d in dtypes))
    scratch = (*in_flight(ring, arrays), *_vectors(ring, 7), leaving)
    shapes = (*(arrays[0].shape,) * len(dtypes), *(_partial_shape(ring),) * 2, *((channels,),) * 2)
    options = (("activation", activation), ("num_inputs", len(arrays)))
    all_dtypes = (*dtypes, *(jnp.dtype(jnp.float32),) * 4)
    launch = Launch(_bwd_fused_kernel, ring, shapes, all_dtypes, scratch, options, interpret)
    vectors = jnp.stack((*affine, offset, rstd, *d_stats))
    *large, _, _, sum_dz, sum_dz_x = launch_p.bind(*arrays, vectors, launch=launch)
    return *gpu.cotangents(large, x, dy, residual_dtype), sum_dz, sum_dz_x


def _programs(device, interpret, channels, itemsize):
    """How many run at once; in interpret mode, which knows no barriers across the grid, one for each tile of columns."""
    if not interpret:
        return device.cores - blocks.SM_MARGIN
    return channels // math.gcd(channels, blocks.warp_lanes(itemsize))


def _partial_shape(ring):
    """[chunks, channels], of whole register tiles."""
    return -(-ring.num_chunks // ring.register_rows) * ring.register_rows, ring.width


def _vectors(ring, number):
    yield "vectors", plgpu.SMEM((number, ring.block_cols), jnp.float32)
    yield "bounce", plgpu.SMEM((ring.register_rows, ring.block_cols), jnp.float32)
    yield "arrived", plgpu.Barrier()
