"""Block shapes of the TPU kernels: pure functions of ints, no device asked.

A constant without a measurement says so.
"""

import itertools
import math
from typing import NamedTuple

SUBLANES, LANES = 8, 128  # one float32 register; XLA tiles the last two axes in memory so
MIB = 2**20

# Of one block of one array: up to five arrays (x, dy, saved, dx, dresidual), each block twice, are
# 10 MiB, below the smallest VMEM (v4: 16 MiB), and a block is a few hundred times the latency of
# its copy. Not measured yet.
STREAM_BYTES = MIB
# Elements handled at once: 32 of the 64 registers, which leaves as many for what is computed from
# them. Not measured yet.
CHUNK_SIZE = 32 * SUBLANES * LANES
# VMEM of one core by `device_kind` (jax.experimental.pallas.tpu.get_tpu_info), less a sixteenth for
# what Mosaic itself needs.
VMEM_BYTES = {
    **dict.fromkeys(("TPU v5e", "TPU v5 lite", "TPU v6e", "TPU v6 lite"), 120 * MIB),
    **dict.fromkeys(("TPU v5p", "TPU v5"), 60 * MIB),
    "TPU v4": 15 * MIB,
}


class RowBlocks(NamedTuple):
    """How x, read as [outer, inner, channels] or [outer, channels, inner], is cut into blocks and
    these into chunks.

    inner: the row axis beside the channels in memory; block_inner is inner where block_outer > 1.
    """

    order: tuple[int, ...]  # axes of x, from major to minor in memory
    channels_minor: bool
    outer: int
    inner: int
    channels: int
    block_outer: int
    block_inner: int
    block_channels: int
    chunk_outer: int  # divides block_outer
    chunk_inner: int  # divides block_inner

    @property
    def view(self) -> tuple[int, int, int]:
        return self.arranged(self.outer, self.inner, self.channels)

    @property
    def block(self) -> tuple[int, int, int]:
        return self.arranged(self.block_outer, self.block_inner, self.block_channels)

    @property
    def chunk(self) -> tuple[int, int, int]:
        return self.arranged(self.chunk_outer, self.chunk_inner, self.block_channels)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of channels, of outer and of inner rows."""
        return (
            _up(self.channels, self.block_channels),
            _up(self.outer, self.block_outer),
            _up(self.inner, self.block_inner),
        )

    @property
    def ragged(self) -> bool:
        """Whether the last blocks hold rows that do not exist."""
        return bool(self.outer % self.block_outer or self.inner % self.block_inner)

    def arranged(self, outer, inner, channels):
        """Three things in the order of the view."""
        return (outer, inner, channels) if self.channels_minor else (outer, channels, inner)


def stream(shape: tuple[int, ...], itemsize: int) -> RowBlocks:
    """Blocks for kernels that read each channels-last array once; they fit every TPU's VMEM."""
    order, minor, outer, inner, channels = _memory(shape)
    # Two blocks of channels or more, for the chips whose two cores work as one device (v4, v5p).
    unit = LANES if minor else 2 * SUBLANES
    block_channels = min(channels, unit * min(4, _up(_up(channels, unit), 2)))
    lanes = _up(block_channels, LANES if minor else SUBLANES) * (LANES if minor else SUBLANES)
    step = _step(lanes, minor)
    if inner > step:
        most = max(1, min(STREAM_BYTES // (step * lanes * itemsize), inner // step))
        block_inner = step * _near(most, inner / step)
        return RowBlocks(
            order, minor, outer, inner, channels, 1, block_inner, block_channels, 1, step
        )
    row = lanes * _padded(inner, minor)
    chunk = min(max(1, CHUNK_SIZE // row), outer)
    most = max(1, min(STREAM_BYTES // (row * itemsize), outer) // chunk)
    block_outer = chunk * _near(most, outer / chunk)
    return RowBlocks(
        order, minor, outer, inner, channels, block_outer, inner, block_channels, chunk, inner
    )


def resident(
    shape: tuple[int, ...], itemsize: int, arrays: int, vmem_bytes: int
) -> RowBlocks | None:
    """All rows of as few channels as possible, of `arrays` arrays, double-buffered in VMEM.

    None where they do not fit.
    """
    order, minor, outer, inner, channels = _memory(shape)
    block_channels = min(channels, LANES if minor else 2 * SUBLANES)
    lanes = LANES if minor else _up(block_channels, SUBLANES) * SUBLANES
    buffers = arrays * (1 if block_channels == channels else 2)
    if buffers * outer * lanes * _padded(inner, minor) * itemsize > vmem_bytes:
        return None
    unit = SUBLANES if minor else LANES
    step = _step(lanes, minor)
    chunk_inner = (
        inner if inner <= step else next((n for n in range(step, 0, -unit) if inner % n == 0), None)
    )
    if chunk_inner is None:
        return None
    most = max(1, CHUNK_SIZE // (lanes * _padded(chunk_inner, minor)))
    chunk_outer = next(n for n in range(min(most, outer), 0, -1) if outer % n == 0)
    return RowBlocks(
        order, minor, outer, inner, channels, outer, inner, block_channels, chunk_outer, chunk_inner
    )


def _memory(shape):
    """(order, whether channels are minor, outer, inner, channels) of a channels-last array as
    XLA:TPU lays it out.

    XLA tiles the two axes that need the least padding to 8 x 128, and the last two of those that
    need the same (compiled.input_formats, v5e and v5p).  In another order the array would be
    copied.  Where the channels are minor and 8 or 16 divides the axis before them, whole tiles of
    that axis can join the outer rows.
    """
    last = len(shape) - 1
    if last == 0:
        return (0,), True, 1, 1, shape[0]
    pairs = itertools.permutations(range(last, -1, -1), 2)
    minor, second = min(
        pairs, key=lambda pair: _waste(shape[pair[1]], SUBLANES) * _waste(shape[pair[0]], LANES)
    )
    if last not in (minor, second):
        minor, second = last, last - 1
    order = (*(a for a in range(last + 1) if a not in (minor, second)), second, minor)
    channels_minor = minor == last
    inner = shape[second if channels_minor else minor]
    outer = math.prod(shape[:-1]) // inner
    tile = next((n for n in (2 * SUBLANES, SUBLANES) if channels_minor and inner % n == 0), inner)
    return order, channels_minor, outer * (inner // tile), tile, shape[-1]


def _step(lanes, channels_minor):
    """Inner rows of a chunk if there are enough: whole tiles, also of bfloat16."""
    unit = 2 * SUBLANES if channels_minor else LANES
    return max(unit, CHUNK_SIZE // lanes // unit * unit)


def _near(most, total):
    """How many chunks make a block: a divisor of the total above most / 2 if any, else `most`."""
    return next((n for n in range(most, most // 2, -1) if total % n == 0), most)


def _padded(inner, channels_minor):
    unit = SUBLANES if channels_minor else LANES
    return _up(inner, unit) * unit


def _waste(size, unit):
    return _up(size, unit) * unit / size


def _up(a, b):
    return -(-a // b)
