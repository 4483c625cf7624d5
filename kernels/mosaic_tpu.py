"""The four functions as Pallas kernels for TPU, and forward and backward in one kernel each where a slab fits VMEM.

For batch norm on its own: beside a convolution XLA's fusions are better (xla_tpu.py).  A block of channels meets its rows one
block after the other, so sums stay in VMEM and are always taken in the same order.

x is read as [outer, inner, channels] or [outer, channels, inner] (tpu_blocks), whichever is its memory as XLA:TPU lays it
out; k per-channel vectors are a [k, 1, channels] or [k, channels, 1] array.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbn.kernels import tpu_blocks
from jbn.kernels.pallas import channels_last, out_like
from jbn.kernels.seam import Affine, Device, Pull, Stats, pre_activation, through_activation
from jbn.kernels.tpu_blocks import RowBlocks


def unsupported(shape: tuple[int, ...], dtype, axis: tuple[int, ...]) -> str | None:
    """Why these kernels cannot take x, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {jnp.dtype(dtype).name}"
    return channels_last(shape, axis)


def _fwd_stats_kernel(x_ref, shift_ref, offset_ref, m2_ref, *, blocks):
    """Each block of rows about the mean of all before it, the first about its own.

    If n rows lie at a distance D from the mean of at least n others, taking their squares about that mean loses some
    roundings of n D^2; but m2 of the whole is then n D^2 / 2 or more, so the digits lost are not digits of the result.
    """
    place = _place(blocks)

    @pl.when(place.first)
    def _():
        (total,) = _sums(lambda at: (_load(x_ref, at),), blocks, place)
        # The maximum changes nothing, but x - total / count would become one rounding less where XLA:CPU interprets this.
        shift_ref[...] = jnp.maximum(total / place.count, jnp.finfo(total.dtype).min)
        offset_ref[...] = jnp.zeros(total.shape, total.dtype)
        m2_ref[...] = jnp.zeros(total.shape, total.dtype)

    shift, offset = shift_ref[...], offset_ref[...]
    center = shift + offset

    def terms(at):
        centered = _load(x_ref, at) - center
        return centered, jnp.square(centered)

    total, squares = _sums(terms, blocks, place)
    delta = (center - shift) + total / place.count - offset
    share = place.count / (place.before + place.count)
    offset_ref[...] = offset + delta * share
    m2_ref[...] += jnp.maximum(squares - total * (total / place.count), 0) + jnp.square(delta) * (place.before * share)


def _fwd_apply_kernel(x_ref, residual_ref, affine_ref, y_ref, *, blocks, activation):
    affine = Affine(*_vectors(affine_ref)).folded()

    def body(at):
        z = pre_activation(_load(x_ref, at), affine, _load(residual_ref, at))
        y_ref[at] = (z if activation is None else activation(z)).astype(y_ref.dtype)

    _for_chunks(body, blocks)


def _bwd_stats_kernel(x_ref, dy_ref, saved_ref, affine_ref, sum_dz_ref, sum_dz_xc_ref, *, blocks, activation):
    place = _place(blocks)
    affine = Affine(*_vectors(affine_ref))

    @pl.when(place.first)
    def _():
        sum_dz_ref[...] = jnp.zeros(sum_dz_ref.shape, sum_dz_ref.dtype)
        sum_dz_xc_ref[...] = jnp.zeros(sum_dz_xc_ref.shape, sum_dz_xc_ref.dtype)

    def terms(at):
        x, dy, saved = (_load(ref, at) for ref in (x_ref, dy_ref, saved_ref))
        dz = through_activation(x, dy, affine, saved, activation)
        return dz, dz * (x - affine.shift)

    sum_dz, sum_dz_x = _sums(terms, blocks, place)
    sum_dz_ref[...] += sum_dz
    sum_dz_xc_ref[...] += sum_dz_x - affine.offset * sum_dz


def _bwd_apply_kernel(x_ref, dy_ref, saved_ref, affine_ref, pull_ref, dx_ref, dresidual_ref, *, blocks, activation):
    affine = Affine(*_vectors(affine_ref))
    through_stats = None if pull_ref is None else Affine(affine.shift, affine.offset, *_vectors(pull_ref)).folded()

    def body(at):
        x, dy, saved = (_load(ref, at) for ref in (x_ref, dy_ref, saved_ref))
        dz = through_activation(x, dy, affine, saved, activation)
        dx = affine.gain * dz
        if through_stats is not None:
            dx = dx + pre_activation(x, through_stats)
        dx_ref[at] = dx.astype(dx_ref.dtype)
        if dresidual_ref is not None:
            dresidual_ref[at] = dz.astype(dresidual_ref.dtype)

    _for_chunks(body, blocks)


def _fwd_fused_kernel(
    x_ref, residual_ref, params_ref, eps_ref, y_ref, shift_ref, offset_ref, m2_ref, affine_ref, *, blocks, activation
):
    """All rows of a block of channels: y after the statistics, from one read of x."""
    _fwd_stats_kernel(x_ref, shift_ref, offset_ref, m2_ref, blocks=blocks)
    rstd = lax.rsqrt(m2_ref[...] / (blocks.outer * blocks.inner) + eps_ref[0])
    affine_ref[0:1] = shift_ref[...]
    affine_ref[1:2] = offset_ref[...]
    affine_ref[2:3] = params_ref[0:1] * rstd
    affine_ref[3:4] = params_ref[1:2]
    _fwd_apply_kernel(x_ref, residual_ref, affine_ref, y_ref, blocks=blocks, activation=activation)


def _bwd_fused_kernel(
    x_ref,
    dy_ref,
    saved_ref,
    affine_ref,
    through_ref,
    dx_ref,
    dresidual_ref,
    sum_dz_ref,
    sum_dz_xc_ref,
    pull_ref,
    *,
    blocks,
    activation,
):
    """All rows of a block of channels: dx after the sums, from one read of x and dy. through: rstd, dmean, dvar."""
    _bwd_stats_kernel(x_ref, dy_ref, saved_ref, affine_ref, sum_dz_ref, sum_dz_xc_ref, blocks=blocks, activation=activation)
    gain, rstd = affine_ref[2:3], through_ref[0:1]
    dmean = through_ref[1:2] - gain * sum_dz_ref[...]
    dvar = through_ref[2:3] - gain * jnp.square(rstd) / 2 * sum_dz_xc_ref[...]
    count = blocks.outer * blocks.inner
    pull_ref[0:1] = 2 * dvar / count
    pull_ref[1:2] = dmean / count
    _bwd_apply_kernel(
        x_ref, dy_ref, saved_ref, affine_ref, pull_ref, dx_ref, dresidual_ref, blocks=blocks, activation=activation
    )


class _Place(NamedTuple):
    """Where in the array this step of the grid is. Counts are float32 scalars: rows of the block that exist, rows before."""

    first: Array
    count: Array
    before: Array
    left_outer: Array  # rows from the start of the block to the end of the array
    left_inner: Array


def _place(blocks):
    i, j = pl.program_id(1), pl.program_id(2)
    left_outer = blocks.outer - i * blocks.block_outer
    left_inner = blocks.inner - j * blocks.block_inner
    here_outer = jnp.minimum(left_outer, blocks.block_outer)
    here_inner = jnp.minimum(left_inner, blocks.block_inner)
    # All inner blocks of an outer row come before the next outer row.
    before = i * (blocks.block_outer * blocks.inner) + here_outer * (j * blocks.block_inner)
    to_float = lambda n: n.astype(jnp.float32)
    return _Place((i == 0) & (j == 0), to_float(here_outer * here_inner), to_float(before), left_outer, left_inner)


def _for_chunks(body, blocks):
    """body(index) for the index of every chunk in a block."""
    lax.fori_loop(0, _num_chunks(blocks), lambda k, _: body(_index(k, blocks)[0]), None)


def _sums(terms, blocks, place):
    """Sums over the rows of this block of the arrays that terms(index) gives for a chunk, as vectors."""

    def chunk_sums(k):
        index, outer, inner = _index(k, blocks)
        arrays = terms(index)
        if blocks.ragged:
            iota = lambda start, axis: start + lax.broadcasted_iota(jnp.int32, blocks.chunk, axis)
            exists = (iota(outer, 0) < place.left_outer) & (iota(inner, _inner_axis(blocks)) < place.left_inner)
            arrays = tuple(jnp.where(exists, a, 0) for a in arrays)
        return tuple(a.sum(0, keepdims=True).sum(_inner_axis(blocks), keepdims=True) for a in arrays)

    add = lambda k, sums: jax.tree.map(jnp.add, sums, chunk_sums(k))
    return lax.fori_loop(1, _num_chunks(blocks), add, chunk_sums(0))


def _num_chunks(blocks):
    return blocks.block_outer // blocks.chunk_outer * (blocks.block_inner // blocks.chunk_inner)


def _index(k, blocks):
    """Index of chunk k in a block, and where it starts."""
    per_outer = blocks.block_inner // blocks.chunk_inner
    if per_outer == 1:
        outer, inner, inner_index = k * blocks.chunk_outer, 0, slice(None)
    else:
        outer, inner = k // per_outer * blocks.chunk_outer, k % per_outer * blocks.chunk_inner
        inner_index = pl.ds(inner if isinstance(inner, int) else pl.multiple_of(inner, blocks.chunk_inner), blocks.chunk_inner)
    return blocks.arranged(pl.ds(outer, blocks.chunk_outer), inner_index, slice(None)), outer, inner


def _inner_axis(blocks):
    return blocks.arranged(0, 1, 2).index(1)


def _load(ref, at):
    return None if ref is None else ref[at].astype(jnp.float32)


def _vectors(ref):
    """The vectors of ref, each to broadcast against a chunk."""
    return (ref[k : k + 1] for k in range(ref.shape[0]))


def fwd_stats(x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...], interpret: bool) -> Stats:
    """Count, mean and m2 of each channel, by one read of x. No guess of the mean is needed."""
    del shift
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = tpu_blocks.stream(x.shape, x.dtype.itemsize)
    found = _call(_fwd_stats_kernel, (_view(x, blocks),), (_vector(x, blocks),) * 3, blocks, sums=True, interpret=interpret)
    return _stats(found, blocks)


def fwd_apply(x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype, interpret: bool) -> Array:
    """y = activation((x - mean) * gain + bias + residual)."""
    assert axis == (x.ndim - 1,)
    blocks = tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(_fwd_apply_kernel, activation=activation)
    operands = (_view(x, blocks), _view(residual, blocks), _stacked(affine, blocks))
    (y,) = _call(body, operands, (_rows(x, blocks, dtype),), blocks, interpret=interpret)
    return _unview(y, x, blocks)


def bwd_stats(x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation, interpret: bool) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - mean), by one read of x and dy."""
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(_bwd_stats_kernel, activation=activation)
    operands = (*(_view(a, blocks) for a in (x, dy, saved)), _stacked(affine, blocks))
    sum_dz, sum_dz_xc = _call(body, operands, (_vector(x, blocks),) * 2, blocks, sums=True, interpret=interpret)
    return sum_dz.reshape(-1), sum_dz_xc.reshape(-1)


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
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(_bwd_apply_kernel, activation=activation)
    operands = (
        *(_view(a, blocks) for a in (x, dy, saved)),
        _stacked(affine, blocks),
        None if pull is None else _stacked(pull, blocks),
    )
    results = (_rows(x, blocks, x.dtype), None if residual_dtype is None else _rows(x, blocks, residual_dtype))
    dx, dresidual = _call(body, operands, results, blocks, interpret=interpret)
    return _unview(dx, x, blocks), _unview(dresidual, x, blocks)


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
    """y and the statistics by one read of x and one write of y, or None where 128 channels do not fit VMEM."""
    assert axis == (x.ndim - 1,)
    arrays, vmem_bytes = 2 if residual is None else 3, tpu_blocks.VMEM_BYTES.get(device.kind, 0)
    blocks = tpu_blocks.resident(x.shape, _itemsize(x, residual, dtype), arrays, vmem_bytes)
    if blocks is None:
        return None
    body = functools.partial(_fwd_fused_kernel, activation=activation)
    operands = (_view(x, blocks), _view(residual, blocks), _stacked((scale, bias), blocks), jnp.reshape(eps, (1,)))
    results = (_rows(x, blocks, dtype), *(_vector(x, blocks),) * 3)
    y, *found = _call(body, operands, results, blocks, scratch=4, vmem_bytes=vmem_bytes, interpret=interpret)
    return _unview(y, x, blocks), _stats(found, blocks)


def bwd_fused(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    rstd: Array,
    d_stats: tuple[Array, Array],
    saved: Array | None,
    axis,
    activation,
    residual_dtype,
    device: Device,
    interpret: bool,
) -> tuple[Array, Array | None, Array, Array] | None:
    """(dx, dresidual, sum dz, sum dz * (x - mean)) by one read of x and dy, or None where 128 channels do not fit VMEM.

    d_stats: the cotangents of the batch's mean and biased variance.
    """
    assert axis == (x.ndim - 1,)
    vmem_bytes = tpu_blocks.VMEM_BYTES.get(device.kind, 0)
    arrays = 3 + (saved is not None) + (residual_dtype is not None)
    blocks = tpu_blocks.resident(x.shape, _itemsize(x, dy, saved, residual_dtype), arrays, vmem_bytes)
    if blocks is None:
        return None
    body = functools.partial(_bwd_fused_kernel, activation=activation)
    operands = (*(_view(a, blocks) for a in (x, dy, saved)), _stacked(affine, blocks), _stacked((rstd, *d_stats), blocks))
    results = (
        _rows(x, blocks, x.dtype),
        None if residual_dtype is None else _rows(x, blocks, residual_dtype),
        *(_vector(x, blocks),) * 2,
    )
    dx, dresidual, sum_dz, sum_dz_xc = _call(
        body, operands, results, blocks, scratch=2, vmem_bytes=vmem_bytes, interpret=interpret
    )
    return _unview(dx, x, blocks), _unview(dresidual, x, blocks), sum_dz.reshape(-1), sum_dz_xc.reshape(-1)


def _call(body, operands, results, blocks: RowBlocks, *, interpret, sums=False, scratch=0, vmem_bytes=None):
    """Run body on every block: views by rows, stacked vectors by channels only, rank 1 whole; None stays None.

    sums: whether results are gathered over the rows, which then are taken in sequence.
    scratch: vectors of scratch memory for body.
    """
    vectors = lambda k: blocks.arranged(k, 1, blocks.block_channels)
    by_channels = lambda c, i, j: blocks.arranged(0, 0, c)

    def spec(array):
        if array.ndim == 1:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        if array.shape == blocks.view:
            return pl.BlockSpec(blocks.block, lambda c, i, j: blocks.arranged(i, j, c))
        return pl.BlockSpec(vectors(array.shape[0]), by_channels)

    in_specs, out_specs = jax.tree.map(spec, (operands, results))
    order = "arbitrary" if sums else "parallel"
    return pl.pallas_call(
        functools.partial(body, blocks=blocks),
        grid=blocks.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(vectors(scratch), jnp.float32)] if scratch else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", order, order), vmem_limit_bytes=vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=10 * math.prod(blocks.view),
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, results))),
        ),
        interpret=interpret,
        name=getattr(body, "func", body).__name__.strip("_").removesuffix("_kernel"),
    )(*operands)


def _view(array, blocks):
    return None if array is None else array.transpose(blocks.order).reshape(blocks.view)


def _unview(array, x, blocks) -> Any:
    if array is None:
        return None
    transposed = array.reshape(tuple(x.shape[a] for a in blocks.order))
    return transposed.transpose(tuple(map(blocks.order.index, range(x.ndim))))


def _rows(x, blocks, dtype):
    return out_like(x, blocks.view, dtype)


def _vector(x, blocks):
    return out_like(x, blocks.arranged(1, 1, blocks.channels), jnp.float32)


def _stacked(vectors, blocks):
    return jnp.stack(vectors).reshape(blocks.arranged(len(vectors), 1, blocks.channels))


def _stats(found, blocks):
    shift, offset, m2 = (v.reshape(-1) for v in found)
    return Stats(jnp.full_like(shift, blocks.outer * blocks.inner), shift, offset, m2)


def _itemsize(*arrays_or_dtypes):
    """Of the widest; None is skipped."""
    return max(jnp.dtype(getattr(a, "dtype", a)).itemsize for a in arrays_or_dtypes if a is not None)
