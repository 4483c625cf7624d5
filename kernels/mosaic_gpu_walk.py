"""What the Mosaic GPU kernels are made of: the way of a program down its rows, with copies in flight."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jbn.kernels import blocks
from jbn.kernels.blocks import Ring
from jbn.kernels.seam import Affine, pre_activation, through_activation


class Walk(NamedTuple):
    """The way of a program down its chunk, with `ring.steps` tiles of each array in flight."""

    ring: Ring
    arrays: tuple  # in global memory
    slots: tuple  # of each array: [steps, block_rows, block_cols] in shared memory
    landed: Any  # a barrier for each step
    chunk: Array
    column: Array  # where the tiles begin
    backwards: bool

    @classmethod
    def begin(cls, ring, arrays, slots, landed, *, backwards=False):
        """With its first tiles on their way, and the very first there."""
        chunk, column = lax.axis_index("chunk"), lax.axis_index("column") * ring.block_cols
        walk = cls(ring, tuple(arrays), slots, landed, chunk, column, backwards)
        for t in range(min(ring.steps, ring.num_tiles)):
            pl.when(t < walk.num_tiles)(functools.partial(walk._fetch, t))
        plgpu.barrier_wait(landed.at[0])
        return walk

    @property
    def num_tiles(self):
        return jnp.minimum(
            self.ring.num_tiles, self.ring.row_tiles - self.chunk * self.ring.num_tiles
        )

    def each(self, body: Callable, carry):
        """The last of carry = body(t, carry) over the tiles, each of which has landed when it is called."""

        def step(t, carry):
            carry = body(t, carry)
            pl.when(t + self.ring.steps < self.num_tiles)(lambda: self._fetch(t + self.ring.steps))
            pl.when(t + 1 < self.num_tiles)(
                lambda: plgpu.barrier_wait(self.landed.at[self._slot(t + 1)])
            )
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
                    store(
                        slots.at[slot, pl.ds(r, self.ring.register_rows)], value.astype(slots.dtype)
                    )
            plgpu.commit_smem()
            for slots, result in zip(leaving, results, strict=True):
                plgpu.copy_smem_to_gmem(slots.at[slot], result.at[self._rows(t), self._cols()])
            return carry

        self.each(step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def rewrite(self, compute: Callable, result):
        """Store what compute(values of each array) gives, where all tiles are still in their slots: in those of the first."""
        (slots, *_) = self.slots

        def step(t, carry):
            for r, values in self.registers(t):
                (value,) = compute(*values)
                store(slots.at[t, pl.ds(r, self.ring.register_rows)], value.astype(slots.dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slots.at[t], result.at[self._rows(t), self._cols()])
            return carry

        lax.fori_loop(0, self.num_tiles, step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def registers(self, t):
        """(row, [values of each array in float32]) for every part of tile t that fits registers."""
        ring = self.ring
        for r in range(0, ring.block_rows, ring.register_rows):
            parts = [slots.at[self._slot(t), pl.ds(r, ring.register_rows)] for slots in self.slots]
            yield r, [load(part, self.layout).astype(jnp.float32) for part in parts]

    def affine(self, vectors_ref, vectors, arrived):
        """The vectors [vectors, width] of these columns, the first three of them spread over registers."""
        self.load_vectors(vectors_ref, vectors, arrived)
        return Affine(*(self.spread(vectors.at[k]) for k in range(3)))

    def load_vectors(self, vectors_ref, vectors, arrived):
        plgpu.copy_gmem_to_smem(vectors_ref.at[:, self._cols()], vectors, arrived)
        plgpu.barrier_wait(arrived)

    def spread(self, vector):
        """[block_cols] in shared memory as registers."""
        shape = (self.ring.register_rows, self.ring.block_cols)
        loaded = load(vector, self.layout.reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(loaded, shape, (1,)), self.layout)

    def zeros(self):
        return plgpu.layout_cast(
            jnp.zeros((self.ring.register_rows, self.ring.block_cols), jnp.float32), self.layout
        )

    def keep_rows(self, t, r, values):
        """Zero for rows beyond the end."""
        if not self.ring.ragged_rows:
            return values
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=self.layout)
        return jnp.where(row < self.ring.rows - (self._row(t) + r), values, 0.0)

    def count(self, rows):
        """How many of the chunk's first rows there are."""
        return jnp.minimum(self.ring.rows - self._row(0), rows).astype(jnp.float32)

    def store_partials(self, vectors, partials):
        plgpu.commit_smem()
        for k, partial in enumerate(partials):
            plgpu.copy_smem_to_gmem(vectors.at[k], partial.at[self.chunk, self._cols()])
        plgpu.wait_smem_to_gmem(0)

    def store_whole(self, vectors, results):
        """Vectors of all rows, which every chunk knows."""
        for k, result in enumerate(results):
            plgpu.copy_smem_to_gmem(vectors.at[k], result.at[self._cols()])
        plgpu.wait_smem_to_gmem(0)

    def again(self):
        """At the beginning once more, its last tiles first."""
        return Walk.begin(self.ring, self.arrays, self.slots, self.landed, backwards=True)

    def _fetch(self, t):
        slot = self._slot(t)
        for array, slots in zip(self.arrays, self.slots, strict=True):
            plgpu.copy_gmem_to_smem(
                array.at[self._rows(t), self._cols()], slots.at[slot], self.landed.at[slot]
            )

    def _slot(self, t):
        return t % self.ring.steps if isinstance(t, int) else lax.rem(t, jnp.int32(self.ring.steps))

    def _row(self, t):
        t = self.num_tiles - 1 - t if self.backwards else t
        return (self.chunk * self.ring.num_tiles + t) * self.ring.block_rows

    def _rows(self, t):
        return pl.ds(self._row(t), self.ring.block_rows)

    def _cols(self):
        return pl.ds(self.column, self.ring.block_cols)

    @property
    def layout(self):
        return layout(self.ring.block_cols, self.ring.vector)


def chunk_stats(walk, bounce, vectors):
    """Into `vectors`, of one chunk: the mean as shift + offset, and m2. The shift is the mean of
    its first tile.

    A single far-off value among the rows of that tile moves the shift by 1 / block_rows of its
    distance only, in one chunk.
    """
    zeros = walk.zeros()
    first = sum((walk.keep_rows(0, r, x) for r, (x, *_) in walk.registers(0)), start=zeros)
    store(vectors.at[0], column_sum(first, bounce) / walk.count(walk.ring.block_rows))
    plgpu.commit_smem()
    shift = walk.spread(vectors.at[0])

    def add(t, sums):
        for r, (x, *_) in walk.registers(t):
            d = walk.keep_rows(t, r, x - shift)
            sums = sums[0] + d, sums[1] + d * d
        return sums

    total, squares = (column_sum(s, bounce) for s in walk.each(add, (zeros, zeros)))
    offset = total / walk.count(walk.ring.chunk_rows)
    store(vectors.at[1], offset)
    store(vectors.at[2], squares - total * offset)


def chunk_sums(walk, affine, activation, bounce, vectors):
    """Into `vectors`, of one chunk: the sums of dz and of dz * (x - shift)."""
    zeros = walk.zeros()

    def add(t, sums):
        for r, (x, dy, *saved) in walk.registers(t):
            # Beyond the end x is read as zero, where the derivative of an activation may overflow.
            dz = walk.keep_rows(t, r, _dz(x, dy, affine, saved, activation))
            sums = sums[0] + dz, sums[1] + dz * (x - affine.shift)
        return sums

    for k, total in enumerate(walk.each(add, (zeros, zeros))):
        store(vectors.at[k], column_sum(total, bounce))


def y_of(affine, activation):
    """What stores y, from x and the residual."""

    def y(x, *residual):
        z = pre_activation(x, affine, *residual)
        return (z if activation is None else activation(z),)

    return y


def dx_dz_of(affine, slope, intercept, activation):
    """What stores dx, and dz for the residual, from x, dy and what was saved."""

    def dx_dz(x, dy, *saved):
        dz = _dz(x, dy, affine, saved, activation)
        return affine.gain * dz + ((x - affine.shift) * slope + intercept), dz

    return dx_dz


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


def layout(cols, vector):
    """Registers of a tile: a lane owns `vector` adjacent columns, a warp some rows, the four warps those below each other."""
    lane_rows = blocks.WARP * vector // cols
    rows = blocks.NUM_WARPS * lane_rows
    if lane_rows == 1:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((rows, cols), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    tiling = plgpu.Tiling(((rows, cols), (lane_rows, cols), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def column_sum(values, bounce):
    """The sum over rows. Across warps it wants 4 columns to a lane: by way of shared memory."""
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


def in_flight(ring, arrays):
    yield "slots", tuple(plgpu.SMEM(ring.slots, a.dtype) for a in arrays)
    yield "landed", plgpu.Barrier(num_arrivals=len(arrays), num_barriers=ring.steps)
