"""Block shapes: every element lies in one tile, and tiles have the sizes that a card wants.

Nothing is masked that need not be.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import kernel_grid
import numpy as np
import oracle
import pytest

from jbn.kernels import blocks, mosaic_gpu, mosaic_tpu, triton
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.seam import Affine

SIZES = list(
    itertools.product(
        (1, 2, 5, 63, 1000, 12544, 100352, 9999991, 10**7), (1, 3, 64, 80, 1000, 2048), (2, 4)
    )
)


def _widened(rows, channels, itemsize):
    factor = pallas.widening(rows, channels, blocks.lanes(itemsize))
    return rows // factor, factor * channels


@pytest.mark.parametrize("choose", [blocks.reduced, blocks.mapped])
def test_tiles_cover_the_array_once(choose):
    for rows, channels, itemsize in SIZES:
        rows, width = _widened(rows, channels, itemsize)
        tiles = choose(rows, width, itemsize)
        assert (
            (tiles.num_chunks - 1) * tiles.chunk_rows < rows <= tiles.num_chunks * tiles.chunk_rows
        ), tiles
        assert (
            (tiles.num_columns - 1) * tiles.block_cols
            < width
            <= tiles.num_columns * tiles.block_cols
        ), tiles
        assert tiles.num_tiles % tiles.unroll == 0, tiles
        for size in (tiles.block_rows, tiles.block_cols):
            assert size & (size - 1) == 0, tiles
        assert tiles.ragged_rows == (tiles.num_chunks * tiles.chunk_rows != rows)
        assert tiles.ragged_cols == (tiles.num_columns * tiles.block_cols != width)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_layers_of_resnet50_need_no_mask_and_load_whole_vectors(itemsize):
    for side, channels in [(112, 64), (56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)]:
        for choose in (blocks.reduced, blocks.mapped):
            tiles = choose(*_widened(128 * side * side, channels, itemsize), itemsize)
            assert (tiles.ragged_rows, tiles.ragged_cols) == (False, False), tiles
            assert (
                tiles.block_rows * tiles.block_cols * itemsize
                == blocks.NUM_WARPS * blocks.WARP * blocks.VECTOR_BYTES
            ), tiles
            assert tiles.unroll == 4, tiles


def test_large_reductions_fill_the_card_and_leave_little_behind():
    for rows, channels, itemsize in SIZES:
        if rows * channels * itemsize < 2**25:
            continue
        rows, width = _widened(rows, channels, itemsize)
        tiles = blocks.reduced(rows, width, itemsize)
        assert tiles.num_chunks * tiles.num_columns >= 4 * blocks.NUM_SMS, tiles
        partials = 3 * 4 * tiles.num_chunks * width
        assert partials <= 0.05 * rows * width * itemsize, tiles


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        ((12544, 1024, 2), (12544, 1024, 16, 64, 16, 4)),  # 49 * 16 programs of 16 tiles
        # Of two arrays two tiles each are in flight, and of three one each.
        ((12544, 1024, 2, 2), (12544, 1024, 16, 64, 16, 2)),
        ((12544, 1024, 2, 3), (12544, 1024, 16, 64, 16, 1)),
        ((12544, 1024, 4), (12544, 1024, 16, 32, 28, 4)),
        ((63, 3, 4), (63, 3, 64, 4, 1, 1)),  # one program, smaller than its tile
        ((1, 2048, 2), (1, 2048, 1, 64, 1, 1)),
        (
            (9999991, 64, 2),
            (9999991, 64, 16, 64, 40, 4),
        ),  # a prime number of rows: the last chunk is one row short of 40 tiles
    ],
)
def test_tiles_of_a_reduction(sizes, tiles):
    assert blocks.reduced(*sizes) == tiles


def test_empty_arrays_are_refused_before_they_get_tiles():
    """And tiles of them, should somebody ask, are no division by zero."""
    for shape in [(0, 64), (8, 0), (0, 0)]:
        for kernels in (triton, mosaic_gpu):
            assert "empty" in kernels.unsupported(shape, np.dtype("float32"), (1,))
        assert blocks.reduced(*shape, 4).num_chunks * blocks.mapped(*shape, 4).num_columns == 0
        assert blocks.pipelined(*shape, (4, 4)).num_chunks * shape[1] == 0
        assert blocks.resident(*shape, (4,), 128) is None
        assert blocks.twice(*shape, (4, 4, 4), 2, 128) is None


MOST = pallas.MAX_SIZE // 128 * 128


@pytest.mark.parametrize(
    ("kernels", "taken"),
    [
        # Channels such that no rows are put side by side.
        (triton, (MOST, 32)),
        (mosaic_gpu, (MOST, 128)),
        (mosaic_tpu, (MOST, 96)),
        *itertools.product((triton, mosaic_gpu, mosaic_tpu), [(8, MOST), (MOST,)]),
    ],
)
def test_sizes_beyond_int32_are_refused(kernels, taken):
    """The longest arrays that are taken can be traced through all four functions."""
    axis, longer = (len(taken) - 1,), tuple(n + 2**20 if n == MOST else n for n in taken)
    assert "in int32" in kernels.unsupported(longer, jnp.float32, axis)
    assert kernels.unsupported(taken, jnp.float32, axis) is None
    x, vector = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (taken, taken[-1:]))

    def run(x, affine):
        known = {"axis": axis, "activation": None, "interpret": False}
        backward = {"saved": None, "weights": None, **known}
        return (
            kernels.fwd_stats(x, None, None, axis=axis, interpret=False),
            kernels.fwd_apply(x, affine, None, dtype=x.dtype, **known),
            kernels.bwd_stats(x, x, affine, **backward),
            kernels.bwd_apply(x, x, affine, stats_gradient=None, residual_dtype=None, **backward),
        )

    jax.eval_shape(run, x, Affine(vector, vector, vector))


@pytest.mark.parametrize("rows", [MOST, pallas.MAX_SIZE])
def test_last_tiles_of_the_longest_arrays_end_within_int32(rows):
    for width, itemsize in itertools.product((1, 3, 64, 128, 1000), (2, 4)):
        for tiles in (
            blocks.reduced(rows, width, itemsize),
            blocks.mapped(rows, width, itemsize),
            blocks.pipelined(rows, width, (itemsize,) * 2),
        ):
            assert rows <= tiles.num_chunks * tiles.chunk_rows < 2**31 or isinstance(
                tiles, blocks.PipelineTiles
            )
            # A Mosaic program stops at the last tile of the array, not at that of its chunk.
            assert -(-rows // tiles.block_rows) * tiles.block_rows < 2**31
            assert tiles.num_columns * tiles.block_cols < 2**31


@pytest.mark.parametrize("lanes", [32, 64, 128])
def test_widening(lanes):
    for rows, channels in itertools.product(kernel_grid.ROWS, kernel_grid.CHANNELS):
        factor = pallas.widening(rows, channels, lanes)
        assert rows % factor == 0
        whole = factor * channels % lanes == 0
        assert whole or rows % (2 * factor), "a larger factor would have been possible"
        assert factor == 1 or (factor // 2 * channels) % lanes, "a smaller factor would have done"


def test_widened_rows_are_merged_again():
    """Unequal parts of x about 1e4, widened by 4: the statistics of the whole in float64."""
    x = np.random.default_rng(0).normal(1e4, 1, (1000, 24)).astype(np.float32)
    wide = np.asarray(pallas.widen(x, 4), np.float64)
    parts = [wide[:100], wide[100:107], wide[107:]]
    counts = np.repeat([len(part) for part in parts], 4).astype(np.float32)
    shift = np.stack([part[0] for part in parts]).astype(np.float32)
    offset = np.stack([(part - part[0]).mean(0) for part in parts]).astype(np.float32)
    m2 = np.stack([part.var(0) * len(part) for part in parts]).astype(np.float32)
    got = pallas.merge(counts, *pallas.narrow((shift, offset, m2), 4))
    want = oracle.moments(x)
    np.testing.assert_array_equal(got.count, want.count)
    # Float32 roundings of the parts: of m2 one each; of the mean one of shift - merged, whose size
    # is the deviation's.
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-6)
    mean = np.asarray(got.shift, np.float64) + np.asarray(got.offset, np.float64)
    np.testing.assert_allclose(mean, want.mean, rtol=0, atol=1e-6)
    assert math.isclose(float(np.abs(got.offset).max()), 0, abs_tol=5 * 2**-10), (
        "the mean, round_shift: 4 ulp of 1e4, and its own"
    )


@pytest.mark.parametrize("itemsizes", [(2,), (4,), (2, 2, 2), (4, 4, 4, 4, 4), (2, 4), (4, 2)])
def test_pipelines_cover_the_array_once_and_fit_shared_memory(itemsizes):
    for (rows, channels, itemsize), least in itertools.product(
        SIZES, (1, blocks.MIN_REDUCED_TILES)
    ):
        if itemsize != itemsizes[0] or channels * math.gcd(rows, 8) % 8:
            continue
        factor = pallas.widening(rows, channels, blocks.warp_lanes(itemsize))
        tiles = blocks.pipelined(rows // factor, factor * channels, itemsizes, least_tiles=least)
        _check_pipeline(tiles)
        assert (tiles.num_columns - 1) * tiles.block_cols < tiles.width <= tiles.padded_width, tiles
        assert math.prod(tiles.slots) * sum(itemsizes) <= 2 * blocks.RING_BYTES, tiles
        assert tiles.num_chunks * tiles.num_columns <= max(
            blocks.RINGS_PER_SM * blocks.NUM_SMS, tiles.num_columns
        ), tiles


def _check_pipeline(tiles):
    assert (tiles.num_chunks - 1) * tiles.chunk_rows < tiles.rows, tiles
    assert tiles.rows <= tiles.num_chunks * tiles.chunk_rows, tiles
    assert tiles.block_rows % tiles.register_rows == 0, tiles
    assert max(tiles.block_rows, tiles.block_cols) <= blocks.MAX_TMA_BOX, tiles
    threads = blocks.NUM_WARPS * blocks.WARP
    assert tiles.register_rows * tiles.block_cols == threads * tiles.vector, tiles


@pytest.mark.parametrize("itemsize", [2, 4])
def test_fused_kernels_fit_the_programs_that_run_at_once(itemsize):
    programs = blocks.NUM_SMS - blocks.SM_MARGIN
    for rows, channels in itertools.product(
        (1, 5, 49, 99, 333, 1000, 12544), (8, 24, 40, 56, 64, 320, 616, 1000, 1024, 2048)
    ):
        slab = blocks.resident(rows, channels, (itemsize,), programs)
        again = blocks.twice(rows, channels, (itemsize,) * 3, 2, programs)
        for tiles in filter(None, (slab, again)):
            _check_pipeline(tiles)
            # Mosaic compiles tiles beyond the last column only if a row of a tile fills a warp.
            whole = channels % tiles.block_cols == 0
            assert whole or tiles.block_cols == blocks.warp_lanes(itemsize), tiles
            assert tiles.padded_width < 2 * channels, tiles
            assert tiles.num_chunks * tiles.num_columns <= programs, tiles
            assert math.prod(tiles.slots) * itemsize <= blocks.SLAB_BYTES, tiles


def test_fused_kernels_decline_what_does_not_fit():
    programs = blocks.NUM_SMS - blocks.SM_MARGIN
    tiles = blocks.resident(12544, 1024, (2,), programs)
    assert tiles is not None
    assert tiles.steps == tiles.num_tiles
    assert blocks.resident(25088, 1024, (2,), programs) is None
    assert blocks.twice(25088, 1024, (2, 2, 2), 2, programs) is None
    for channels in (12, 77):
        assert blocks.resident(64, channels, (2,), programs) is None
    assert blocks.resident(64, 2048, (2,), programs=7) is None  # 8 tiles of columns
