"""The four functions as Pallas Mosaic GPU kernels, for Hopper and newer.

A channels-last array is seen as [rows, channels], and folded so that its width is a multiple of 512 bytes.  A program walks
down a chunk of rows, tile by tile: copies of the tensor memory accelerator (TMA) bring the next tiles to shared memory while
four warps read this one, each lane 16 bytes of columns.  Beyond the end of an array such a copy writes nothing, and what it
reads from there is not used.
Reductions leave one partial result per chunk, and XLA merges the chunks: no atomics, the same bits every time.
"""

import functools
import math
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType

from jbn.kernels import blocks, pallas
from jbn.kernels.blocks import Ring
from jbn.kernels.seam import Affine, Pull, Stats, pre_activation, through_activation

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Multiples of 16 bytes in every dtype: TMA copies want that of the distance between rows.
ALIGNED = 8
# Data-center cards, then the others by series, as CUDA calls them.
_BEFORE_HOPPER = re.compile(
    r"\b(A(2|10G?|16|30|40|100|800)|L(4|20|40S?)|T4G?|[VP]100S?|P40?)\b"
    r"|\b(RTX (A?[2-4]\d{3}|A[56]000|[56]000 Ada)|GTX|TITAN|Quadro)\b"
)
_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    # Of a sum across warps: 4 rows of a whole tile in float32.
    reduction_scratch_bytes=16384,
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
    if pallas.fold_factor(rows, channels, ALIGNED) * channels % ALIGNED:
        return f"takes arrays whose rows can be put together to multiples of {ALIGNED} channels, not {rows} rows of {channels}"
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
    """Of one chunk: the mean as shift + offset, and m2. The shift is the mean of its first tile.

    A single far-off value among the rows of that tile moves the shift by 1 / block_rows of its distance only, in one chunk.
    """
    walk = _Walk.begin(ring, (x_ref,), **in_flight)
    zeros = walk.zeros()
    first = sum((walk.keep_rows(0, r, x) for r, (x,) in walk.registers(0)), start=zeros)
    _store(vectors.at[0], _column_sum(first, bounce) / walk.count(ring.block_rows))
    plgpu.commit_smem()
    shift = walk.spread(vectors.at[0])

    def add(t, sums):
        for r, (x,) in walk.registers(t):
            d = walk.keep_rows(t, r, x - shift)
            sums = sums[0] + d, sums[1] + d * d
        return sums

    total, squares = (_column_sum(s, bounce) for s in walk.each(add, (zeros, zeros)))
    offset = total / walk.count(ring.chunk_rows)
    _store(vectors.at[1], offset)
    _store(vectors.at[2], squares - total * offset)
    walk.store_partials(vectors, (shift_ref, offset_ref, m2_ref))


def _bwd_stats_kernel(*refs, ring: Ring, activation, bounce, vectors, arrived, **in_flight):
    """Of one chunk: the sums of dz and of dz * (x - shift)."""
    *arrays, vectors_ref, sum_dz_ref, sum_dz_x_ref = refs
    walk = _Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    zeros = walk.zeros()

    def add(t, sums):
        for r, (x, dy, *saved) in walk.registers(t):
            # Beyond the end x is read as zero, where the derivative of an activation may overflow.
            dz = walk.keep_rows(t, r, _dz(x, dy, affine, saved, activation))
            sums = sums[0] + dz, sums[1] + dz * (x - affine.shift)
        return sums

    for k, total in enumerate(walk.each(add, (zeros, zeros))):
        _store(vectors.at[k], _column_sum(total, bounce))
    walk.store_partials(vectors, (sum_dz_ref, sum_dz_x_ref))


def _fwd_apply_kernel(*refs, ring: Ring, activation, vectors, arrived, leaving, **in_flight):
    *arrays, vectors_ref, y_ref = refs
    walk = _Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)

    def y(x, *residual):
        z = pre_activation(x, affine, *residual)
        return (z if activation is None else activation(z),)

    walk.map(y, leaving, (y_ref,))


def _bwd_apply_kernel(*refs, ring: Ring, activation, vectors, arrived, leaving, num_inputs, **in_flight):
    arrays, vectors_ref, results = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    walk = _Walk.begin(ring, arrays, **in_flight)
    affine = walk.affine(vectors_ref, vectors, arrived)
    slope, intercept = (walk.spread(vectors.at[k]) for k in (3, 4))

    def dx_dz(x, dy, *saved):
        dz = _dz(x, dy, affine, saved, activation)
        return affine.gain * dz + ((x - affine.shift) * slope + intercept), dz

    walk.map(dx_dz, leaving, results)


def _dz(x, dy, affine, saved, activation):
    saved = saved[0] if saved else None
    if activation in _DERIVATIVES:
        return dy * _DERIVATIVES[activation](pre_activation(x, affine, saved))
    return through_activation(x, dy, affine, saved, activation)


def _silu_derivative(z):
    sigmoid = lax.logistic(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _gelu_derivative(z):
    """Of 0.5 z (1 + tanh(inner)), with inner = sqrt(2 / pi) (z + 0.044715 z^3), which jax.nn.gelu is by default."""
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * (z * z * z))
    inner_derivative = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * (z * z))
    tanh = jnp.tanh(inner)
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh * tanh) * inner_derivative


# Mosaic GPU has no lowering for what JAX adds tangents with (add_any), so these are written out.
_DERIVATIVES = {jax.nn.silu: _silu_derivative, jax.nn.gelu: _gelu_derivative}


class _Walk(NamedTuple):
    """The way of a program down its chunk, with `ring.steps` tiles of each array in flight."""

    ring: Ring
    arrays: tuple  # in global memory
    slots: tuple  # of each array: [steps, block_rows, block_cols] in shared memory
    landed: Any  # a barrier for each step
    chunk: Array
    column: Array  # where the tiles begin

    @classmethod
    def begin(cls, ring, arrays, slots, landed):
        """With its first tiles on their way, and the very first there."""
        walk = cls(ring, tuple(arrays), slots, landed, lax.axis_index("chunk"), lax.axis_index("column") * ring.block_cols)
        for t in range(min(ring.steps, ring.num_tiles)):
            pl.when(t < walk.num_tiles)(functools.partial(walk._fetch, t))
        plgpu.barrier_wait(landed.at[0])
        return walk

    @property
    def num_tiles(self):
        return jnp.minimum(self.ring.num_tiles, self.ring.row_tiles - self.chunk * self.ring.num_tiles)

    def each(self, body: Callable, carry):
        """The last of carry = body(t, carry) over the tiles, each of which has landed when it is called."""

        def step(t, carry):
            carry = body(t, carry)
            pl.when(t + self.ring.steps < self.num_tiles)(lambda: self._fetch(t + self.ring.steps))
            pl.when(t + 1 < self.num_tiles)(lambda: plgpu.barrier_wait(self.landed.at[self._slot(t + 1)]))
            return carry

        return lax.fori_loop(0, self.num_tiles, step, carry)

    def map(self, compute: Callable, leaving, results):
        """Store what compute(values of each array) gives for every tile; `leaving` is to results what slots are to arrays."""

        def step(t, carry):
            slot = self._slot(t)
            # All copies but those of the last steps - 1 tiles have left their slots.
            plgpu.wait_smem_to_gmem((self.ring.steps - 1) * len(results), wait_read_only=True)
            for r, values in self.registers(t):
                for slots, value in zip(leaving, compute(*values), strict=False):
                    _store(slots.at[slot, pl.ds(r, self.ring.register_rows)], value.astype(slots.dtype))
            plgpu.commit_smem()
            for slots, result in zip(leaving, results, strict=True):
                plgpu.copy_smem_to_gmem(slots.at[slot], result.at[self._rows(t), self._cols()])
            return carry

        self.each(step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def registers(self, t):
        """(row, [values of each array in float32]) for every part of tile t that fits registers."""
        ring = self.ring
        for r in range(0, ring.block_rows, ring.register_rows):
            parts = [slots.at[self._slot(t), pl.ds(r, ring.register_rows)] for slots in self.slots]
            yield r, [_load(part, self._layout()).astype(jnp.float32) for part in parts]

    def affine(self, vectors_ref, vectors, arrived):
        """The vectors [vectors, width] of these columns, the first three of them spread over registers."""
        plgpu.copy_gmem_to_smem(vectors_ref.at[:, self._cols()], vectors, arrived)
        plgpu.barrier_wait(arrived)
        shift, gain, bias = (self.spread(vectors.at[k]) for k in range(3))
        return Affine(shift, None, gain, bias)

    def spread(self, vector):
        """[block_cols] in shared memory as registers."""
        shape = (self.ring.register_rows, self.ring.block_cols)
        loaded = _load(vector, self._layout().reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(loaded, shape, (1,)), self._layout())

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((self.ring.register_rows, self.ring.block_cols), jnp.float32), self._layout())

    def keep_rows(self, t, r, values):
        """Zero for rows beyond the end."""
        if not self.ring.ragged_rows:
            return values
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=self._layout())
        return jnp.where(row < self.ring.rows - (self._row(t) + r), values, 0.0)

    def count(self, rows):
        """How many of the chunk's first rows there are."""
        return jnp.minimum(self.ring.rows - self._row(0), rows).astype(jnp.float32)

    def store_partials(self, vectors, partials):
        plgpu.commit_smem()
        for k, partial in enumerate(partials):
            plgpu.copy_smem_to_gmem(vectors.at[k], partial.at[self.chunk, self._cols()])
        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, t):
        slot = self._slot(t)
        for array, slots in zip(self.arrays, self.slots, strict=True):
            plgpu.copy_gmem_to_smem(array.at[self._rows(t), self._cols()], slots.at[slot], self.landed.at[slot])

    def _slot(self, t):
        return t % self.ring.steps if isinstance(t, int) else lax.rem(t, jnp.int32(self.ring.steps))

    def _row(self, t):
        return (self.chunk * self.ring.num_tiles + t) * self.ring.block_rows

    def _rows(self, t):
        return pl.ds(self._row(t), self.ring.block_rows)

    def _cols(self):
        return pl.ds(self.column, self.ring.block_cols)

    def _layout(self):
        return _layout(self.ring.block_cols, self.ring.vector)


def _layout(cols, vector):
    """Registers of a tile: a lane owns `vector` adjacent columns, a warp some rows, the four warps those below each other."""
    lane_rows = blocks.WARP * vector // cols
    rows = blocks.NUM_WARPS * lane_rows
    if lane_rows == 1:
        return plgpu.Layout.TILED(plgpu.Tiling(((rows, cols), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((rows, cols), (lane_rows, cols), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _column_sum(values, bounce):
    """The sum over rows. Across warps it wants 4 columns to a lane: by way of shared memory."""
    _store(bounce, values)
    plgpu.commit_smem()
    return jnp.sum(_load(bounce, _layout(min(values.shape[1], 4 * blocks.WARP), 4)), axis=0)


def _load(ref, layout):
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _store(ref, value):
    if jax.__version_info__ < (0, 12):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


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
        *_in_flight(ring, arrays),
        ("vectors", plgpu.SMEM((3, ring.block_cols), jnp.float32)),
        ("bounce", plgpu.SMEM((ring.register_rows, ring.block_cols), jnp.float32)),
        *([("arrived", plgpu.Barrier())] if vectors else []),
    )
    launch = _Launch(kernel, ring, (shape,) * number, (jnp.dtype(jnp.float32),) * number, scratch, _sorted(options), interpret)
    return [partial[:, : ring.width] for partial in _launch.bind(*arrays, *vectors, launch=launch)]


def _mapped(kernel, arrays, vectors, dtypes, interpret, **options):
    """The results [rows, width] of an elementwise pass."""
    ring = _ring(arrays, dtypes)
    dtypes = tuple(map(jnp.dtype, dtypes))
    scratch = (
        *_in_flight(ring, arrays),
        ("vectors", plgpu.SMEM((vectors.shape[0], ring.block_cols), jnp.float32)),
        ("arrived", plgpu.Barrier()),
        ("leaving", tuple(plgpu.SMEM(ring.slots, dtype) for dtype in dtypes)),
    )
    launch = _Launch(kernel, ring, (arrays[0].shape,) * len(dtypes), dtypes, scratch, _sorted(options), interpret)
    return _launch.bind(*arrays, vectors, launch=launch)


def _in_flight(ring, arrays):
    yield "slots", tuple(plgpu.SMEM(ring.slots, a.dtype) for a in arrays)
    yield "landed", plgpu.Barrier(num_arrivals=len(arrays), num_barriers=ring.steps)


def _sorted(options):
    return tuple(sorted(options.items()))


class _Launch(NamedTuple):
    """One kernel call; hashable, so that it can be the parameter of a primitive."""

    kernel: Callable
    ring: Ring
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple
    scratch: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    interpret: bool

    def __call__(self, *operands):
        if self.interpret and jax.__version_info__ < (0, 11):
            raise NotImplementedError("implementation 'mosaic_gpu/interpret' needs JAX 0.11: older interpreters know no TMA")
        body = functools.partial(self.kernel, ring=self.ring, **dict(self.options))
        body.__name__ = f"jbn{self.kernel.__name__.removesuffix('_kernel')}"
        return plgpu.kernel(
            body,
            out_type=[pallas.out_like(operands[0], *a) for a in zip(self.shapes, self.dtypes, strict=True)],
            scratch_types=dict(self.scratch),
            grid=(self.ring.num_chunks, self.ring.num_columns),
            grid_names=("chunk", "column"),
            compiler_params=_PARAMS,
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*operands)


# A launch is a primitive of its own for the sake of interpret mode, which has side effects on a state of its own: the
# transformations around it need not know.
_launch = Primitive("jbn_mosaic_gpu")
_launch.multiple_results = True


@_launch.def_impl
@functools.partial(jax.jit, static_argnames="launch")
def _(*operands, launch):
    return _launch.bind(*operands, launch=launch)


@_launch.def_abstract_eval
def _(*avals, launch):
    return jax.make_jaxpr(launch)(*avals).out_avals


def _batch(operands, dims, *, launch):
    batched = _Batched(launch, tuple(dims))
    return _launch.bind(*operands, launch=batched), [0] * len(launch.shapes)


class _Batched(NamedTuple):
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


def _lower(context, *operands, launch):
    unvarying = lambda avals: [aval.update(manual_axis_type=ManualAxisType()) for aval in avals]
    context = context.replace(avals_in=unvarying(context.avals_in), avals_out=unvarying(context.avals_out))
    run = functools.partial(_alone, launch, context.avals_out) if launch.interpret else launch
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


def _alone(launch, results, *operands):
    """Interpreted, one launch at a time in this process: the interpreter keeps one state for all."""

    def run(*operands):
        with _INTERPRETER:
            return [np.asarray(a) for a in _interpreted(*map(np.asarray, operands), launch=launch)]

    return jax.pure_callback(run, [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results], *operands)


_INTERPRETER = threading.Lock()


@functools.partial(jax.jit, static_argnames="launch")
def _interpreted(*operands, launch):
    return launch(*operands)


batching.primitive_batchers[_launch] = _batch
mlir.register_lowering(_launch, _lower)
