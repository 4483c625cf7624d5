"""The four functions as Pallas Triton kernels, for Ampere and newer.

A channels-last array is seen as [rows, channels], and rows are put side by side until the width is
a multiple of 128 bytes (`shared_pallas.widen`).  Programs go down tiles.  Reductions leave one
partial result per chunk of rows, and XLA merges the chunks: there are no atomics, so the same bits
come out every time.  `interpret=True` runs the kernels on any platform.
"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.interpreters import mlir

from jbn.kernels import blocks
from jbn.kernels import shared_gpu as gpu
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.blocks import Tiles
from jbn.kernels.seam import (
    Affine,
    StatsGradient,
    input_cotangent,
    pre_activation,
    through_activation,
)

# Data-center cards, then the others by series, as CUDA calls them.
_BEFORE_AMPERE = re.compile(
    r"\b(T4G?|[MPV]100S?|[MP](4|6|10|40|60))\b|\b(RTX 20\d{2}|Quadro RTX|GTX|TITAN)\b"
)


def unsupported(shape: tuple[int, ...], dtype: Any, axis: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take an x of this shape, dtype and feature axes; None if they can.

    The reason is a phrase that goes on after "implementation 'triton'".
    """
    return gpu.unsupported(shape, dtype, axis, blocks.lanes)


def unsupported_device(kind: str) -> str | None:
    """Why the kernels cannot be lowered for such a device, a phrase as above; None if they can."""
    if _BEFORE_AMPERE.search(kind) is None:
        return None
    return (
        f"needs compute capability 8.0 (Ampere) or newer, which {kind} has not: "
        "use implementation=None"
    )


# Kernel bodies.


def _fwd_stats_kernel(x_ref, shift_ref, offset_ref, m2_ref, *, tiles: Tiles):
    """The statistics of one chunk: the mean as shift + offset, and m2.

    The shift is the mean of the chunk's first tile.  A single outlier among the rows of that tile
    moves the shift by 1 / block_rows of its distance only, and only in this chunk.
    """
    program = _Program.of_this_launch(tiles)
    shift = _float32(program.load(x_ref, 0)).sum(0) / program.count(tiles.block_rows)

    def add(t, x, sums):
        d = program.keep_rows(t, _float32(x) - shift[None])
        return sums[0] + d, sums[1] + d * d

    total, squares = program.accumulate(add, x_ref)
    offset = total / program.count(tiles.chunk_rows)
    program.store_partial(shift_ref, shift)
    program.store_partial(offset_ref, offset)
    program.store_partial(m2_ref, squares - total * offset)


def _bwd_stats_kernel(*refs, tiles: Tiles, activation):
    """The sums over one chunk of dz and of dz * (x - shift)."""
    *arrays, vectors_ref, sum_dz_ref, sum_dz_x_ref = refs
    program = _Program.of_this_launch(tiles)
    affine = program.load_affine(vectors_ref)

    def add(t, x, dy, *saved_and_sums):
        *saved, sums = saved_and_sums
        # The rows beyond the end read as x = 0, where an activation's derivative may overflow.
        dz = program.keep_rows(t, _dz(x, dy, affine, saved, activation))
        return sums[0] + dz, sums[1] + dz * (_float32(x) - affine.shift)

    total, total_x = program.accumulate(add, *arrays)
    program.store_partial(sum_dz_ref, total)
    program.store_partial(sum_dz_x_ref, total_x)


def _fwd_apply_kernel(*refs, tiles: Tiles, activation):
    *arrays, vectors_ref, y_ref = refs
    program = _Program.of_this_launch(tiles)
    affine = program.load_affine(vectors_ref)
    loaded = [[program.load(ref, t) for ref in arrays] for t in range(tiles.num_tiles)]
    for t, (x, *residual) in enumerate(loaded):
        z = pre_activation(_float32(x), affine, *map(_float32, residual))
        program.store(y_ref, t, z if activation is None else activation(z))


def _bwd_apply_kernel(*refs, tiles: Tiles, activation, num_inputs):
    arrays, vectors_ref, (dx_ref, *dz_refs) = (
        refs[:num_inputs],
        refs[num_inputs],
        refs[num_inputs + 1 :],
    )
    program = _Program.of_this_launch(tiles)
    affine = program.load_affine(vectors_ref)
    stats_gradient = StatsGradient(*program.load_vectors(vectors_ref, 3, 5))
    loaded = [[program.load(ref, t) for ref in arrays] for t in range(tiles.num_tiles)]
    for t, (x, dy, *saved) in enumerate(loaded):
        dz = _dz(x, dy, affine, saved, activation)
        program.store(dx_ref, t, input_cotangent(_float32(x), dz, affine, stats_gradient))
        for dz_ref in dz_refs:
            program.store(dz_ref, t, dz)


def _dz(x, dy, affine, saved, activation):
    saved = _float32(saved[0]) if saved else None
    return through_activation(_float32(x), _float32(dy), affine, saved, activation)


def _float32(x):
    return x.astype(jnp.float32)


class _Program(NamedTuple):
    """The chunk of rows and the tile of columns that one program works on."""

    tiles: Tiles
    chunk: Array
    row: Array  # where the chunk begins
    column: Array  # where the tile begins

    @classmethod
    def of_this_launch(cls, tiles):
        # Columns vary fastest from program to program, so that programs which run at the same time
        # read adjacent lines of the same rows.
        chunk, column = pl.program_id(1), pl.program_id(0)
        return cls(tiles, chunk, chunk * tiles.chunk_rows, column * tiles.block_cols)

    def load(self, ref, t):
        mask = self._mask(t)
        return plt.load(
            ref.at[self._rows(t), self._cols()], mask=mask, other=None if mask is None else 0.0
        )

    def store(self, ref, t, value):
        plt.store(ref.at[self._rows(t), self._cols()], value.astype(ref.dtype), mask=self._mask(t))

    def load_vectors(self, ref, first, last):
        """Rows of [vectors, width], each as [1, block_cols]."""
        mask = self._cols_mask()
        mask, other = (None, None) if mask is None else (mask[None], 0.0)
        return [
            plt.load(ref.at[pl.ds(i, 1), self._cols()], mask=mask, other=other)
            for i in range(first, last)
        ]

    def load_affine(self, ref):
        return Affine(*self.load_vectors(ref, 0, 3))

    def store_partial(self, ref, vector):
        plt.store(ref.at[self.chunk, self._cols()], vector, mask=self._cols_mask())

    def accumulate(self, add: Callable, *refs):
        """Two vectors of float32 sums over the rows of all tiles.

        Args:
            add: sums = add(t, *tile t of each ref, sums), where sums is a pair of tiles.
            refs: the arrays.
        """
        tiles = self.tiles

        def step(i, sums):
            steps = [i * tiles.unroll + u for u in range(tiles.unroll)]
            loaded = [[self.load(ref, t) for ref in refs] for t in steps]
            for t, values in zip(steps, loaded, strict=True):
                sums = add(t, *values, sums)
            return sums

        zeros = jnp.zeros((tiles.block_rows, tiles.block_cols), jnp.float32)
        sums = lax.fori_loop(0, tiles.num_tiles // tiles.unroll, step, (zeros, zeros))
        return [s.sum(0) for s in sums]

    def count(self, rows):
        """How many of the chunk's first `rows` rows exist."""
        return jnp.minimum(self.tiles.rows - self.row, rows).astype(jnp.float32)

    def keep_rows(self, t, values):
        """Replace the rows beyond the end of the array by zero."""
        return jnp.where(self._rows_mask(t), values, 0.0) if self.tiles.ragged_rows else values

    def _rows(self, t):
        return pl.ds(self.row + t * self.tiles.block_rows, self.tiles.block_rows)

    def _cols(self):
        return pl.ds(self.column, self.tiles.block_cols)

    def _rows_mask(self, t):
        first = self.row + t * self.tiles.block_rows
        return (first + jnp.arange(self.tiles.block_rows) < self.tiles.rows)[:, None]

    def _cols_mask(self):
        if not self.tiles.ragged_cols:
            return None
        return self.column + jnp.arange(self.tiles.block_cols) < self.tiles.width

    def _mask(self, t):
        """Which elements of a tile exist; None where all do."""
        shape = (self.tiles.block_rows, self.tiles.block_cols)
        masks = [jnp.broadcast_to(self._rows_mask(t), shape)] if self.tiles.ragged_rows else []
        cols = self._cols_mask()
        masks += [] if cols is None else [jnp.broadcast_to(cols[None], shape)]
        return functools.reduce(jnp.logical_and, masks) if masks else None


# Launches.


def _reduce(kernel, arrays, vectors, num_results, interpret, **options):
    tiles = blocks.reduced(*arrays[0].shape, arrays[0].dtype.itemsize, len(arrays))
    shapes, dtypes = (
        ((tiles.num_chunks, tiles.width),) * num_results,
        (jnp.dtype(jnp.float32),) * num_results,
    )
    launch = _Launch(kernel, tiles, shapes, dtypes, tuple(options.items()), interpret)
    return tiles, _launch.bind(*arrays, *vectors, launch=launch)


def _map(kernel, arrays, vectors, dtypes, interpret, **options):
    tiles = blocks.mapped(*arrays[0].shape, arrays[0].dtype.itemsize)
    launch = _Launch(
        kernel, tiles, (arrays[0].shape,) * len(dtypes), dtypes, tuple(options.items()), interpret
    )
    return _launch.bind(*arrays, *vectors, launch=launch)


class _Launch(NamedTuple):
    """One pallas_call. It is hashable, so that it can be the parameter of a primitive."""

    kernel: Callable
    tiles: Tiles
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple
    options: tuple[tuple[str, Any], ...]
    interpret: bool
    batchable: bool = True  # see shared_gpu.launch_primitive

    def __call__(self, *operands):
        tiles = self.tiles
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            functools.partial(self.kernel, tiles=tiles, **dict(self.options)),
            grid=(tiles.num_columns, tiles.num_chunks),
            in_specs=[anywhere] * len(operands),
            out_specs=[anywhere] * len(self.shapes),
            out_shape=[
                pallas.out_like(operands[0], *a) for a in zip(self.shapes, self.dtypes, strict=True)
            ],
            compiler_params=plt.CompilerParams(num_warps=blocks.NUM_WARPS, num_stages=1),
            interpret=self.interpret,
            name=f"jbn{self.kernel.__name__.removesuffix('_kernel')}",
        )(*operands)


def _lower(context, launch, *operands):
    # Since JAX 0.11 deprecated the Triton backend, it warns whenever a kernel is lowered. Whoever
    # reads that warning cannot do anything about it.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(launch, multiple_results=True)(context, *operands)


_launch = gpu.launch_primitive("jbn_triton", _lower)
_backend = gpu.Backend(
    _fwd_stats_kernel,
    _fwd_apply_kernel,
    _bwd_stats_kernel,
    _bwd_apply_kernel,
    blocks.lanes,
    _reduce,
    _map,
)
fwd_stats, fwd_apply, bwd_stats, bwd_apply = (
    _backend.fwd_stats,
    _backend.fwd_apply,
    _backend.bwd_stats,
    _backend.bwd_apply,
)
