"""The jnp functions for TPU: their numbers on CPU, and what the TPU compiler makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jbn
from jbn.bench import hlo, targets
from jbn.kernels import xla_tpu
from jbn.kernels.seam import Affine

AXIS = (1,)


def _inputs(mean, dtype=np.float32):
    generator = np.random.default_rng(0)
    x, dy, residual = generator.standard_normal((3, 600, 8))
    return (jnp.asarray(a, dtype) for a in (x + mean, dy, residual))


@pytest.mark.parametrize("guess", [0.0, 9.0, 1e4, -3e5, 1e9, 1e30, np.nan])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
def test_statistics_whatever_the_guess(mean, guess):
    """Near guesses by one pass, others by two: var to 2e-5, the bound behind MAX_SQUARED_MEAN."""
    x, _, _ = _inputs(mean)
    stats = jax.jit(lambda x, guess: xla_tpu.fwd_stats(x, guess, None, axis=AXIS))(
        x, jnp.full(8, guess, jnp.float32)
    )
    want = oracle.moments(x)
    np.testing.assert_array_equal(stats.count, want.count)
    np.testing.assert_allclose(stats.m2, want.m2, rtol=2e-5)
    found = np.asarray(stats.shift, np.float64) + np.asarray(stats.offset)
    np.testing.assert_allclose(found, want.mean, atol=2e-6 * np.sqrt(want.m2 / want.count).max())


@pytest.mark.parametrize("guess", [0.0, 1e4, np.nan, 1e30])
def test_bfloat16_takes_the_second_look_too(guess):
    x, _, _ = _inputs(0.0, jnp.bfloat16)
    stats = jax.jit(lambda x, guess: xla_tpu.fwd_stats(x, guess, None, axis=AXIS))(
        x, jnp.full(8, guess, jnp.float32)
    )
    np.testing.assert_allclose(stats.m2, oracle.moments(x).m2, rtol=2e-5)


def test_weights_never_read_what_they_exclude():
    x, dy, _ = _inputs(0.0)
    weights = jnp.arange(600)[:, None] % 3 > 0
    x, dy = (jnp.where(weights, a, jnp.nan) for a in (x, dy))
    stats = xla_tpu.fwd_stats(x, jnp.zeros(8), weights, axis=AXIS)
    want = oracle.moments(np.asarray(x), (1,), np.asarray(weights))
    np.testing.assert_allclose(stats.m2, want.m2, rtol=1e-5)
    affine = Affine(stats.shift, jnp.ones(8), -stats.offset)
    common = {"saved": None, "weights": weights, "axis": AXIS, "activation": None}
    readable = jnp.where(weights, x, 0)
    assert np.isfinite(xla_tpu.bwd_stats(readable, dy, affine, **common)).all()


def _block(x, kernel, params, state, residual):
    """A 1x1 convolution and its batch norm, as in a ResNet."""
    x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jbn.batch_norm_train(x, params, state, residual=residual, activation=jax.nn.relu)


def _arguments(batch, features, place=lambda spec: None):
    rows, whole = place(PartitionSpec("batch")), place(PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, 28, 28, 128), jnp.bfloat16, sharding=rows)
    residual = jax.ShapeDtypeStruct((batch, 28, 28, features), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((1, 1, 128, features), jnp.bfloat16, sharding=whole)
    vector = jax.ShapeDtypeStruct((features,), jnp.float32, sharding=whole)
    state = jbn.State(vector, vector, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))
    return x, kernel, jbn.Params(vector, vector), state, residual


@pytest.mark.aot("libtpu")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_statistics_stay_in_the_convolution(chip):
    """With a near running mean: the convolution with its statistics, one pass for y, no more."""
    text = targets.compile_for(chip, _block, *_arguments(128, 512)).as_text()
    run = hlo.operations(text, branch=hlo.cheapest)
    size = 2 * 128 * 28 * 28 * 512
    large = [op for op in run if op.moved > size / 2]
    assert [op.is_product for op in large] == [True, False], large
    # x in, conv out; conv out, residual and y.
    assert hlo.moved(large) <= (0.25 + 1 + 3) * size * 1.05


@pytest.mark.aot("libtpu")
def test_only_vectors_between_chips():
    mesh = Mesh(np.array(targets.devices("v5e:4x4")), ("batch",))
    arguments = _arguments(16 * 32, 256, functools.partial(NamedSharding, mesh))

    def loss(x, kernel, params, state, residual):
        y, state = _block(x, kernel, params, state, residual)
        return y.astype(jnp.float32).sum(), state

    step = jax.grad(loss, argnums=(0, 2), has_aux=True)
    found = hlo.collectives(targets.compile_for("v5e:4x4", step, *arguments).as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(hlo.nbytes(result) for _, result in found) <= 4 * 4 * 256
