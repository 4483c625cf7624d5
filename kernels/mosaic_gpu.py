"""The four functions as Pallas Mosaic GPU kernels, for Hopper and newer.

A channels-last array is seen as [rows, channels], and folded so that its width is a multiple of 512 bytes.  A program walks
down a chunk of rows, tile by tile: copies of the tensor memory accelerator (TMA) bring the next tiles to shared memory while
four warps read this one, each lane 16 bytes of columns.  Beyond the end of an array such a copy writes nothing, and what it
reads from there is not used.
Reductions leave one partial result per chunk, and XLA merges the chunks: no atomics, the same bits every time.
"""

import math
import re
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks, pallas
from jbn.kernels.blocks import Ring
from jbn.kernels.mosaic_gpu_fused import bwd_fused, fwd_fused
from jbn.kernels.mosaic_gpu_walk import Launch, Walk, chunk_stats, column_sum, dz_of, in_flight, launch_p, options_of, store
from jbn.kernels.seam import Affine, Pull, Stats, pre_activation

__all__ = ["bwd_apply", "bwd_fused", "bwd_stats", "fwd_apply", "fwd_fused", "fwd_stats", "unsupported", "unsupported_device"]

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
    if pallas.fold_factor(rows, channels, unit) * channels % unit:
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


def _fwd_stats_kernel(x_ref, shift_ref, offset_ref, m2_ref, *, ring: Ring, bounce, vectors, **in_flight):
    """Of one chunk: the mean as shift + offset, and m2."""
    walk = Walk.begin(ring, (x_ref,), **in_flight)
    chunk_stats(walk, bounce, vectors)
    walk.store_partials(vectors, (shift_ref, offset_ref, m2_ref))


def _bwd_stats_kernel(*refs, ring: Ring, activation, bounce, vectors, arrived, **in_flight):
    """Of one chunk: the sums of dz and of dz * (x - shift)."""
    *arrays, vectors_ref, sum_dz_ref, sum_dz_x_ref = refs
    walk = Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    zeros = walk.zeros()

    def add(t, sums):
        for r, (x, dy, *saved) in walk.registers(t):
            # Beyond the end x is read as zero, where the derivative of an activation may overflow.
            dz = walk.keep_rows(t, r, dz_of(x, dy, affine, saved, activation))
            sums = sums[0] + dz, sums[1] + dz * (x - affine.shift)
        return sums

    for k, total in enumerate(walk.each(add, (zeros, zeros))):
        store(vectors.at[k], column_sum(total, bounce))
    walk.store_partials(vectors, (sum_dz_ref, sum_dz_x_ref))


def _fwd_apply_kernel(*refs, ring: Ring, activation, vectors, arrived, leaving, **in_flight):
    *arrays, vectors_ref, y_ref = refs
    walk = Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)

    def y(x, *residual):
        z = pre_activation(x, affine, *residual)
        return (z if activation is None else activation(z),)

    walk.map(y, leaving, (y_ref,))


def _bwd_apply_kernel(*refs, ring: Ring, activation, vectors, arrived, leaving, num_inputs, **in_flight):
    arrays, vectors_ref, results = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    walk = Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    slope, intercept = (walk.spread(vectors.at[k]) for k in (3, 4))

    def dx_dz(x, dy, *saved):
        dz = dz_of(x, dy, affine, saved, activation)
        return affine.gain * dz + ((x - affine.shift) * slope + intercept), dz

    walk.map(dx_dz, leaving, results)


# Launches.


def fwd_stats(x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...], interpret: bool) -> Stats:
    """Count, mean and m2 of each channel; the kernel finds shifts of its own."""
    del shift, axis
    assert weights is None, "weighted statistics run on XLA"
    factor = _fold_factor(x)
    arrays = [pallas.fold(x, factor)]
    ring = _ring(arrays, least_tiles=blocks.MIN_REDUCED_TILES)
    partials = _partials(_fwd_stats_kernel, ring, arrays, [], 3, interpret)
    rows = jnp.minimum(ring.chunk_rows, ring.rows - ring.chunk_rows * jnp.arange(ring.num_chunks))
    counts = jnp.repeat(rows.astype(jnp.float32), factor)
    return pallas.merge(counts, *pallas.unfold(partials, factor))


def fwd_apply(x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype, interpret: bool) -> Array:
    """y = activation((x - mean) * gain + bias + residual)."""
    del axis
    factor = _fold_factor(x)
    arrays = [pallas.fold(a, factor) for a in (x, residual) if a is not None]
    (y,) = _mapped(_fwd_apply_kernel, arrays, _stack(affine, (), factor), (dtype,), interpret, activation=activation)
    return y.reshape(x.shape)


def bwd_stats(x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation, interpret: bool) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - mean)."""
    del axis
    assert weights is None, "weighted sums run on XLA"
    factor = _fold_factor(x)
    arrays = [pallas.fold(a, factor) for a in (x, dy, saved) if a is not None]
    ring = _ring(arrays, least_tiles=blocks.MIN_REDUCED_TILES)
    vectors = [_stack(affine, (), factor)]
    partials = _partials(_bwd_stats_kernel, ring, arrays, vectors, 2, interpret, activation=activation)
    sum_dz, sum_dz_x = (p.sum(0) for p in pallas.unfold(partials, factor))
    return sum_dz, sum_dz_x - affine.offset * sum_dz


def bwd_apply(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    pull: Pull | None,
    saved,
    weights,
    axis,
    activation,
    residual_dtype,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """dx = gain * dz + intercept + slope * (x - mean), and dz itself for the residual where there is one."""
    del axis
    assert weights is None, "weighted gradients run on XLA"
    factor = _fold_factor(x)
    arrays = [pallas.fold(a, factor) for a in (x, dy, saved) if a is not None]
    slope, intercept = (jnp.zeros_like(affine.gain),) * 2 if pull is None else pull
    vectors = _stack(affine, (slope, intercept - slope * affine.offset), factor)
    # Without an activation dz is dy: nothing to compute.
    separate = residual_dtype is not None and activation is not None
    dtypes = (x.dtype, residual_dtype) if separate else (x.dtype,)
    options = {"activation": activation, "num_inputs": len(arrays)}
    dx, *dz = (a.reshape(x.shape) for a in _mapped(_bwd_apply_kernel, arrays, vectors, dtypes, interpret, **options))
    if residual_dtype is None:
        return dx, None
    return dx, dz[0] if separate else dy.astype(residual_dtype)


def _fold_factor(x):
    channels = x.shape[-1]
    return pallas.fold_factor(x.size // channels, channels, blocks.WARP * blocks.VECTOR_BYTES // x.dtype.itemsize)


def _ring(arrays, dtypes=(), **options):
    itemsizes = tuple(jnp.dtype(dtype).itemsize for dtype in (*(a.dtype for a in arrays), *dtypes))
    return blocks.ring(*arrays[0].shape, itemsizes, **options)


def _stack(affine, others, factor):
    """Per-channel vectors as one operand [vectors, width]: one small fusion of XLA's, however many there are."""
    shift, _, gain, bias = affine.folded()
    return jnp.tile(jnp.stack((shift, gain, bias, *others)), (1, factor))


def _partials(kernel, ring, arrays, vectors, number, interpret, **options):
    """The results [chunks, width] of a reduction."""
    # Of whole tiles: a copy of one row is clipped at the end of the array, not of the row.
    shape = (ring.num_chunks, ring.num_columns * ring.block_cols)
    scratch = (
        *in_flight(ring, arrays),
        ("vectors", plgpu.SMEM((3, ring.block_cols), jnp.float32)),
        ("bounce", plgpu.SMEM((ring.register_rows, ring.block_cols), jnp.float32)),
        *([("arrived", plgpu.Barrier())] if vectors else []),
    )
    launch = Launch(
        kernel, ring, (shape,) * number, (jnp.dtype(jnp.float32),) * number, scratch, options_of(options), interpret
    )
    return [partial[:, : ring.width] for partial in launch_p.bind(*arrays, *vectors, launch=launch)]


def _mapped(kernel, arrays, vectors, dtypes, interpret, **options):
    """The results [rows, width] of an elementwise pass."""
    ring = _ring(arrays, dtypes)
    dtypes = tuple(map(jnp.dtype, dtypes))
    scratch = (
        *in_flight(ring, arrays),
        ("vectors", plgpu.SMEM((vectors.shape[0], ring.block_cols), jnp.float32)),
        ("arrived", plgpu.Barrier()),
        ("leaving", tuple(plgpu.SMEM(ring.slots, dtype) for dtype in dtypes)),
    )
    launch = Launch(kernel, ring, (arrays[0].shape,) * len(dtypes), dtypes, scratch, options_of(options), interpret)
    return launch_p.bind(*arrays, vectors, launch=launch)
