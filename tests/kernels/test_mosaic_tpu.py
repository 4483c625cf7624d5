"""The TPU kernels: how they cut an array up, and compiled for chips that are not here.

Every function is compared with the oracle in test_contract.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import kernel_grid
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

import jbn
from jbn.bench import hlo, kernel_checks, targets
from jbn.kernels import mosaic_tpu, mosaic_tpu_blocks
from jbn.kernels.seam import Affine, StatsGradient

INTERPRET = "mosaic_tpu/interpret"
CHIPS = ("v5e", "v5p", "v6e")
# Larger than the VMEM of any chip, in each way that XLA lays an array out and with rows that fill
# no block.
LARGE = [
    ((128, 28, 28, 1024), "bfloat16"),  # batch beside channels
    ((128, 112, 112, 64), "bfloat16"),  # channels beside batch
    ((256, 32, 32, 256), "float32"),  # as written
    ((400003, 96), "float32"),  # channels beside rows, a prime number of them
    ((200003, 640), "bfloat16"),
]
RESIDENT = [
    ((128, 28, 28, 512), "bfloat16"),
    ((128, 56, 56, 64), "bfloat16"),
    ((64, 14, 14, 1024), "float32"),
]


# Each way to view an array, whole and with rows left over, by blocks small enough to need several
# here.
VIEWS = [
    ((16, 3, 5, 24), "float32", "relu", True),
    ((128, 2, 3, 40), "bfloat16", "gelu", True),
    ((3, 10, 200), "float32", "silu", False),
    ((2, 24, 256), "bfloat16", None, True),
    ((301, 24), "float32", "relu", False),
    ((40, 130), "bfloat16", "leaky_relu", True),
    ((5, 7, 12, 3), "float32", None, False),
]


@pytest.mark.parametrize(("shape", "dtype", "activation", "with_residual"), VIEWS)
def test_views_and_blocks(shape, dtype, activation, with_residual, monkeypatch):
    monkeypatch.setattr(mosaic_tpu_blocks, "STREAM_BYTES", 2**13)
    monkeypatch.setattr(mosaic_tpu_blocks, "CHUNK_SIZE", 2**11)
    jax.clear_caches()  # the constants are read while tracing
    rows, channels = int(np.prod(shape[:-1])), shape[-1]
    case = kernel_grid.Case(channels, rows, dtype, activation, with_residual, with_mean=True)
    kernel_grid.check(INTERPRET, case, shape)


@pytest.mark.parametrize("outlier", [0.0, 1e6, None])
def test_statistics_of_large_means(outlier, monkeypatch):
    """Mean 1e4, std 1, the first row far away: var and y are exact, whatever shift is guessed."""
    monkeypatch.setattr(mosaic_tpu_blocks, "STREAM_BYTES", 2**14)
    monkeypatch.setattr(mosaic_tpu_blocks, "CHUNK_SIZE", 2**12)
    x = (np.random.default_rng(0).standard_normal((5000, 8)) + 1e4).astype(np.float32)
    if outlier is not None:
        x[0] = outlier
    stats = mosaic_tpu.fwd_stats(jnp.asarray(x), jnp.full(8, -3e5), None, axis=(1,), interpret=True)
    want = oracle.moments(x)
    mean = np.asarray(stats.shift, np.float64) + np.asarray(stats.offset)
    std = np.sqrt(want.m2 / want.count)
    np.testing.assert_array_equal(stats.count, want.count)
    np.testing.assert_allclose(stats.m2, want.m2, rtol=1e-6)
    np.testing.assert_allclose(mean / std, want.mean / std, atol=1e-6)
    gain = jnp.asarray(1 / std, jnp.float32)
    affine = Affine(stats.shift, gain, -stats.offset * gain)
    y = mosaic_tpu.fwd_apply(
        jnp.asarray(x), affine, None, axis=(1,), activation=None, dtype=jnp.float32, interpret=True
    )
    np.testing.assert_allclose(y, (x - want.mean) / std, rtol=1e-6, atol=1e-5)


def test_half_of_the_rows_far_from_the_other():
    """The second half lies 1e4 from the first: m2 is then so large that no digit of it is lost."""
    x = np.random.default_rng(0).standard_normal((2**16, 128)).astype(np.float32)
    x[2**15 :] += 1e4
    assert mosaic_tpu_blocks.stream(x.shape, 4).grid[1] > 2
    stats = mosaic_tpu.fwd_stats(jnp.asarray(x), jnp.zeros(128), None, axis=(1,), interpret=True)
    np.testing.assert_allclose(stats.m2, oracle.moments(x).m2, rtol=1e-6)


# Each way to view an array; rows left over along the outer axis, along the inner one, and nowhere.
SIMULATED = [
    ((45, 24), "float32"),
    ((50, 40), "bfloat16"),
    pytest.param((3, 37, 200), "float32", marks=pytest.mark.slow),
    pytest.param((2, 24, 130), "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "dtype"), SIMULATED)
def test_memory_is_used_as_on_a_chip(shape, dtype, monkeypatch, capfd):
    """In the interpreter that simulates memory and copies.

    Memory that was not written is NaN, a read out of bounds is an error, and an access that no
    semaphore orders is printed as a race.
    """
    monkeypatch.setattr(mosaic_tpu_blocks, "STREAM_BYTES", 2**13)
    monkeypatch.setattr(mosaic_tpu_blocks, "CHUNK_SIZE", 2**12)
    assert np.prod(mosaic_tpu_blocks.stream(shape, jnp.dtype(dtype).itemsize).grid) > 1
    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    flat = kernel_checks.inputs(math.prod(shape[:-1]), shape[-1], dtype, with_residual=True)
    like_x = lambda a: a.reshape(shape) if a.ndim == 2 else a
    as_rows = lambda a: a.reshape(flat.x.shape) if a.ndim == len(shape) else a
    inputs = jax.tree.map(like_x, flat)
    for name in kernel_checks.PASSES:
        run = kernel_checks.function("mosaic_tpu", name, interpret=params)
        result = jax.tree.map(as_rows, jax.jit(run)(inputs))
        assert kernel_checks.error(name, flat, result) <= kernel_checks.tolerance(name, dtype)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_each_block_is_weighted_by_the_rows_before_it(monkeypatch):
    """Blocks far from each other, several along both row axes: a wrong count moves the mean."""
    monkeypatch.setattr(mosaic_tpu_blocks, "STREAM_BYTES", 2**13)
    monkeypatch.setattr(mosaic_tpu_blocks, "CHUNK_SIZE", 2**12)
    jax.clear_caches()  # the constants are read while tracing
    shape = (3, 37, 200)
    blocks = mosaic_tpu_blocks.stream(shape, 4)
    assert blocks.grid[1] > 1
    assert blocks.grid[2] > 1
    assert blocks.ragged
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x += 100 * np.square(np.arange(3 * 37)).reshape(3, 37, 1).astype(np.float32) / 1e3
    stats = mosaic_tpu.fwd_stats(jnp.asarray(x), jnp.zeros(200), None, axis=(2,), interpret=True)
    want = oracle.moments(x)
    np.testing.assert_allclose(stats.shift + stats.offset, want.mean, rtol=1e-6)
    np.testing.assert_allclose(stats.m2, want.m2, rtol=1e-6)


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_interpreted_inside_shard_map(axis_name):
    """With shard_map's default check of what varies: the same numbers as XLA's own functions."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    params, state = jbn.init(24)
    x = jax.random.normal(jax.random.key(0), (16, 5, 24))

    def forward_and_backward(implementation, x, params, dy):
        layer = lambda x, params: jbn.batch_norm_train(
            x,
            params,
            state,
            axis_name=axis_name,
            activation=jax.nn.relu,
            implementation=implementation,
        )[0]
        y, vjp = jax.vjp(layer, x, params)
        return y, vjp(dy)[0]

    split, whole = PartitionSpec("batch"), PartitionSpec()
    specs = {"in_specs": (split, whole, split), "out_specs": split}
    got, want = (
        jax.jit(jax.shard_map(functools.partial(forward_and_backward, name), mesh=mesh, **specs))(
            x, params, jnp.cos(x)
        )
        for name in (INTERPRET, "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_unsupported():
    state = jbn.State(jnp.zeros(4), jnp.ones(4), jnp.int32(0))
    params = jbn.Params(jnp.ones(4), jnp.zeros(4))
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, not float16"):
        jbn.batch_norm_train(jnp.ones((8, 4), jnp.float16), params, state, implementation=INTERPRET)
    with pytest.raises(NotImplementedError, match="channels last"):
        jbn.batch_norm_train(jnp.ones((8, 4, 3)), params, state, axis=1, implementation=INTERPRET)


@pytest.mark.parametrize(("shape", "dtype"), [*LARGE, *RESIDENT], ids=str)
def test_blocks_cover_every_row_once(shape, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    for blocks in (
        mosaic_tpu_blocks.stream(shape, itemsize),
        mosaic_tpu_blocks.resident(shape, itemsize, 1, 2**40),
    ):
        if blocks is None:
            continue
        assert blocks.outer * blocks.inner * blocks.channels == np.prod(shape)
        assert blocks.block_outer % blocks.chunk_outer == 0
        assert blocks.block_inner % blocks.chunk_inner == 0
        assert blocks.block_outer == 1 or blocks.block_inner == blocks.inner
        assert all(
            g * b >= s > (g - 1) * b for g, b, s in zip(*_grid_and_block(blocks), strict=True)
        )


def _grid_and_block(blocks):
    sizes = (blocks.channels, blocks.outer, blocks.inner)
    return blocks.grid, (blocks.block_channels, blocks.block_outer, blocks.block_inner), sizes


def _passes(chip, fn, x, *args):
    """Bytes that the compiled function moves, in units of x, and the names of its kernels."""
    run = hlo.operations(targets.compile_for(chip, fn, x, *args).as_text())
    names = {op.name.split(".")[0] for op in run if op.opcode == "custom-call"}
    return hlo.moved(run) / (x.size * x.dtype.itemsize), names - {
        "custom-call"
    }  # which is XLA's own, for buffers


@pytest.mark.aot("libtpu")
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("shape", "dtype"), LARGE, ids=str)
def test_compiled_passes(shape, dtype, chip):
    """Forward 3 passes over x, 4 with a residual; backward 5.

    With a residual 8: both kernels read y as well, and dresidual is written.
    """
    x, vector = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    axis = {"axis": (len(shape) - 1,), "interpret": False}

    def forward(x, scale, bias, residual=None):
        stats = mosaic_tpu.fwd_stats(x, scale, None, **axis)
        gain = scale * jax.lax.rsqrt(stats.m2 / stats.count + 1e-5)
        affine = Affine(stats.shift, gain, bias - stats.offset * gain)
        return mosaic_tpu.fwd_apply(
            x, affine, residual, activation=jax.nn.relu, dtype=dtype, **axis
        )

    def backward(x, dy, affine, stats_gradient, y=None):
        known = {"saved": y, "weights": None, "activation": jax.nn.relu, **axis}
        sums = mosaic_tpu.bwd_stats(x, dy, affine, **known)
        # The second kernel needs the sums, as in the derivative rule.
        stats_gradient = StatsGradient(
            stats_gradient.slope + sums[1], stats_gradient.intercept + sums[0]
        )
        return sums, mosaic_tpu.bwd_apply(
            x,
            dy,
            affine,
            stats_gradient=stats_gradient,
            residual_dtype=None if y is None else dtype,
            **known,
        )

    small = 0.02  # vectors
    affine, stats_gradient = Affine(*[vector] * 3), StatsGradient(vector, vector)
    passes, kernels = _passes(chip, forward, x, vector, vector)
    assert kernels == {"fwd_stats", "fwd_apply"}
    assert passes <= 3 + small
    assert _passes(chip, forward, x, vector, vector, x)[0] <= 4 + small
    passes, kernels = _passes(chip, backward, x, x, affine, stats_gradient)
    assert kernels == {"bwd_stats", "bwd_apply"}
    assert passes <= 5 + small
    assert _passes(chip, backward, x, x, affine, stats_gradient, x)[0] <= 8 + small


@pytest.mark.aot("libtpu")
@pytest.mark.parametrize(("shape", "dtype"), RESIDENT, ids=str)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiled_fused_passes(shape, dtype, chip):
    """By the public call: forward 2 passes where two arrays fit VMEM, backward 3 if three do."""
    x, vector = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    state = jbn.State(vector, vector, jax.ShapeDtypeStruct((), jnp.int32))

    def forward(x, params, state):
        return jbn.batch_norm_train(
            x, params, state, activation=jax.nn.relu, implementation="mosaic_tpu"
        )

    def both(x, params, state, dy):
        y, stats_gradient, new = jax.vjp(
            lambda x, params: forward(x, params, state), x, params, has_aux=True
        )
        return y, new, stats_gradient(dy)

    params = jbn.Params(vector, vector)
    passes, kernels = _passes(chip, forward, x, params, state)
    assert kernels == {"fwd_fused"}
    assert passes <= 2.02
    passes, kernels = _passes(chip, both, x, params, state, x)
    if (
        mosaic_tpu_blocks.resident(
            shape, x.dtype.itemsize, 3, mosaic_tpu_blocks.VMEM_BYTES[f"TPU {chip}"]
        )
        is None
    ):
        assert kernels == {"fwd_fused", "bwd_stats", "bwd_apply"}
    else:
        assert kernels == {"fwd_fused", "bwd_fused"}
        assert passes <= 5.04


@pytest.mark.aot("libtpu")
@pytest.mark.parametrize("activation", kernel_grid.ACTIVATIONS)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_activation_compiles(chip, activation):
    act = None if activation is None else getattr(jax.nn, activation)
    apart, in_one = {"fwd_stats", "fwd_apply", "bwd_stats", "bwd_apply"}, {"fwd_fused", "bwd_fused"}
    for shape, dtype, expected in (
        ((128, 112, 112, 96), jnp.bfloat16, apart),
        ((400003, 130), jnp.float32, apart),
        ((64, 7, 7, 96), jnp.bfloat16, in_one),
        ((1000, 1000), jnp.float32, in_one),
        ((63, 3), jnp.float32, in_one),
    ):
        x, vector = (
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        )

        def step(x, residual, scale, bias, dy):
            state = jbn.State(scale, bias, jnp.int32(0))
            layer = lambda x, residual, scale, bias: jbn.batch_norm_train(
                x,
                jbn.Params(scale, bias),
                state,
                residual=residual,
                activation=act,
                implementation="mosaic_tpu",
            )
            y, stats_gradient, _ = jax.vjp(layer, x, residual, scale, bias, has_aux=True)
            return y, stats_gradient(dy)

        kernels = _passes(chip, step, x, x, vector, vector, x)[1]
        assert kernels == expected
