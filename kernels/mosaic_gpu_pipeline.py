"""What the Mosaic GPU kernels are made of: how a program goes down its rows, with copies in flight.

Shared memory is reused without barriers of our own.  Mosaic itself inserts a `bar.sync` of the
program's four warps around accesses to shared memory and before copies.  Two places would be races
without it: `Pipeline._fetch` refills a slot, and `Pipeline.load_vectors` overwrites `vectors`,
while slower warps may still read the old contents.  So the compiler parameters must never set
`unsafe_no_auto_barriers`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks
from jbn.kernels import mosaic_gpu_activations as activations
from jbn.kernels.blocks import PipelineTiles
from jbn.kernels.seam import SIGN_PRESERVING, Affine, input_cotangent, pre_activation


class Pipeline(NamedTuple):
    """How a program goes down its chunk of rows, with `tiles.steps` tiles of each array in flight.

    Arrays in global memory are [rows, 1, width]; `PipelineTiles.slots` says why.
    """

    tiles: PipelineTiles
    arrays: tuple  # in global memory
    slots: tuple  # of each array, in shared memory: [steps, block_rows, 1, block_cols]
    slot_barriers: Any  # one for each step: the tile in this slot has arrived
    chunk: Array
    column: Array  # where the tiles begin
    backwards: bool

    @classmethod
    def begin(cls, tiles, arrays, slots, slot_barriers, *, backwards=False):
        """Start the copies of the first tiles, and wait for the very first tile."""
        chunk, column = lax.axis_index("chunk"), lax.axis_index("column") * tiles.block_cols
        pipeline = cls(tiles, tuple(arrays), slots, slot_barriers, chunk, column, backwards)
        for t in range(min(tiles.steps, tiles.num_tiles)):
            pl.when(t < pipeline.num_tiles)(functools.partial(pipeline._fetch, t))
        plgpu.barrier_wait(slot_barriers.at[0])
        return pipeline

    def begin_again(self):
        """Go down the chunk again, the last tiles first: they are the most likely to be cached."""
        return Pipeline.begin(
            self.tiles, self.arrays, self.slots, self.slot_barriers, backwards=True
        )

    @property
    def num_tiles(self):
        return jnp.minimum(
            self.tiles.num_tiles, self.tiles.row_tiles - self.chunk * self.tiles.num_tiles
        )

    def reduce(self, body: Callable, carry):
        """Call carry = body(t, carry) for every tile t, after it has arrived; return the last."""

        def step(t, carry):
            carry = body(t, carry)
            # Other warps may still read this slot: Mosaic's barrier before the copy waits for them.
            refill = t + self.tiles.steps
            pl.when(refill < self.num_tiles)(lambda: self._fetch(refill))
            pl.when(t + 1 < self.num_tiles)(
                lambda: plgpu.barrier_wait(self.slot_barriers.at[self._slot(t + 1)])
            )
            return carry

        return lax.fori_loop(0, self.num_tiles, step, carry)

    def map(self, compute: Callable, result_slots, results):
        """Store what compute(values of each array) returns for every tile.

        Args:
            compute: function from float32 values to a tuple of at least as many values as results.
            result_slots: shared memory of each result, as `slots` is of each array.
            results: in global memory.
        """

        def step(t, carry):
            slot = self._slot(t)
            # All copies except those of the last steps - 1 tiles have left their slots.
            plgpu.wait_smem_to_gmem((self.tiles.steps - 1) * len(results), wait_read_only=True)
            for r, values in self.registers(t):
                for slots, value in zip(result_slots, compute(*values), strict=False):
                    store(self._part(slots, slot, r), value.astype(slots.dtype))
            plgpu.commit_smem()
            for slots, result in zip(result_slots, results, strict=True):
                plgpu.copy_smem_to_gmem(slots.at[slot], self._tile(result, t))
            return carry

        self.reduce(step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def map_in_place(self, compute: Callable, result):
        """`map` for one result where all tiles are still in shared memory.

        It overwrites the slots of the first array.
        """
        slots = self.slots[0]

        def step(t, carry):
            for r, values in self.registers(t):
                value, *_ = compute(*values)
                store(self._part(slots, t, r), value.astype(slots.dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slots.at[t], self._tile(result, t))
            return carry

        lax.fori_loop(0, self.num_tiles, step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def registers(self, t):
        """Yield (row, [float32 values of each array]) for parts of tile t that fit registers."""
        for r in range(0, self.tiles.block_rows, self.tiles.register_rows):
            parts = [self._part(slots, self._slot(t), r) for slots in self.slots]
            yield r, [load(part, self.layout).astype(jnp.float32) for part in parts]

    def load_affine(self, vectors_ref, vectors, vectors_barrier):
        """Load the vectors [vectors, width] of these columns; return the first three as Affine."""
        self.load_vectors(vectors_ref, vectors, vectors_barrier)
        return Affine(*(self.spread(vectors.at[k]) for k in range(3)))

    def load_vectors(self, vectors_ref, vectors, vectors_barrier):
        # Other warps may still read the old vectors: Mosaic's barrier before the copy waits.
        plgpu.copy_gmem_to_smem(vectors_ref.at[:, self._cols()], vectors, vectors_barrier)
        plgpu.barrier_wait(vectors_barrier)

    def spread(self, vector):
        """A vector [block_cols] in shared memory, broadcast over the rows of the registers."""
        shape = (self.tiles.register_rows, self.tiles.block_cols)
        loaded = load(vector, self.layout.reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(loaded, shape, (1,)), self.layout)

    def zeros(self):
        return plgpu.layout_cast(
            jnp.zeros((self.tiles.register_rows, self.tiles.block_cols), jnp.float32), self.layout
        )

    def keep_rows(self, t, r, values):
        """Replace the rows beyond the end of the array by zero."""
        if not self.tiles.ragged_rows:
            return values
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=self.layout)
        return jnp.where(row < self.tiles.rows - (self._row(t) + r), values, 0.0)

    def count(self, rows):
        """How many of the chunk's first `rows` rows exist."""
        return jnp.minimum(self.tiles.rows - self._row(0), rows).astype(jnp.float32)

    def store_partials(self, vectors, partials):
        """Copy vectors [k, block_cols] of this chunk to the partial results [chunks, width]."""
        plgpu.commit_smem()
        for k, partial in enumerate(partials):
            plgpu.copy_smem_to_gmem(vectors.at[k], partial.at[self.chunk, self._cols()])
        plgpu.wait_smem_to_gmem(0)

    def store_totals(self, vectors, results):
        """Copy vectors [k, block_cols] over all chunks, which every program knows, to [width]."""
        for k, result in enumerate(results):
            plgpu.copy_smem_to_gmem(vectors.at[k], result.at[self._cols()])
        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, t):
        slot = self._slot(t)
        for array, slots in zip(self.arrays, self.slots, strict=True):
            plgpu.copy_gmem_to_smem(
                self._tile(array, t), slots.at[slot], self.slot_barriers.at[slot]
            )

    def _slot(self, t):
        steps = self.tiles.steps
        return t % steps if isinstance(t, int) else lax.rem(t, jnp.int32(steps))

    def _row(self, t):
        t = self.num_tiles - 1 - t if self.backwards else t
        return (self.chunk * self.tiles.num_tiles + t) * self.tiles.block_rows

    def _tile(self, array, t):
        """Tile t of an array in global memory."""
        return array.at[pl.ds(self._row(t), self.tiles.block_rows), :, self._cols()]

    def _part(self, slots, slot, r):
        """The rows of a slot from r on that fit registers."""
        return slots.at[slot, pl.ds(r, self.tiles.register_rows), 0]

    def _cols(self):
        return pl.ds(self.column, self.tiles.block_cols)

    @property
    def layout(self):
        return layout(self.tiles.block_cols, self.tiles.vector)


def chunk_stats(pipeline, bounce, vectors):
    """Write the statistics of one chunk to `vectors`: the mean as shift + offset, and m2.

    The shift is the mean of the chunk's first tile.  A single outlier among the rows of that tile
    moves the shift by 1 / block_rows of its distance only, and only in this chunk.
    """
    zeros = pipeline.zeros()
    first = sum((pipeline.keep_rows(0, r, x) for r, (x, *_) in pipeline.registers(0)), start=zeros)
    store(vectors.at[0], column_sum(first, bounce) / pipeline.count(pipeline.tiles.block_rows))
    plgpu.commit_smem()
    shift = pipeline.spread(vectors.at[0])

    def add(t, sums):
        for r, (x, *_) in pipeline.registers(t):
            d = pipeline.keep_rows(t, r, x - shift)
            sums = sums[0] + d, sums[1] + d * d
        return sums

    total, squares = (column_sum(s, bounce) for s in pipeline.reduce(add, (zeros, zeros)))
    offset = total / pipeline.count(pipeline.tiles.chunk_rows)
    store(vectors.at[1], offset)
    store(vectors.at[2], squares - total * offset)


def chunk_sums(pipeline, affine, activation, bounce, vectors):
    """Write two sums over one chunk to `vectors`: of dz and of dz * (x - shift)."""
    zeros = pipeline.zeros()

    def add(t, sums):
        for r, (x, dy, *saved) in pipeline.registers(t):
            # The rows beyond the end read as x = 0, where an activation's derivative may overflow.
            dz = pipeline.keep_rows(t, r, _dz(x, dy, affine, saved, activation))
            sums = sums[0] + dz, sums[1] + dz * (x - affine.shift)
        return sums

    for k, total in enumerate(pipeline.reduce(add, (zeros, zeros))):
        store(vectors.at[k], column_sum(total, bounce))


def y_of(affine, activation):
    """The function from x and the residual to (y,), for `Pipeline.map`."""
    return lambda x, *residual: (
        activations.apply(activation, pre_activation(x, affine, *residual)),
    )


def dx_dz_of(affine, stats_gradient, activation):
    """The function from x, dy and what was saved to (dx, dz), for `Pipeline.map`."""

    def dx_dz(x, dy, *saved):
        dz = _dz(x, dy, affine, saved, activation)
        return input_cotangent(x, dz, affine, stats_gradient), dz

    return dx_dz


def _dz(x, dy, affine, saved, activation):
    """As `seam.through_activation`, in operations that Mosaic lowers."""
    if activation is None:
        return dy
    if activation in SIGN_PRESERVING and saved:
        point = saved[0]
    else:
        point = pre_activation(x, affine, *saved)
    return activations.transposed(activation, point, dy)


def layout(cols, vector):
    """Registers of [rows, cols]: each lane holds `vector` adjacent columns.

    A warp holds `lane_rows` rows, and the four warps hold rows below each other.
    """
    lane_rows = blocks.WARP * vector // cols
    rows = blocks.NUM_WARPS * lane_rows
    # Mosaic accepts a layout in one spelling only, in which no tile has a leading axis of length 1.
    if lane_rows == 1:
        tiles, warp_dim, lane_dims = ((rows, cols), (vector,)), -3, (-2,)
    else:
        tiles, warp_dim, lane_dims = ((rows, cols), (lane_rows, cols), (vector,)), -5, (-3, -2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(warp_dim,), lane_dims=lane_dims, vector_dim=-1
    )


def column_sum(values, bounce):
    """The sum over rows.

    Mosaic sums across warps only where a lane holds 4 columns, so the values go through `bounce` in
    shared memory.
    """
    store(bounce, values)
    plgpu.commit_smem()
    return jnp.sum(load(bounce, layout(min(values.shape[1], 4 * blocks.WARP), 4)), axis=0)


def load(ref, layout):
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref, value):
    if jax.__version_info__ < (0, 12):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]


def slots(tiles, arrays):
    """Scratch memory of a `Pipeline` over the arrays, by the names of `Pipeline.begin`."""
    yield "slots", tuple(plgpu.SMEM(tiles.slots, a.dtype) for a in arrays)
    yield "slot_barriers", plgpu.Barrier(num_arrivals=len(arrays), num_barriers=tiles.steps)


def result_slots(tiles, dtypes):
    """Scratch memory of the results of `Pipeline.map`."""
    yield "result_slots", tuple(plgpu.SMEM(tiles.slots, dtype) for dtype in dtypes)


def vectors(tiles, number, *, loaded=True):
    """Scratch memory for `number` vectors, and a barrier for `Pipeline.load_vectors` if loaded."""
    yield "vectors", plgpu.SMEM((number, tiles.block_cols), jnp.float32)
    if loaded:
        yield "vectors_barrier", plgpu.Barrier()


def bounce(tiles):
    """Scratch memory of `column_sum`."""
    yield "bounce", plgpu.SMEM((tiles.register_rows, tiles.block_cols), jnp.float32)
