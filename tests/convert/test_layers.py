"""Every converter against the real library: eval outputs, training that goes on, round trips."""

import importlib
import os

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn import convert

pytestmark = pytest.mark.third_party

FEATURES, STEPS = 6, 10


def need(name, extra="pip install 'jbn[peers]'"):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip(name, reason=f"needs {name}: {extra}")


def torch_or_skip():
    return need("torch", "pip install torch")


def batches(seed=0, shape=(16, 5, FEATURES)):
    """STEPS batches, channels last; another mean and scale per channel."""
    rng = np.random.default_rng(seed)
    draw = lambda: (
        rng.normal(size=shape) * np.linspace(0.5, 2, FEATURES) + np.linspace(-1, 1, FEATURES)
    )
    return [draw().astype(np.float32) for _ in range(STEPS)]


def learned(seed=5):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.5, 2, FEATURES).astype(np.float32), rng.normal(size=FEATURES).astype(
        np.float32
    )


def layer(seed=7):
    """(params, state) as training could have left them."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=FEATURES), rng.uniform(0.5, 3, FEATURES)
    params = jbn.Params(*map(jnp.asarray, learned()))
    return params, jbn.State(
        jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(17)
    )


def evaluate(x, params, state, options):
    return jbn.batch_norm_eval(x, params, state, axis=options["axis"], eps=options["eps"])


def train(xs, params, state, options):
    for x in xs:
        _, state = jbn.batch_norm_train(x, params, state, **options)
    return state


def close(a, b, tolerance=1e-6):
    """1e-6 of the largest magnitude: a few float32 roundings."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def channels_first(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_evaluates_and_trains_the_same(momentum):
    torch = torch_or_skip()
    source = torch.nn.BatchNorm1d(FEATURES, momentum=momentum, eps=1e-4)
    with torch.no_grad():
        for target, values in zip((source.weight, source.bias), learned(), strict=True):
            target.copy_(torch.from_numpy(values))
        for x in batches(1):
            source(torch.from_numpy(channels_first(x)))
    params, state = convert.from_torch(source.state_dict())
    options = convert.options(source)
    x = channels_first(batches(2)[0])
    with torch.no_grad():
        close(evaluate(x, params, state, options), source.eval()(torch.from_numpy(x)))
        source.train()
        xs = [channels_first(x) for x in batches(3)]
        for x in xs:
            source(torch.from_numpy(x))
    state = train(xs, params, state, options)
    close(state.mean, source.running_mean)
    close(state.var, source.running_var)
    assert int(state.count) == int(source.num_batches_tracked) == 2 * STEPS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_torch_round_trips_lose_nothing(dtype, affine):
    torch = torch_or_skip()
    params, state = layer()
    params = jax.tree.map(lambda a: a.astype(dtype), params) if affine else jbn.Params(None, None)
    state_dict = convert.to_torch(params, state, "bn1.")
    same(convert.from_torch(state_dict, "bn1."), (params, state))
    target = torch.nn.BatchNorm2d(FEATURES, affine=affine)
    target.load_state_dict(convert.to_torch(params, state))
    same(convert.from_torch(target.state_dict())[1], state)


@pytest.mark.x64
def test_torch_float64_round_trip():
    torch_or_skip()
    params, state = jbn.init(3, param_dtype=jnp.float64)
    state = state._replace(mean=state.mean + 1 / 3)
    same(convert.from_torch(convert.to_torch(params, state)), (params, state))


def test_float64_is_not_truncated_silently():
    torch = torch_or_skip()
    with pytest.raises(ValueError, match="enable_x64"):
        convert.from_torch(torch.nn.BatchNorm1d(3).double().state_dict())


def test_torch_without_running_statistics_is_an_error():
    torch = torch_or_skip()
    with pytest.raises(ValueError, match="running_mean"):
        convert.from_torch(torch.nn.BatchNorm1d(3, track_running_stats=False).state_dict(), "bn.")


def test_linen_evaluates_and_trains_the_same():
    source = flax.linen.BatchNorm(momentum=0.9, epsilon=1e-3)
    params, state = layer()
    variables = convert.to_linen(params, state)
    same(convert.from_linen(variables, count=17), (params, state))
    options = convert.options(source)
    x = batches(2)[0]
    close(evaluate(x, params, state, options), source.apply(variables, x, use_running_average=True))
    for x in batches(3):
        _, updated = source.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updated}
    state = train(batches(3), params, state, options)
    close(state.mean, variables["batch_stats"]["mean"])
    close(state.var, variables["batch_stats"]["var"])


def test_nnx_evaluates_and_trains_the_same():
    nnx = flax.nnx
    source = nnx.BatchNorm(FEATURES, momentum=0.9, epsilon=1e-3, rngs=nnx.Rngs(0))
    params, state = layer()
    nnx.update(source, convert.to_nnx(params, state))
    same(convert.from_nnx(nnx.to_pure_dict(nnx.state(source)), count=17), (params, state))
    options = convert.options(source)
    x = batches(2)[0]
    close(evaluate(x, params, state, options), source(x, use_running_average=True))
    for x in batches(3):
        source(x)
    state = train(batches(3), params, state, options)
    close(state.mean, source.mean[...])
    close(state.var, source.var[...])


def test_flax_without_parameters():
    params, state = jbn.Params(None, None), layer()[1]
    assert set(convert.to_linen(params, state)) == {"batch_stats"}
    same(convert.from_linen(convert.to_linen(params, state), count=17), (params, state))


def test_keras_evaluates_and_trains_the_same():
    keras = need("keras")
    source = keras.layers.BatchNormalization(momentum=0.9)
    source.build((None, 5, FEATURES))
    params, state = layer()
    source.set_weights(convert.to_keras(params, state))
    same(convert.from_keras(source, count=17), (params, state))
    options = convert.options(source)
    assert options["eps"] == 1e-3
    x = batches(2)[0]
    close(evaluate(x, params, state, options), source(x, training=False))
    for x in batches(3):
        source(x, training=True)
    state = train(batches(3), params, state, options)
    close(state.mean, source.moving_mean.value)
    close(state.var, source.moving_variance.value)


def haiku_layer(ndim=3):
    haiku = need("haiku")
    return haiku.transform_with_state(
        lambda x, is_training: haiku.BatchNorm(True, True, 0.99)(x, is_training)
    )


def test_haiku_evaluates_the_same_and_round_trips():
    source = haiku_layer()
    params, state = layer()
    foreign = convert.to_haiku(params, state, ndim=3, momentum=0.99)
    same(convert.from_haiku(*foreign), (params, state))
    x = batches(2)[0]
    expected, _ = source.apply(*foreign, None, x, False)
    close(jbn.batch_norm_eval(x, params, state), expected)
    fresh = source.init(None, x, True)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, foreign)


def test_haiku_training_goes_on_the_same_with_debiased_momentum():
    source = haiku_layer()
    hk_params, hk_state = source.init(None, batches()[0], True)
    for x in batches(1):
        _, hk_state = source.apply(hk_params, hk_state, None, x, True)
    params, start = convert.from_haiku(hk_params, hk_state)
    assert start.count == STEPS
    for x in batches(3):
        _, hk_state = source.apply(hk_params, hk_state, None, x, True)
    expected = convert.from_haiku(hk_params, hk_state)[1]
    exact, plain = start, train(batches(3), params, start, {"momentum": 0.99})
    for x in batches(3):
        _, exact = jbn.batch_norm_train(
            x, params, exact, momentum=convert.debiased_momentum(0.99, exact.count)
        )
    # Haiku's E[x^2] - E[x]^2 and 1 - 0.99^n in float32 each lose a digit.
    close(exact.mean, expected.mean, 1e-5)
    close(exact.var, expected.var, 1e-5)
    # The figure in the docstring of debiased_momentum: the weight of the 11th batch.
    assert 1 - convert.debiased_momentum(0.99, jnp.int32(10)) == pytest.approx(0.0956, abs=1e-4)
    assert np.abs(plain.mean - expected.mean).max() > 100 * np.abs(exact.mean - expected.mean).max()


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_evaluates_the_same_and_round_trips(mode):
    equinox = need("equinox")
    source, eqx_state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        FEATURES, "batch", mode=mode
    )
    params, state = layer()
    source, eqx_state = convert.to_equinox(params, state, source, eqx_state)
    back_params, back = convert.from_equinox(source, eqx_state)
    same(back_params, params)
    close(back.mean, state.mean)  # mode="batch" stores mean * (1 - momentum^count): rounded twice
    close(back.var, state.var)
    assert back.count == (17 if mode == "batch" else 1)
    if mode == "ema":
        same((back.mean, back.var), (state.mean, state.var))
    x = channels_first(batches(2)[0])
    infer = jax.vmap(
        lambda x: source(x, eqx_state, inference=True), axis_name="batch", out_axes=(0, None)
    )
    close(evaluate(x, params, state, convert.options(source)), infer(x)[0])


def test_equinox_training_goes_on_the_same_with_debiased_momentum():
    equinox = need("equinox")
    source, eqx_state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        FEATURES, "batch", mode="batch", momentum=0.9
    )
    params, state = layer()
    source, eqx_state = convert.to_equinox(params, state, source, eqx_state)
    options = convert.options(source)
    step = jax.vmap(source, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    for x in map(channels_first, batches(3)):
        _, eqx_state = step(x, eqx_state)
        options["momentum"] = convert.debiased_momentum(0.9, state.count)
        _, state = jbn.batch_norm_train(x, params, state, **options)
    _, expected = convert.from_equinox(source, eqx_state)
    close(state.mean, expected.mean, 1e-5)
    close(state.var, expected.var, 1e-5)
    assert state.count == expected.count == 17 + STEPS


def test_equinox_starts_far_off_and_that_is_kept():
    equinox = need("equinox")
    source, eqx_state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        FEATURES, "batch", mode="batch"
    )
    x = np.random.default_rng(0).normal(size=(4096, FEATURES)).astype(np.float32)
    _, eqx_state = jax.vmap(source, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        x, eqx_state
    )
    np.testing.assert_allclose(
        convert.from_equinox(source, eqx_state)[1].var, 99 + x.var(0), rtol=1e-4
    )


def test_options_of_jbn_layers_and_of_nothing():
    source = importlib.import_module("jbn.linen").BatchNorm(momentum=0.8, unbiased=True)
    assert convert.options(source) == {"axis": -1, "momentum": 0.8, "eps": 1e-5, "unbiased": True}
    with pytest.raises(TypeError, match=r"builtins\.int"):
        convert.options(3)
    with pytest.raises(ValueError, match="one axis"):
        convert.to_keras(*jbn.init((3, 4)))


def test_arguments_that_fit_nothing_are_named():
    equinox, keras = need("equinox"), need("keras")
    params, state = jbn.init(4)
    layer, of_layer = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        4, axis_name="batch", mode="ema"
    )
    without = jbn.init(4, use_scale=False, use_bias=False)[0]
    vectors = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    for message, call in {
        "state_dict is a NoneType": lambda: convert.from_torch(None),
        "variables is a NoneType": lambda: convert.from_linen(None),
        "values is a NoneType": lambda: convert.from_nnx(None),
        r"has shapes .*\(2,\)": lambda: convert.from_nnx({"scale": jnp.ones(2), **vectors}),
        "count is -1": lambda: convert.from_nnx(vectors, count=-1),
        "count is 'a'": lambda: convert.from_nnx(vectors, count="a"),
        "params is a NoneType": lambda: convert.from_haiku(None, {}),
        "axis 5 is out of range": lambda: convert.to_haiku(
            params, state, ndim=3, axis=5, momentum=0.9
        ),
        r"momentum is 1\.5": lambda: convert.to_haiku(params, state, ndim=3, momentum=1.5),
        "not built yet": lambda: convert.from_keras(keras.layers.BatchNormalization()),
        "state is a NoneType": lambda: convert.from_equinox(layer, None),
        r"scale has shape None, expected \(4,\)": lambda: convert.to_equinox(
            without, state, layer, of_layer
        ),
        r"scale has shape \(3,\), expected \(4,\)": lambda: convert.to_equinox(
            *jbn.init(3), layer, of_layer
        ),
        "is no array of numbers": lambda: convert.from_nnx({"mean": "a", "var": "b"}),
        r"momentum is '0\.9'": lambda: convert.debiased_momentum("0.9", 1),
        "state_dict is empty": lambda: convert.from_torch_model({}),
        "state_dict is a list": lambda: convert.from_torch_model([]),
        "variables is a list": lambda: convert.from_sbx([]),
        "params is a NoneType .*such as": lambda: convert.to_equinox(None, state, layer, of_layer),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_what_is_no_layer_is_not_converted_to_one():
    torch_or_skip()
    params, state = layer()
    functions = {
        "torch": convert.to_torch,
        "linen": convert.to_linen,
        "nnx": convert.to_nnx,
        "keras": convert.to_keras,
        "haiku": lambda *both: convert.to_haiku(*both, ndim=3, momentum=0.9),
    }
    for function in functions.values():
        with pytest.raises(TypeError, match=r"params is a NoneType .*expected jbn\.Params"):
            function(None, state)
        with pytest.raises(TypeError, match=r"state is a tuple .*expected jbn\.State"):
            function(params, tuple(state))


def test_counts_that_int32_does_not_hold():
    torch = torch_or_skip()
    state_dict = torch.nn.BatchNorm1d(3).state_dict()
    state_dict["num_batches_tracked"] += 2**31 - 1
    assert convert.from_torch(state_dict)[1].count == 2**31 - 1
    state_dict["num_batches_tracked"] += 1
    with pytest.raises(ValueError, match="int64 holds 2147483648, expected at most 2147483647"):
        convert.from_torch(state_dict)
    with pytest.raises(ValueError, match="count is 2147483648, expected at most 2147483647"):
        convert.from_linen(convert.to_linen(*layer()), count=2**31)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_options_go_on_over_the_devices_of_the_layer(groups):
    linen = importlib.import_module("jbn.linen")
    for kind in (flax.linen.BatchNorm, linen.BatchNorm):
        source = kind(axis_name="batch", axis_index_groups=groups, use_running_average=False)
        options = convert.options(source)
        params, state = layer()
        variables = convert.to_linen(params, state)

        def other(x, source=source, variables=variables):
            y, new = source.apply(variables, x, mutable=["batch_stats"])
            return y, new["batch_stats"]["var"]

        def ours(x, params=params, state=state, options=options):
            y, new = jbn.batch_norm_train(x, params, state, **options)
            return y, new.var

        x = batches()[0].reshape(4, 4, 5, FEATURES)
        devices = jax.devices()[:4]
        expected, found = (jax.pmap(f, "batch", devices=devices)(x) for f in (other, ours))
        for a, b in zip(found, expected, strict=True):
            close(a, b, 1e-5)
    assert "axis_index_groups" not in convert.options(kind(axis_index_groups=[[0]]))


def test_options_of_a_haiku_layer_over_devices():
    haiku = need("haiku")
    found = []

    def forward(x):
        norm = haiku.BatchNorm(
            True,
            True,
            0.9,
            cross_replica_axis="batch",
            cross_replica_axis_index_groups=[[0, 1], [2, 3]],
        )
        found.append(convert.options(norm))
        return x

    haiku.transform_with_state(forward).init(None, batches()[0])
    assert found[0]["axis_name"] == "batch"
    assert found[0]["axis_index_groups"] == [[0, 1], [2, 3]]
