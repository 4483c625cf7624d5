"""XLA's own fusions on GPU: right on any platform, few passes when compiled for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn
from jbn.bench import hlo, targets
from jbn.kernels import xla_gpu


@pytest.mark.parametrize("axis", [(1,), (0, 2)])
def test_other_layouts(axis):
    generator = np.random.default_rng(0)
    x = generator.normal(1e4, 1, (6, 4, 50, 3)).astype(np.float32)
    got = _stats(x, axis)
    want = oracle.moments(x, axis)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-6)


def test_bfloat16_sum_with_a_residual():
    """bn(x) is rounded before the sum, as XLA's fusions need it, and y masks the cotangent."""
    generator = np.random.default_rng(0)
    x, residual, dy = generator.standard_normal((3, 500, 16)).astype(jnp.bfloat16)
    affine = xla_gpu.Affine(*np.float32(np.broadcast_to([[0.1], [1.3], [0.2]], (3, 16))))
    known = {"axis": (1,), "activation": jax.nn.relu}
    y = xla_gpu.fwd_apply(x, affine, residual, dtype=x.dtype, **known)
    # var such that 1 / sqrt(var + eps) is the gain.
    given = {"mean": np.full(16, 0.1), "var": np.full(16, 1.3**-2 - 1e-5), "bias": np.full(16, 0.2)}
    size = 2 * np.abs(oracle.normalize(x, **given)) + np.abs(
        residual.astype(np.float64)
    )  # of the two roundings
    want = oracle.normalize(x, residual=residual, activation="relu", **given)
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - want), 2.0**-8 * size + 1e-5)
    known |= {"saved": y, "weights": None}
    dx, dresidual = xla_gpu.bwd_apply(
        x, dy, affine, stats_gradient=None, residual_dtype=dy.dtype, **known
    )
    dz = np.where(np.asarray(y, np.float64) > 0, dy.astype(np.float64), 0)
    np.testing.assert_array_equal(np.asarray(dresidual, np.float64), dz)
    np.testing.assert_allclose(np.asarray(dx, np.float64), 1.3 * dz, rtol=2.0**-8)
    sum_dz, sum_dz_xc = xla_gpu.bwd_stats(x, dy, affine, **known)
    np.testing.assert_allclose(sum_dz, dz.sum(0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        sum_dz_xc, (dz * (x.astype(np.float64) - 0.1)).sum(0), rtol=0, atol=1e-4
    )


def test_packed_mask_comes_back():
    mask = np.random.default_rng(0).random((3, 5, 24)) > 0.4
    packed = xla_gpu._pack(jnp.asarray(mask))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (3, 5, 3)
    np.testing.assert_array_equal(xla_gpu._unpack(packed), mask)


@pytest.mark.parametrize("channels", [16, 12], ids=["packed", "not packed"])
def test_mask_of_the_saved_output(channels):
    generator = np.random.default_rng(0)
    x, dy, y = (jnp.asarray(a, jnp.float32) for a in generator.normal(0, 1, (3, 40, channels)))
    y = jax.nn.relu(y)
    affine = xla_gpu.Affine(*jnp.ones((3, channels)))
    known = {"saved": y, "weights": None, "axis": (1,), "activation": jax.nn.relu}
    _, dz = xla_gpu.bwd_apply(x, dy, affine, stats_gradient=None, residual_dtype=dy.dtype, **known)
    np.testing.assert_array_equal(dz, np.where(np.asarray(y) > 0, dy, 0))
    assert ("shift_left" in str(_jaxpr(x, dy, affine, known))) == (channels == 16)


def _jaxpr(x, dy, affine, known):
    sums = lambda x, dy: xla_gpu.bwd_stats(x, dy, affine, **known)
    return jax.make_jaxpr(sums)(x, dy)


def _stats(x, axis=(1,), guess=0.0):
    features = tuple(x.shape[a] for a in axis)
    return jax.jit(xla_gpu.fwd_stats, static_argnames="axis")(
        x, jnp.full(features, guess), None, axis=axis
    )


@pytest.mark.parametrize("guess", [0.0, 1e4, -1e7, np.nan])
def test_statistics_do_not_depend_on_the_guess(guess):
    x = np.random.default_rng(0).normal(1e4, 1, (3000, 8)).astype(np.float32)
    got, want = _stats(x, guess=guess), oracle.moments(x)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-6)
    mean = np.asarray(got.shift, np.float64) + np.asarray(got.offset, np.float64)
    np.testing.assert_allclose(mean, want.mean, rtol=0, atol=1e-6)


def _sampled_rows(rows):
    """Which rows of [rows, 1] the shift is taken from."""
    return np.asarray(xla_gpu._sample(jnp.arange(rows)[:, None], (0,)))[:, 0]


@pytest.mark.parametrize("place", ["first", "sampled", "last"])
def test_one_far_off_row_among_a_million(place):
    x = np.random.default_rng(0).normal(1e4, 1, (2**20, 1)).astype(np.float32)
    x[{"first": 0, "sampled": _sampled_rows(len(x))[7], "last": -1}[place]] = 0
    np.testing.assert_allclose(_stats(x).m2, oracle.moments(x).m2, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_rows_stay_in_their_channels(bad):
    x = np.random.default_rng(0).normal(1e4, 1, (1000, 6)).astype(np.float32)
    x[_sampled_rows(len(x))[:5], :2] = bad
    got, want = _stats(x, guess=1e4), oracle.moments(x[:, 2:])
    assert np.isfinite(got.shift).all()
    assert not np.isfinite(got.m2[:2]).any()
    np.testing.assert_allclose(got.m2[2:], want.m2, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows(rows):
    x = np.random.default_rng(0).normal(1e4, 1, (rows, 6)).astype(np.float32)
    # One rounding of x - shift, at the size of a float32 step at 1e4, is 1e-3 / 2 of the spread at
    # most.
    np.testing.assert_allclose(_stats(x).m2, oracle.moments(x).m2, rtol=1e-5, atol=1e-6)


def _traffic(activation, with_residual, dtype=jnp.bfloat16):
    """(moved, temporary) of forward and backward in one program, in units of the bytes of x."""
    x, vector = (
        jax.ShapeDtypeStruct((128, 28, 28, 512), dtype),
        jax.ShapeDtypeStruct((512,), jnp.float32),
    )
    state = jbn.State(vector, vector, jax.ShapeDtypeStruct((), jnp.int32))

    def forward_and_backward(x, params, state, residual, dy):
        layer = lambda *args: jbn.batch_norm_train(
            *args[:2], state, residual=args[2], activation=activation
        )
        y, stats_gradient, state = jax.vjp(layer, x, params, residual, has_aux=True)
        return y, state, stats_gradient(dy)

    arguments = (x, jbn.Params(vector, vector), state, x if with_residual else None, x)
    compiled = targets.compile_for("h200", forward_and_backward, *arguments)
    text = compiled.as_text()
    assert "conditional" not in text, "a GPU waits for the host at each"
    unit = x.size * jnp.dtype(dtype).itemsize
    return hlo.moved(
        hlo.operations(text)
    ) / unit, compiled.memory_analysis().temp_size_in_bytes / unit


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize(
    ("activation", "with_residual", "passes"),
    [
        (None, False, 7),
        (jax.nn.relu, False, 7),
        (jax.nn.silu, False, 7),
        (jax.nn.relu, True, 10.1),
        (jax.nn.silu, True, 10),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_passes_over_memory(activation, with_residual, passes, dtype):
    """One pass less than of a network's layer, 3 + 5: here y and dx share their reading of x."""
    moved, temporary = _traffic(activation, with_residual, dtype)
    assert moved <= passes + 0.1
    assert temporary <= 0.1, "nothing of the size of x but what the caller gets"


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize(
    ("follow", "passes"),
    [
        # Statistics, then y and its mean, then the product: squeeze-and-excitation.
        (lambda y: y * jax.nn.sigmoid(y.mean((1, 2), keepdims=True)), 1 + 2 + 2),
        # Statistics, then y with its padding, as before a convolution with a stride.
        (lambda y: jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), 1 + 2),
    ],
    ids=["squeeze", "pad"],
)
def test_silu_is_fused_with_what_follows(follow, passes):
    def forward(x, params, state):
        y, state = jbn.batch_norm_train(x, params, state, activation=jax.nn.silu)
        return follow(y), state

    x = jax.ShapeDtypeStruct((128, 28, 28, 240), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((240,), jnp.float32)
    state = jbn.State(vector, vector, jax.ShapeDtypeStruct((), jnp.int32))
    compiled = targets.compile_for("h200", forward, x, jbn.Params(vector, vector), state)
    moved = hlo.moved(hlo.operations(compiled.as_text()))
    assert moved <= (passes + 0.2) * 2 * x.size


@pytest.mark.aot("jax_cuda13_plugin")
def test_no_mask_of_bools_is_stored():
    """Between two convolutions, where XLA would write relu's mask beside y."""

    def loss(kernels, params, state, x):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, _ = jbn.batch_norm_train(x, params, state, activation=jax.nn.relu)
        return x.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((128, 28, 28, 128), jnp.bfloat16)
    kernels = [jax.ShapeDtypeStruct((1, 1, 128, 128), x.dtype)] * 2
    vector = jax.ShapeDtypeStruct((128,), jnp.float32)
    state = jbn.State(vector, vector, jax.ShapeDtypeStruct((), jnp.int32))
    step = jax.grad(loss, argnums=(0, 1))
    compiled = targets.compile_for("h200", step, kernels, jbn.Params(vector, vector), state, x)
    results = [op.result for op in hlo.operations(compiled.as_text())]
    assert "bf16[128,28,28,128]" in " ".join(results)
    assert not [result for result in results if "pred[128,28" in result]
