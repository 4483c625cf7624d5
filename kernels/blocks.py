"""Block shapes of the GPU kernels: pure functions of ints, no device asked.

A constant without a measurement says so.  `python -m jbn.bench device` runs the kernels on the card
at hand.
"""

import math
from typing import NamedTuple

# Streaming multiprocessors of an H100 or H200 (an A100 has 108, a B200 148): decides only how many
# programs share the work.
NUM_SMS = 132
WARP = 32
# One load instruction of a thread, the widest there is (seen as LDG.E.128 in the SASS for H200 of
# every even case).
VECTOR_BYTES = 16
# Width of a tile: one line of L2. Wider tiles need more registers for per-channel vectors. Not
# measured yet.
TILE_BYTES = 128
# Warps per program: 4 gives a tile of 16 rows, and no spills at 8 values a thread. Not measured
# yet.
NUM_WARPS = 4
# Programs per multiprocessor a reduction aims at: 6, of 4 tiles of 2 KB each in flight, are 48 KB,
# above the ~40 KB that hide the latency of HBM by Little's law (4.8 TB/s / 132 * ~1 us). Not
# measured yet.
PROGRAMS_PER_SM = 6
# Tiles per program of a reduction: beyond 64, partial results are 1 % of the traffic and longer
# chunks gain nothing more; below 16 they would be over 5 %. Not measured yet.
MAX_REDUCED_TILES = 64
# Loads of one array a reduction keeps in flight, in tiles (bytes in flight: see PROGRAMS_PER_SM).
# Not measured yet.
UNROLL = 4
# Tiles per program of an elementwise pass, all loaded before the first is used. Not measured yet.
MAPPED_TILES = 4

# Of the Mosaic kernels.  Tiles on their way from and to memory, of each array. Not measured yet.
RING_STEPS = 4
# Shared memory that they take, at most, where a tile is not larger than registers already: two
# programs of up to 96 KB fit the 227 KB of a multiprocessor, and together have more in flight than
# the latency of HBM asks for (40 KB). Not measured yet.
RING_BYTES = 96 * 1024
RINGS_PER_SM = 2
# Tiles per program of a reduction: with fewer, partial results would be more than 5 % of the
# traffic. Not measured yet.
MIN_REDUCED_TILES = 4
# Multiprocessors that a kernel with a barrier across its grid leaves to others: all its programs
# must run at once, and another kernel (a collective of NCCL, say) may hold some. Not measured yet.
SM_MARGIN = 4
# Shared memory of one program that has a multiprocessor to itself: 227 KB less 24 KB for sums
# across warps and vectors.
SLAB_BYTES = 203 * 1024
# What a backward pass may read twice and find in the second-level cache: 50 MB of an H100 or H200,
# all of it. Not measured yet.
CACHE_BYTES = 50 * 2**20
# Channels: multiples of 16 bytes in every dtype. TMA copies want that of the distance between rows.
ALIGNED = 8
MAX_TMA_BOX = 256  # elements along one axis


class Tiles(NamedTuple):
    """How programs share a [rows, width] array: each walks down num_tiles tiles of [block_rows, block_cols]."""

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


class Ring(NamedTuple):
    """How programs share [rows, width] arrays: each walks down num_tiles tiles, of which `steps` are in flight."""

    rows: int
    width: int
    block_rows: int
    block_cols: int
    register_rows: int  # divides block_rows: what four warps hold at once
    vector: int  # columns of a lane
    num_tiles: int
    steps: int

    @property
    def slots(self) -> tuple[int, int, int]:
        """Shape of what is in flight of one array."""
        return self.steps, self.block_rows, self.block_cols

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
    def ragged_rows(self) -> bool:
        return self.rows % self.block_rows != 0


def lanes(itemsize: int) -> int:
    """Columns of a tile; arrays whose width is no multiple of it are folded first (`pallas.widening`)."""
    return TILE_BYTES // itemsize


def warp_lanes(itemsize: int) -> int:
    """Columns of a tile of the Mosaic kernels: a warp, each lane a vector."""
    return WARP * VECTOR_BYTES // itemsize


def reduced(rows: int, width: int, itemsize: int, num_sms: int = NUM_SMS) -> Tiles:
    """For a pass that leaves one partial result per chunk: long chunks, but enough of them to fill the card."""
    block_rows, block_cols = _tile(rows, width, itemsize)
    num_rows, num_columns = -(-rows // block_rows), -(-width // block_cols)
    wanted = -(-num_rows * num_columns // (num_sms * PROGRAMS_PER_SM))
    num_tiles = _near(min(wanted, MAX_REDUCED_TILES, num_rows), num_rows)
    return Tiles(rows, width, block_rows, block_cols, num_tiles, math.gcd(num_tiles, UNROLL))


def mapped(rows: int, width: int, itemsize: int) -> Tiles:
    """For an elementwise pass: short chunks, everything of one in flight at once."""
    block_rows, block_cols = _tile(rows, width, itemsize)
    num_tiles = math.gcd(-(-rows // block_rows), MAPPED_TILES)
    return Tiles(rows, width, block_rows, block_cols, num_tiles, num_tiles)


def ring(
    rows: int,
    width: int,
    itemsizes: tuple[int, ...],
    *,
    least_tiles: int = 1,
    num_sms: int = NUM_SMS,
) -> Ring:
    """For the Mosaic kernels: as many programs as run at once. itemsizes: of each array that passes through, x first."""
    vector = VECTOR_BYTES // itemsizes[0]
    block_cols = min(warp_lanes(itemsizes[0]), _power_of_two(width))
    register_rows = NUM_WARPS * WARP * vector // block_cols
    fitting = RING_BYTES // (RING_STEPS * block_cols * sum(itemsizes))
    block_rows = max(
        register_rows, min(MAX_TMA_BOX, _power_of_two(fitting + 1) // 2, _power_of_two(rows))
    )
    row_tiles, num_columns = -(-rows // block_rows), -(-width // block_cols)
    num_chunks = max(1, num_sms * RINGS_PER_SM // num_columns)
    num_tiles = min(max(least_tiles, -(-row_tiles // num_chunks)), row_tiles)
    return Ring(
        rows,
        width,
        block_rows,
        block_cols,
        register_rows,
        vector,
        num_tiles,
        min(RING_STEPS, num_tiles),
    )


def resident(rows: int, channels: int, itemsizes: tuple[int, ...], programs: int) -> Ring | None:
    """As `ring`, with all tiles of every program in shared memory at once, or None where they do not fit."""
    found = _columns_of(rows, channels, itemsizes, programs)
    if found is None:
        return None
    block_cols, register_rows, num_chunks = found
    for block_rows in (8 * register_rows, 4 * register_rows, 2 * register_rows, register_rows):
        num_tiles = -(-rows // (block_rows * num_chunks))
        fits = num_tiles * block_rows * block_cols * sum(itemsizes) <= SLAB_BYTES
        if block_rows <= MAX_TMA_BOX and fits:
            vector = VECTOR_BYTES // itemsizes[0]
            return Ring(
                rows, channels, block_rows, block_cols, register_rows, vector, num_tiles, num_tiles
            )
    return None


def twice(
    rows: int, channels: int, itemsizes: tuple[int, ...], read: int, programs: int
) -> Ring | None:
    """As `ring`, one program on each multiprocessor, for two walks over the first `read` arrays; None if too large for it."""
    found = _columns_of(rows, channels, itemsizes, programs)
    if found is None or rows * channels * sum(itemsizes[:read]) > CACHE_BYTES:
        return None
    block_cols, register_rows, num_chunks = found
    fitting = SLAB_BYTES // (RING_STEPS * block_cols * sum(itemsizes)) // register_rows
    if fitting == 0:
        return None
    block_rows = min(MAX_TMA_BOX, register_rows * (_power_of_two(fitting + 1) // 2))
    num_tiles = -(-rows // (block_rows * num_chunks))
    vector = VECTOR_BYTES // itemsizes[0]
    return Ring(
        rows,
        channels,
        block_rows,
        block_cols,
        register_rows,
        vector,
        num_tiles,
        min(RING_STEPS, num_tiles),
    )


def _columns_of(rows, channels, itemsizes, programs):
    """(block_cols, register_rows, num_chunks) such that tiles are whole and programs few enough, or None."""
    vector = VECTOR_BYTES // itemsizes[0]
    block_cols = math.gcd(channels, warp_lanes(itemsizes[0]))
    num_chunks = programs // (channels // block_cols)
    if block_cols < ALIGNED or num_chunks == 0:
        return None
    return block_cols, NUM_WARPS * WARP * vector // block_cols, min(num_chunks, rows)


def _tile(rows, width, itemsize):
    """[block_rows, block_cols] such that each thread of NUM_WARPS loads one vector, smaller for an array that is."""
    block_cols = min(lanes(itemsize), _power_of_two(width))
    block_rows = NUM_WARPS * WARP * VECTOR_BYTES // itemsize // block_cols
    return min(block_rows, _power_of_two(rows)), block_cols


def _near(target, total):
    """A number of tiles per chunk, at most target: one that divides the total, if there is any from half of it up."""
    step = min(UNROLL, 1 << (target.bit_length() - 1))
    candidates = range(target // step * step, (target - 1) // 2, -step)
    return next((n for n in candidates if total % n == 0), target // step * step)


def _power_of_two(n):
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
