"""init, batch_norm_train, batch_norm_eval and normalize against the float64 oracle."""
# Options travel in dicts of mixed values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false,
# reportOptionalMemberAccess=false

import contextlib
import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from jbn.core import layer as core_layer


def draw(shape, dtype="float32", *, seed=0, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, shape), dtype)


def layer(features, dtype="float32", seed=1):
    """Params and a state none of whose values is 0 or 1."""
    scale, bias, mean, var = np.random.default_rng(seed).uniform(
        0.5, 2, (4, *np.atleast_1d(features))
    )
    arrays = [jnp.asarray(a, dtype) for a in (scale, bias, mean, var)]
    return jbn.Params(*arrays[:2]), jbn.State(*arrays[2:], count=jnp.int32(0))


def draw_weights(kind, shape, seed=2):
    """Of one example, of one element, or floating ones of which some are zero."""
    uniform = np.random.default_rng(seed).uniform
    per_example = (shape[0],) + (1,) * (len(shape) - 1)
    if kind == "examples":
        return jnp.asarray(uniform(size=per_example) < 0.7).at[0].set(True)
    if kind == "elements":
        return jnp.asarray(uniform(size=shape) < 0.7)
    return jnp.asarray(np.maximum(uniform(-0.5, 2, per_example), 0), jnp.float32).at[0].set(1.5)


def function(name):
    return None if name is None else getattr(jax.nn, name)


def wide(array):
    return np.asarray(array).astype(np.float64)


def assert_close(actual, expected, *, terms=1):
    """Within the random walk of `terms` roundings of the accumulator, 8 times over, and one of the
    dtype itself.

    Relative to the largest value, because a sum that cancels keeps the error of its terms.
    """
    accumulator = np.promote_types(actual.dtype, np.float32)
    rtol = 8 * float(jnp.finfo(accumulator).eps) * terms**0.5 + float(jnp.finfo(actual.dtype).eps)
    actual, expected = wide(actual), wide(expected)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(
        actual, expected, rtol=rtol, atol=rtol * max(1.0, np.abs(expected).max())
    )


# (shape, axis, dtype, weights, residual, activation): pairwise, odd channel counts, M = 2 and more.
FORWARD = [
    ((6, 5), -1, "float32", None, False, None),
    ((8, 7), 1, "float32", "examples", True, "relu"),
    ((4, 3, 3, 13), -1, "float32", None, True, "silu"),
    ((4, 13, 3, 5), 1, "float32", None, True, "relu"),
    ((4, 13, 3, 5), 1, "float32", "elements", False, "gelu"),
    ((4, 3, 2, 5), (1, 3), "float32", "float", True, "leaky_relu"),
    ((3, 2, 5), (0, 2), "float32", None, False, "leaky_relu"),
    ((5, 4), 0, "float32", "elements", False, None),
    ((2, 3, 2, 2, 3, 3), (-1, 1), "float32", None, False, "silu"),
    ((8, 3, 24), -1, "bfloat16", None, False, "relu"),
    ((8, 3, 5), 1, "bfloat16", "float", True, "gelu"),
    ((7, 5), -1, "float16", "elements", True, None),
    ((9, 17), -1, "float16", None, False, "silu"),
]


@pytest.mark.optimized
@pytest.mark.parametrize(("shape", "axis", "dtype", "weights", "residual", "activation"), FORWARD)
def test_train_equals_the_oracle(shape, axis, dtype, weights, residual, activation):
    x = draw(shape, dtype, mean=0.5)
    axes = np.atleast_1d(axis)
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in axes))
    params, state = layer(features)
    options = {
        "weights": weights and draw_weights(weights, shape),
        "residual": draw(shape, dtype, seed=3) if residual else None,
    }
    y, new = jbn.batch_norm_train(
        x,
        params,
        state,
        axis=axis,
        momentum=0.9,
        eps=1e-3,
        activation=function(activation),
        **options,
    )
    expected, m = oracle.forward(x, *params, axis=axes, eps=1e-3, activation=activation, **options)
    rows = x.size // np.prod(features)
    assert y.dtype == x.dtype
    assert_close(y, expected, terms=rows)
    expected = oracle.running(oracle.State(*state), m, 0.9)
    assert_close(new.mean, expected.mean, terms=rows)
    assert_close(new.var, expected.var, terms=rows)
    assert new.count == 1


@pytest.mark.x64
@pytest.mark.parametrize("weights", [None, "elements"])
def test_train_in_float64(weights):
    x, residual = draw((6, 3, 5), "float64", mean=3), draw((6, 3, 5), "float64", seed=3)
    params, state = layer(3, "float64")
    options = {
        "axis": (1,),
        "weights": weights and draw_weights(weights, x.shape),
        "residual": residual,
    }
    y, new = jbn.batch_norm_train(x, params, state, activation=jax.nn.gelu, momentum=0.5, **options)
    expected, m = oracle.forward(x, *params, activation="gelu", **options)
    assert {a.dtype for a in (y, new.mean, new.var)} == {jnp.dtype("float64")}
    assert_close(y, expected, terms=30)
    assert_close(new.var, oracle.running(oracle.State(*state), m, 0.5).var, terms=30)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "residual", "activation"),
    [
        ((6, 5), -1, "float32", False, None),
        ((5,), 0, "float32", True, "relu"),
        ((4, 3, 2, 5), (1, 3), "float32", True, "silu"),
        ((4, 13, 3), 1, "bfloat16", True, "leaky_relu"),
        ((0, 5), -1, "float32", False, "gelu"),
    ],
)
def test_eval_and_normalize_equal_the_oracle(shape, axis, dtype, residual, activation):
    x = draw(shape, dtype)
    axes = np.atleast_1d(axis)
    params, state = layer(tuple(shape[a] for a in axes))
    residual = draw(shape, dtype, seed=3) if residual else None
    common = {"axis": axis, "eps": 0.1, "residual": residual, "activation": function(activation)}
    y = jbn.batch_norm_eval(x, params, state, **common)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, jbn.normalize(x, state.mean, state.var, params, **common))
    if x.size:
        options = {"axis": axes, "eps": 0.1, "residual": residual, "activation": activation}
        assert_close(y, oracle.normalize(x, state.mean, state.var, *params, **options))


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_rows(rows, channels):
    x = draw((rows, channels), mean=2)
    params, state = layer(channels)
    y, new = jbn.batch_norm_train(x, params, state, momentum=0.0)
    expected, m = oracle.forward(x, *params)
    # eps is small beside var, so an error of var is one of y: cancellation in (x - mean) costs mean
    # / std more.
    assert_close(y, expected, terms=16)
    assert_close(new.var, oracle.variance(m), terms=16)


@pytest.mark.parametrize("counted", [1, 2])
def test_one_row_counts_among_masked_ones(counted):
    """The variance of a single value is 0, and y is bias there."""
    x = draw((4, 3))
    weights = jnp.arange(4)[:, None] < counted
    params, state = layer(3)
    y, new = jbn.batch_norm_train(x, params, state, weights=weights, momentum=0.0, eps=0.1)
    expected, m = oracle.forward(x, *params, weights=weights, eps=0.1)
    assert_close(y, expected)
    np.testing.assert_allclose(new.var, oracle.variance(m), rtol=1e-6, atol=1e-7)
    if counted == 1:
        np.testing.assert_allclose(y[0], params.bias, atol=1e-6)


def test_eval_after_1_2_and_10_steps():
    """The running averages by hand: a geometric series of the batches' moments."""
    params, state = layer(3)
    start, probe, seen = state, draw((5, 3), seed=99), []
    for step in range(1, 11):
        x = draw((8, 3), seed=step, mean=step, std=1 + step / 4)
        seen.append((np.mean(wide(x), 0), np.var(wide(x), 0)))
        _, state = jbn.batch_norm_train(x, params, state, momentum=0.7)
        if step in (1, 2, 10):
            mean, var = (
                0.7**step * np.asarray(first)
                + sum(0.3 * 0.7 ** (step - 1 - i) * batch[which] for i, batch in enumerate(seen))
                for which, first in enumerate((start.mean, start.var))
            )
            expected = (np.asarray(probe) - mean) / np.sqrt(var + 1e-5) * np.asarray(
                params.scale
            ) + np.asarray(params.bias)
            assert_close(jbn.batch_norm_eval(probe, params, state), expected, terms=step * 8)
            assert state.count == step


def test_eval_after_cumulative_steps():
    """momentum=None: the plain average of what each batch said."""
    params, state = layer(3)
    batches = [draw((8, 3), seed=step, mean=step) for step in range(4)]
    for x in batches:
        _, state = jbn.batch_norm_train(x, params, state, momentum=None, unbiased=True)
    assert_close(state.mean, np.mean([np.mean(wide(x), 0) for x in batches], 0), terms=8)
    assert_close(state.var, np.mean([np.var(wide(x), 0, ddof=1) for x in batches], 0), terms=8)


@pytest.mark.optimized
def test_mean_1e4_std_1():
    """Float32 keeps x itself to 5e-4; given that x, var and y are right to float32."""
    x = draw((4096, 64), mean=1e4)
    params, state = jbn.init(64)
    y, new = jbn.batch_norm_train(x, params, state, momentum=0.0)
    expected, m = oracle.forward(x)
    np.testing.assert_allclose(new.var, oracle.variance(m), rtol=1e-5)
    np.testing.assert_allclose(np.std(wide(y), 0), 1, rtol=1e-3)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def ways_to_call(way, x, train):
    """y of x [2, rows, channels] normalized over both leading axes."""
    if way == "plain":
        return train(x)
    if way == "weights":
        return train(x, weights=jnp.ones((2, 1, 1), bool))
    if way == "vmap":
        return jax.vmap(lambda x: train(x, axis_name="i"), axis_name="i")(x)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            lambda x: train(x, axis_name="i"), mesh=mesh, in_specs=P("i"), out_specs=P("i")
        )
    )(x)


@pytest.mark.optimized
@pytest.mark.parametrize("way", ["plain", "weights", "vmap", "shard_map"])
def test_mean_1e4_keeps_its_digits_everywhere(way):
    """Every use of the shift must read the same number: y was off by 4e-4 here."""
    x = draw((2, 4095, 3), mean=1e4)
    train = lambda x, **options: jbn.batch_norm_train(x, *jbn.init(3), **options)[0]
    np.testing.assert_allclose(ways_to_call(way, x, train), oracle.forward(x)[0], atol=1e-5)


def unlike_the_guess(kind):
    """Data for which some cheap guess of the mean is far off: (x, state, weights)."""
    rng = np.random.default_rng(0)
    _, state = jbn.init(2)
    if kind == "stale running mean":
        return (
            jnp.asarray(rng.normal(size=(4096, 2)), jnp.float32),
            state._replace(mean=jnp.full(2, 1e4)),
            None,
        )
    x = rng.normal(1e4, 1, size=(2**20 if kind == "zero first row" else 4096, 2))
    x[0] = {
        "zero first row": 0,
        "masked first row": 0,
        "NaN first row": np.nan,
        "inf first row": np.inf,
    }[kind]
    weights = None if kind == "zero first row" else jnp.arange(len(x))[:, None] > 0
    return jnp.asarray(x, jnp.float32), state, weights


@pytest.mark.optimized
@pytest.mark.parametrize(
    "kind",
    ["stale running mean", "zero first row", "masked first row", "NaN first row", "inf first row"],
)
def test_a_guess_far_off(kind):
    x, state, weights = unlike_the_guess(kind)
    params, _ = jbn.init(2)
    y, new = jbn.batch_norm_train(x, params, state, momentum=0.0, weights=weights)
    expected, m = oracle.forward(x, weights=weights)
    np.testing.assert_allclose(new.var, oracle.variance(m), rtol=1e-3)
    read = np.isfinite(x).all(1)
    # An error of 1e-3 of var is half that of y.
    np.testing.assert_allclose(y[read], expected[read], rtol=5e-4, atol=5e-5)
    # What is not finite is read as the mean rounded to x's dtype.
    np.testing.assert_allclose(y[~read], 0, atol=1e4 * float(jnp.finfo(x.dtype).eps))


@pytest.mark.optimized
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4, -7.25e5])
def test_constant_channels(value):
    """Variance 0, never negative or NaN; y is the bias."""
    x = jnp.full((12, 5), value, jnp.float32)
    params, state = layer(5)
    y, new = jbn.batch_norm_train(x, params, state, momentum=0.0)
    np.testing.assert_allclose(new.mean, value, rtol=1e-6)
    np.testing.assert_array_equal(new.var, 0)
    np.testing.assert_allclose(y, np.broadcast_to(params.bias, x.shape), rtol=1e-6)


def test_a_constant_channel_beside_others():
    x = draw((64, 3), mean=5).at[:, 1].set(1e3)
    y, new = jbn.batch_norm_train(x, *jbn.init(3), momentum=0.0)
    assert_close(y, oracle.forward(x)[0], terms=64)
    assert new.var[1] == 0


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_element_may_hold_anything(hole, dtype):
    x = draw((6, 4, 3), dtype)
    weights = jnp.arange(6)[:, None, None] != 2
    params, state = layer(3)
    broken = x.at[2].set(hole)
    y, new = jbn.batch_norm_train(broken, params, state, weights=weights)
    clean_y, clean = jbn.batch_norm_train(x, params, state, weights=weights)
    np.testing.assert_array_equal(y[weights[:, 0, 0]], clean_y[weights[:, 0, 0]])
    jax.tree.map(np.testing.assert_array_equal, new, clean)
    if not np.isfinite(hole):
        assert_close(y[2], np.broadcast_to(params.bias, y[2].shape))


@pytest.mark.parametrize("holes", [False, True])
def test_nothing_counted(holes):
    """State unchanged, y finite."""
    x = draw((6, 3)) if not holes else jnp.full((6, 3), jnp.nan)
    params, state = layer(3)
    y, new = jbn.batch_norm_train(x, params, state, weights=jnp.zeros((6, 1), bool))
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, new, state)
    assert_close(y, oracle.forward(x, *params, weights=np.zeros((6, 1)))[0])


def test_one_channel_counts_nothing():
    """It keeps its running values; the others move on."""
    x = draw((6, 3))
    params, state = layer(3)
    weights = jnp.ones((6, 3), bool).at[:, 1].set(False)
    y, new = jbn.batch_norm_train(x, params, state, weights=weights, momentum=0.5)
    expected, m = oracle.forward(x, *params, weights=weights)
    assert_close(y, expected, terms=6)
    assert_close(new.var, oracle.running(oracle.State(*state), m, 0.5).var, terms=6)
    assert new.mean[1] == state.mean[1]
    assert new.count == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skip_nonfinite(bad):
    params, state = layer(3)
    x = draw((6, 3)).at[1, 1].set(bad)
    _, kept = jbn.batch_norm_train(x, params, state, skip_nonfinite=True)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    _, poisoned = jbn.batch_norm_train(x, params, state)
    assert not np.isfinite(poisoned.mean[1])
    _, moved = jbn.batch_norm_train(draw((6, 3)), params, state, skip_nonfinite=True)
    assert moved.count == 1


def test_unbiased_is_pytorchs_variance():
    x = draw((6, 3))
    _, new = jbn.batch_norm_train(x, *layer(3), momentum=0.0, unbiased=True)
    assert_close(new.var, np.var(wide(x), 0, ddof=1), terms=6)
    # count <= 1: the biased one
    _, new = jbn.batch_norm_train(
        x, *layer(3), momentum=0.0, unbiased=True, weights=jnp.arange(6)[:, None] < 1
    )
    np.testing.assert_allclose(new.var, 0, atol=1e-7)


def test_feature_axes_are_taken_in_ascending_order():
    x = draw((4, 3, 2, 5))
    params, state = layer((3, 5))
    expected = jbn.batch_norm_train(x, params, state, axis=(1, 3))
    for axis in ((3, 1), (-1, 1), [1, -1]):
        jax.tree.map(
            np.testing.assert_array_equal,
            jbn.batch_norm_train(x, params, state, axis=axis),
            expected,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_output_dtype(dtype):
    x = draw((6, 3), "bfloat16")
    params, state = layer(3)
    y, new = jbn.batch_norm_train(x, params, state, dtype=dtype, activation=jax.nn.relu)
    assert y.dtype == dtype
    assert new.mean.dtype == jnp.float32
    assert_close(y, oracle.forward(x, *params, activation="relu")[0], terms=6)
    assert jbn.batch_norm_eval(x, params, state, dtype=dtype, activation=jnp.tanh).dtype == dtype


@pytest.mark.x64
def test_the_state_keeps_its_dtype():
    params, state = layer(3)
    x = draw((6, 3))
    for dtype in ("float32", "float64"):
        given = state._replace(mean=state.mean.astype(dtype), var=state.var.astype(dtype))
        _, new = jbn.batch_norm_train(x, params, given, momentum=0.5)
        assert (new.mean.dtype, new.var.dtype, new.count.dtype) == (dtype, dtype, jnp.int32)
        expected = oracle.running(oracle.State(*state), oracle.moments(x), 0.5)
        np.testing.assert_allclose(new.var, expected.var, rtol=1e-6)


def test_init():
    params, state = jbn.init((2, 3))
    np.testing.assert_array_equal(params.scale, np.ones((2, 3)))
    np.testing.assert_array_equal(params.bias, np.zeros((2, 3)))
    np.testing.assert_array_equal(state.mean, np.zeros((2, 3)))
    np.testing.assert_array_equal(state.var, np.ones((2, 3)))
    assert state.count == 0
    assert (state.count.dtype, state.mean.dtype) == (jnp.int32, jnp.float32)
    params, state = jbn.init(3, param_dtype=jnp.bfloat16)
    assert (params.scale.dtype, state.mean.dtype) == (jnp.bfloat16, jnp.float32)
    drawn, _ = jbn.init(
        3,
        scale_init=jax.nn.initializers.normal(),
        bias_init=jax.nn.initializers.normal(),
        key=jax.random.key(0),
    )
    assert not np.allclose(drawn.scale, drawn.bias)


@pytest.mark.x64
def test_init_float64():
    params, state = jbn.init(3, param_dtype=jnp.float64)
    assert {a.dtype for a in (*params, state.mean, state.var)} == {jnp.dtype("float64")}
    assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_without_scale_or_bias(present):
    params, state = jbn.init(
        3, use_scale=present[0], use_bias=present[1], bias_init=jax.nn.initializers.ones
    )
    assert (params.scale is not None, params.bias is not None) == present
    x = draw((6, 3))
    y, new = jbn.batch_norm_train(x, params, state)
    assert_close(y, oracle.forward(x, *params)[0], terms=6)
    assert_close(
        jbn.batch_norm_eval(x, params, new),
        oracle.normalize(x, new.mean, new.var, *params),
        terms=6,
    )


@pytest.mark.parametrize("where", ["train", "eval"])
def test_another_activation_is_applied_to_y(where):
    """In plain JAX, after the cast to the output dtype, which it keeps."""
    x = draw((6, 3), "bfloat16")
    params, state = layer(3)

    def run(**options):
        if where == "eval":
            return jbn.batch_norm_eval(x, params, state, **options)
        return jbn.batch_norm_train(x, params, state, **options)[0]

    y = run(activation=lambda y: jnp.tanh(y.astype(jnp.float32)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.tanh(run().astype(jnp.float32)).astype(jnp.bfloat16))


def test_the_exact_gelu_is_not_taken_for_the_fused_one():
    x = draw((6, 3))
    exact = functools.partial(jax.nn.gelu, approximate=False)
    y, _ = jbn.batch_norm_train(x, *layer(3), activation=exact)
    plain, _ = jbn.batch_norm_train(x, *layer(3))
    np.testing.assert_allclose(y, exact(plain), rtol=1e-6)
    assert not np.allclose(wide(y), wide(jax.nn.gelu(plain)), rtol=0, atol=1e-6)


def test_momentum_and_eps_are_arguments_not_constants():
    """Changed values compile nothing anew."""
    x = draw((11, 3))
    params, state = layer(3)
    run = lambda momentum, eps: jbn.batch_norm_train(x, params, state, momentum=momentum, eps=eps)
    cached = lambda: (core_layer._train._cache_size(), core_layer._evaluate._cache_size())
    run(0.9, 1e-5)
    jbn.batch_norm_eval(x, params, state, eps=1e-5)
    before = cached()
    results = [run(momentum, eps)[1].mean for momentum, eps in ((0.5, 1e-3), (0.0, 1e-1))]
    jbn.batch_norm_eval(x, params, state, eps=1e-3)
    assert cached() == before
    assert not np.allclose(wide(results[0]), wide(results[1]))


@pytest.mark.optimized
@pytest.mark.parametrize("weights", [None, "float"])
def test_the_same_bits_every_time(weights):
    x = draw((64, 5, 7), "bfloat16")
    params, state = layer(7)
    weights = weights and draw_weights(weights, x.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(x, params):
        y, _ = jbn.batch_norm_train(x, params, state, weights=weights, activation=jax.nn.gelu)
        return jnp.square(y.astype(jnp.float32)).sum()

    first, second = run(x, params), run(x, params)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture
def exported():
    """The eval function for three platforms, and its arguments."""
    x = draw((6, 5, 3))
    params, state = layer(3)
    evaluate = jax.jit(
        lambda x, p, s: jbn.batch_norm_eval(
            x, jbn.Params(*p), jbn.State(*s), activation=jax.nn.relu
        )
    )
    arguments = (x, tuple(params), tuple(state))
    return (
        export.export(evaluate, platforms=("cpu", "cuda", "tpu"))(*arguments),
        arguments,
        evaluate(*arguments),
    )


def test_export_for_three_platforms_in_one_artifact(exported):
    artifact, arguments, expected = exported
    assert artifact.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(artifact.call(*arguments), expected)


def test_an_exported_artifact_is_loaded_again(exported):
    pytest.importorskip(
        "flatbuffers",
        reason="needs flatbuffers, by which jax.export serializes: pip install flatbuffers",
    )
    artifact, arguments, expected = exported
    loaded = export.deserialize(artifact.serialize())
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(loaded.call(*arguments), expected)


def test_an_exported_function_takes_and_returns_our_tuples():
    pytest.importorskip("flatbuffers", reason="needs flatbuffers: pip install flatbuffers")
    x, (params, state) = draw((6, 3)), layer(3)

    def step(x, params, state):
        y, state = jbn.batch_norm_train(x, params, state)
        return y, params, state, jbn.moments(x)

    artifact = export.export(jax.jit(step))(x, params, state)
    loaded = export.deserialize(artifact.serialize())
    got, expected = loaded.call(x, params, state), step(x, params, state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, expected)


class Axis(enum.Enum):
    BATCH = 1
    CHANNELS = 2


@pytest.mark.parametrize(
    "name",
    [
        Axis.BATCH,
        frozenset([1]),
        pytest.param(("rows", "columns"), marks=pytest.mark.slow),
        pytest.param(Axis, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_axis_name_may_be_any_hashable(name):
    """Forward, gradients, and gradients of gradients, each in the derivative rule's own way."""
    x, (params, state) = draw((2, 4, 3, 5)), layer(5)
    outer, inner = name if isinstance(name, tuple) else (name, None)

    def loss(x, train):
        y, new = train(x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new.mean[..., :])

    step = lambda x: jbn.batch_norm_train(x, params, state, axis_name=name)
    if inner is None:
        x = x.reshape(2, 12, 5)
        mapped = jax.vmap(step, axis_name=outer, out_axes=(0, None))
    else:
        once = jax.vmap(step, axis_name=inner, out_axes=(0, None))
        mapped = jax.vmap(once, axis_name=outer, out_axes=(0, None))
    plain = lambda x: jbn.batch_norm_train(x, params, state)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, mapped(x), plain(x))
    close(jax.grad(loss)(x, mapped), jax.grad(loss)(x, plain))
    along = lambda train: jax.jvp(jax.grad(functools.partial(loss, train=train)), (x,), (x,))[1]
    close(along(mapped), along(plain))


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("context", [False, True])
def test_a_fresh_state_on_an_explicit_mesh_with_split_channels(jit, context):
    """The state is on no mesh yet: its update goes where the moments of x are."""
    mesh = jax.make_mesh((2, 4), ("rows", "channels"), axis_types=(AxisType.Explicit,) * 2)
    x, (params, state) = draw((6, 8)), jbn.init(8)
    placed = jax.device_put(x, NamedSharding(mesh, P("rows", "channels")))
    steps = {
        "train": lambda x, state: jbn.batch_norm_train(x, params, state, momentum=0.5)[1],
        "update": lambda x, state: jbn.update_state(state, jbn.moments(x), momentum=0.5),
        "renorm": lambda x, state: jbn.batch_renorm_train(
            x, params, state, r_max=2.0, d_max=1.0, momentum=0.5
        )[1],
        "virtual": lambda x, state: jbn.batch_norm_train(
            x, params, state, momentum=0.5, virtual_batch_size=3
        )[1],
    }
    for step in steps.values():
        call = jax.jit(step) if jit else step
        with jax.set_mesh(mesh) if context else contextlib.nullcontext():
            new = call(placed, state)
            again = call(placed, new)
        expected = step(x, state)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new, expected
        )
        assert new.mean.sharding.spec == P("channels")
        assert again.count == 2


@pytest.mark.parametrize(
    ("shape", "axis"), [((2**31, 2), -1), ((2**20, 2**12, 4), -1), ((4, 2**33), 0)], ids=str
)
def test_two_thousand_million_values_per_channel_are_counted(shape, axis):
    """More than an int32 holds; only traced and lowered, for every platform."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, state = jbn.init(shape[axis])

    def step(x, weights=None):
        train = functools.partial(jbn.batch_norm_train, x, params, state, axis=axis)
        y, new = train(weights=weights)
        virtual = train(virtual_batch_size=2)[1] if axis == -1 else new
        renorm = jbn.batch_renorm_train(x, params, state, axis=axis, r_max=2.0, d_max=1.0)[1]
        return jnp.sum(y), new, virtual, renorm, jbn.moments(x, axis=axis, weights=weights)

    jax.eval_shape(functools.partial(step, weights=jnp.ones((1,) * len(shape))), x)
    loss = lambda x: step(x)[0]
    jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cpu", "cuda", "tpu"))


@pytest.mark.parametrize("factor", [1e-38, 1e38])
@pytest.mark.parametrize("how", ["plain", "renorm", "virtual", "vmap", "shard_map"])
def test_a_common_factor_of_all_weights_changes_nothing(how, factor):
    """1e-38 is subnormal, which XLA reads as zero; the sum of a few 1e38 is infinite."""
    x, (params, state) = draw((8, 6, 3), mean=3), layer(3)
    weights = np.random.default_rng(0).uniform(0.5, 1, (8, 6, 1)).astype(np.float32)
    weights[1, 2:5] = 0

    def run(weights):
        if how in ("vmap", "shard_map"):
            step = lambda x, w: jbn.batch_norm_train(
                x, params, state, weights=w, axis_name="i", momentum=0.5
            )
            if how == "vmap":
                train = jax.vmap(step, axis_name="i", out_axes=(0, None))
            else:
                train = jax.shard_map(
                    step,
                    mesh=jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)),
                    in_specs=P("i"),
                    out_specs=(P("i"), P()),
                )
        else:
            options = {
                "plain": {},
                "virtual": {"virtual_batch_size": 4},
                "renorm": {"r_max": 2.0, "d_max": 0.5},
            }[how]
            function = jbn.batch_renorm_train if how == "renorm" else jbn.batch_norm_train
            train = lambda x, w: function(x, params, state, weights=w, momentum=0.5, **options)

        def loss(x, w):
            y, new = train(x, w)
            return jnp.sum(jnp.sin(y)) + jnp.sum(new.var), (y, new)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x, weights)

    got, expected = (run(jnp.asarray(weights * np.float32(f))) for f in (factor, 1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_a_channel_has_a_factor_of_its_own():
    x = draw((16, 4), mean=3)
    weights = np.random.default_rng(0).uniform(0.5, 1, (16, 1)).astype(np.float32)
    factors = np.asarray([1e-38, 1, 1e-20, 1e38], np.float32)
    _, new = jbn.batch_norm_train(
        x, *jbn.init(4), weights=jnp.asarray(weights * factors), momentum=0.0
    )
    np.testing.assert_allclose(
        new.var, oracle.variance(oracle.moments(x, weights=weights)), rtol=1e-5
    )


@pytest.mark.parametrize("factor", [1e-37, 1.0, 1e36])
def test_moments_count_what_the_weights_sum_to(factor):
    x = draw((16, 3), mean=3)
    weights = np.random.default_rng(0).uniform(0.5, 1, (16, 1)) * factor
    m = jbn.moments(x, weights=jnp.asarray(weights, jnp.float32))
    expected = oracle.moments(x, weights=weights)
    for got, right in zip(m, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5)


def test_a_tangent_that_is_nan_stays_where_its_element_is_masked():
    x, t_x = draw((6, 3)), draw((6, 3), seed=1)
    weights = jnp.arange(6)[:, None] != 2
    step = lambda x: jbn.batch_norm_train(x, *layer(3), weights=weights, activation=jax.nn.gelu)
    for masked in (x, x.at[2].set(jnp.inf)):
        _, (t_y, t_state) = jax.jvp(step, (masked,), (t_x.at[2].set(jnp.nan),))
        _, (expected, expected_state) = jax.jvp(step, (x,), (t_x,))
        kept = np.asarray(weights[:, 0])
        np.testing.assert_array_equal(t_y[kept], expected[kept])
        np.testing.assert_array_equal(t_state.mean, expected_state.mean)
        np.testing.assert_array_equal(t_state.var, expected_state.var)


@pytest.mark.third_party
@pytest.mark.parametrize("how", ["plain", "virtual", "renorm", "linen", "nnx"])
def test_a_masked_nan_never_reaches_the_check_of_jax_debug_nans(how):
    """Not in a derivative taken outside jit either, where each operation on a traced x counts."""
    x, (params, state) = draw((6, 3)).at[2].set(jnp.nan), jbn.init(3)
    mask = jnp.arange(6)[:, None] != 2
    variables = jbn.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    linen = jbn.linen.BatchNorm(use_running_average=False)
    nnx_layer = jbn.nnx.BatchNorm(3, update_stats=False, rngs=nnx.Rngs(0))
    loss = {
        "plain": lambda x: jbn.batch_norm_train(x, params, state, weights=mask)[0].sum(),
        "virtual": lambda x: jbn.batch_norm_train(
            x, params, state, weights=mask, virtual_batch_size=3
        )[0].sum(),
        "renorm": lambda x: jbn.batch_renorm_train(
            x, params, state, weights=mask, r_max=2.0, d_max=1.0
        )[0].sum(),
        "linen": lambda x: linen.apply(variables, x, mask=mask, mutable=["batch_stats"])[0].sum(),
        "nnx": lambda x: nnx_layer(x, mask=mask).sum(),
    }[how]
    with jax.debug_nans(True):
        for step in (loss, jax.grad(loss), lambda x: jax.jvp(loss, (x,), (jnp.ones((6, 3)),))):
            for call in (step, jax.jit(step)):
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(call(x)))


def test_without_jit():
    """disable_jit is how people debug: every function runs, to the same values."""
    x, (params, state) = draw((6, 3)), layer(3)
    loss = lambda x: (jbn.batch_norm_train(x, params, state, activation=jax.nn.silu)[0] ** 2).sum()
    calls = {
        "train": lambda: jbn.batch_norm_train(x, params, state),
        "virtual": lambda: jbn.batch_norm_train(x, params, state, virtual_batch_size=3),
        "renorm": lambda: jbn.batch_renorm_train(x, params, state, r_max=2.0, d_max=1.0),
        "eval": lambda: jbn.batch_norm_eval(x, params, state),
        "moments": lambda: jbn.moments(x),
        "grad": lambda: jax.grad(loss)(x),
        "vmap": lambda: jax.vmap(loss)(x[None]),
    }
    for name, call in calls.items():
        expected = call()
        with jax.disable_jit():
            got = call()
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5, err_msg=name)
        jax.tree.map(close, got, expected)
