"""Block shapes of the GPU kernels: pure functions of ints. They ask no device.

A constant that nobody has measured says so.  `python -m jbn.bench device` tries other values of
them on the card at hand.
"""

import math
from typing import NamedTuple

# Streaming multiprocessors of an H100 or H200 (an A100 has 108, a B200 148). The number only
# decides over how many programs the work is spread; on another card the results are the same.
NUM_SMS = 132
WARP = 32
# The widest load instruction of a thread (LDG.E.128 in the SASS for H200 of every even case).
VECTOR_BYTES = 16
# Width of a Triton tile: one line of the L2 cache. A wider tile needs more registers for its
# per-channel vectors. Not measured yet.
TILE_BYTES = 128
# Warps per program: 4 give a tile of 16 rows, and no spills at 8 values a thread. Not measured yet.
NUM_WARPS = 4
# Programs per multiprocessor that a reduction aims at: 6 programs with 4 tiles of 2 KB in flight
# are 48 KB. By Little's law ~40 KB hide the latency of HBM (4.8 TB/s / 132 * ~1 us). Not measured
# yet.
PROGRAMS_PER_SM = 6
# Tiles per program of a reduction. With 64 the partial results are 1 % of the traffic, and longer
# chunks gain nothing more; with fewer than 16 they would be over 5 %. Not measured yet.
MAX_REDUCED_TILES = 64
# How many tiles, counted over all its arrays, a reduction loads before it uses the first. More of
# three arrays spilled a register beside the derivative of silu or gelu. Not measured yet.
UNROLL = 4
# Tiles per program of an elementwise pass, all loaded before the first is used. Not measured yet.
MAPPED_TILES = 4

# The constants below belong to the Mosaic kernels.

# Tiles of each array that are on their way between global and shared memory. Not measured yet.
RING_STEPS = 4
# Shared memory that the tiles in flight may take (a single tile as small as the registers hold may
# exceed it). Two programs with 96 KB each fit the 227 KB of a multiprocessor, and have more in
# flight than the 40 KB that hide the latency of HBM. Not measured yet.
RING_BYTES = 96 * 1024
RINGS_PER_SM = 2
# Tiles per program of a reduction. With fewer, partial results would be more than 5 % of the
# traffic. Not measured yet.
MIN_REDUCED_TILES = 4
# Multiprocessors that a kernel with a barrier across its grid leaves to others. All programs of
# such a kernel must run at once, and another kernel (a collective of NCCL, say) may hold some
# multiprocessors. Not measured yet.
SM_MARGIN = 4
# Shared memory of a program that has a multiprocessor to itself: 227 KB, of which 24 KB are left
# for sums across warps and for vectors.
SLAB_BYTES = 203 * 1024
# A backward pass may read this much twice and find it in the L2 cache the second time: all 50 MB
# that an H100 or H200 has. Not measured yet.
CACHE_BYTES = 50 * 2**20
# The number of channels must be a multiple of 8: 16 bytes in 16-bit dtypes. TMA wants the distance
# between two rows to be a multiple of 16 bytes.
ALIGNED = 8
MAX_TMA_BOX = 256  # elements along one axis


class Tiles(NamedTuple):
    """How Triton programs share a [rows, width] array.

    Each program goes down num_tiles tiles of shape [block_rows, block_cols].
    """

    rows: int
    width: int
    block_rows: int  # powers of two, as Triton wants them
    block_cols: int
    num_tiles: int
    unroll: int  # divides num_tiles

    @property
    def chunk_rows(self) -> int:
        return self.block_rows * self.num_tiles

    @property
    def num_chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def num_columns(self) -> int:
        return -(-self.width // self.block_cols)

    @property
    def ragged_rows(self) -> bool:
        return self.rows % self.chunk_rows != 0

    @property
    def ragged_cols(self) -> bool:
        return self.width % self.block_cols != 0


class PipelineTiles(NamedTuple):
    """How Mosaic programs share [rows, width] arrays.

    Each program goes down num_tiles tiles of shape [block_rows, block_cols], of which `steps` are
    in shared memory at a time.
    """

    rows: int
    width: int
    block_rows: int
    block_cols: int
    register_rows: int  # divides block_rows: the rows that the registers of four warps hold at once
    vector: int  # columns that one lane holds
    num_tiles: int
    steps: int

    @property
    def slots(self) -> tuple[int, int, int, int]:
        """Shape of the shared memory of one array.

        The axis of length 1 keeps Mosaic from laying the tile out in blocks of 8 rows, which it
        can only do if the number of rows is below 8 or a multiple of 8.
        """
        return self.steps, self.block_rows, 1, self.block_cols

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def chunk_rows(self) -> int:
        return self.block_rows * self.num_tiles

    @property
    def num_chunks(self) -> int:
        return -(-self.row_tiles // self.num_tiles)

    @property
    def num_columns(self) -> int:
        return -(-self.width // self.block_cols)

    @property
    def padded_width(self) -> int:
        """The width in whole tiles."""
        return self.num_columns * self.block_cols

    @property
    def ragged_rows(self) -> bool:
        return self.rows % self.block_rows != 0


def lanes(itemsize: int) -> int:
    """Columns of a Triton tile. Narrower arrays are widened first (`shared_pallas.widening`)."""
    return TILE_BYTES // itemsize


def warp_lanes(itemsize: int) -> int:
    """Columns that one warp holds if each lane holds one vector: the width of a Mosaic tile."""
    return WARP * VECTOR_BYTES // itemsize


def reduced(rows: int, width: int, itemsize: int, num_arrays: int = 1) -> Tiles:
    """Tiles of a pass over `num_arrays` arrays that leaves one partial result per chunk of rows.

    Chunks are long, but there are enough of them to keep all multiprocessors busy.
    """
    block_rows, block_cols = _tile(rows, width, itemsize)
    num_rows, num_columns = -(-rows // block_rows), -(-width // block_cols)
    wanted = -(-num_rows * num_columns // (NUM_SMS * PROGRAMS_PER_SM))
    num_tiles = _near(max(1, min(wanted, MAX_REDUCED_TILES, num_rows)), num_rows)
    unroll = math.gcd(num_tiles, max(1, UNROLL // num_arrays))
    return Tiles(rows, width, block_rows, block_cols, num_tiles, unroll)


def mapped(rows: int, width: int, itemsize: int) -> Tiles:
    """Tiles of an elementwise pass: short chunks, of which all tiles are loaded at once."""
    block_rows, block_cols = _tile(rows, width, itemsize)
    num_tiles = math.gcd(-(-rows // block_rows), MAPPED_TILES)
    return Tiles(rows, width, block_rows, block_cols, num_tiles, num_tiles)


def pipelined(
    rows: int, width: int, itemsizes: tuple[int, ...], *, least_tiles: int = 1
) -> PipelineTiles:
    """Tiles of a Mosaic kernel, for as many programs as run at once.

    Args:
        rows, width: of the arrays.
        itemsizes: bytes per element of each array that passes through the kernel, x first.
        least_tiles: tiles that a program has at least, if there are so many.
    """
    block_cols = warp_lanes(itemsizes[0])
    fitting = RING_BYTES // (RING_STEPS * block_cols * sum(itemsizes))
    block_rows = max(
        NUM_WARPS, min(MAX_TMA_BOX, _power_of_two(fitting + 1) // 2, _power_of_two(rows))
    )
    row_tiles, num_columns = -(-rows // block_rows), -(-width // block_cols)
    num_chunks = max(1, NUM_SMS * RINGS_PER_SM // max(1, num_columns))
    num_tiles = max(1, min(max(least_tiles, -(-row_tiles // num_chunks)), row_tiles))
    return PipelineTiles(
        rows,
        width,
        block_rows,
        block_cols,
        register_rows=NUM_WARPS,
        vector=VECTOR_BYTES // itemsizes[0],
        num_tiles=num_tiles,
        steps=min(RING_STEPS, num_tiles),
    )


def resident(
    rows: int, channels: int, itemsizes: tuple[int, ...], programs: int | None
) -> PipelineTiles | None:
    """Tiles of a kernel that keeps its arrays in shared memory, or None where they do not fit.

    Args:
        rows, channels: of the arrays.
        itemsizes: as for `pipelined`.
        programs: how many programs run at once; None for one per tile of columns.
    """
    split = _split(rows, channels, itemsizes[0], programs)
    if split is None:
        return None
    block_cols, register_rows, vector, num_chunks = split
    for block_rows in (8 * register_rows, 4 * register_rows, 2 * register_rows, register_rows):
        num_tiles = -(-rows // (block_rows * num_chunks))
        fits = num_tiles * block_rows * block_cols * sum(itemsizes) <= SLAB_BYTES
        if block_rows <= MAX_TMA_BOX and fits:
            return PipelineTiles(
                rows,
                channels,
                block_rows,
                block_cols,
                register_rows,
                vector,
                num_tiles=num_tiles,
                steps=num_tiles,
            )
    return None


def twice(
    rows: int, channels: int, itemsizes: tuple[int, ...], num_read: int, programs: int | None
) -> PipelineTiles | None:
    """Tiles of a kernel that reads its arrays twice, or None if they exceed the L2 cache.

    Args:
        rows, channels: of the arrays.
        itemsizes: as for `pipelined`; the first `num_read` arrays are the ones that are read.
        programs: as for `resident`.
    """
    split = _split(rows, channels, itemsizes[0], programs)
    if split is None or rows * channels * sum(itemsizes[:num_read]) > CACHE_BYTES:
        return None
    block_cols, register_rows, vector, num_chunks = split
    fitting = SLAB_BYTES // (RING_STEPS * block_cols * sum(itemsizes)) // register_rows
    if fitting == 0:
        return None
    block_rows = min(MAX_TMA_BOX, register_rows * (_power_of_two(fitting + 1) // 2))
    num_tiles = -(-rows // (block_rows * num_chunks))
    return PipelineTiles(
        rows,
        channels,
        block_rows,
        block_cols,
        register_rows,
        vector,
        num_tiles=num_tiles,
        steps=min(RING_STEPS, num_tiles),
    )


def _split(rows, channels, itemsize, programs):
    """(block_cols, register_rows, vector, num_chunks) of a kernel whose programs all run at once.

    None if the array is empty, if its channels are not aligned, or if there are fewer programs than
    tiles of columns.
    """
    if rows * channels == 0 or channels % ALIGNED:
        return None
    # The widest tile that divides the channels. If that is narrower than a line of the L2 cache,
    # a full tile is better even though the last one is partly empty.
    block_cols = math.gcd(channels, warp_lanes(itemsize))
    if block_cols < lanes(itemsize) and channels > warp_lanes(itemsize):
        block_cols = warp_lanes(itemsize)
    num_columns = -(-channels // block_cols)
    num_chunks = 1 if programs is None else programs // num_columns
    if num_chunks == 0:
        return None
    # Mosaic swizzles a tile that is narrower than a warp, and JAX 0.12 does so wrongly where a lane
    # holds more than 16 bytes. Sums are float32, so there a lane holds 4 columns in every dtype.
    narrow = block_cols < warp_lanes(itemsize)
    vector = VECTOR_BYTES // (4 if narrow else itemsize)
    register_rows = NUM_WARPS * WARP * vector // block_cols
    return block_cols, register_rows, vector, min(num_chunks, rows)


def _tile(rows, width, itemsize):
    """[block_rows, block_cols] such that each thread loads one vector; less for a small array."""
    block_cols = min(lanes(itemsize), _power_of_two(width))
    block_rows = NUM_WARPS * WARP * VECTOR_BYTES // itemsize // block_cols
    return min(block_rows, _power_of_two(rows)), block_cols


def _near(target, total):
    """How many tiles a chunk has: at most target, and a divisor of total if one is near enough.

    Near enough is half of the target or more.
    """
    step = min(UNROLL, 1 << (target.bit_length() - 1))
    candidates = range(target // step * step, (target - 1) // 2, -step)
    return next((n for n in candidates if total % n == 0), target // step * step)


def _power_of_two(n):
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
