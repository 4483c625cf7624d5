"""Batch renormalization against batch norm, where its limits are 1 and 0, and else the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx

OPEN = {"r_max": 1.5, "d_max": 0.25}  # some channels of `case` are clipped, some are not


def case(shape=(24, 3, 8), dtype=np.float32, seed=0):
    """x, params, and a state so near the data that r and d are clipped in some channels only."""
    rng = np.random.default_rng(seed)
    features = shape[-1]
    x = (rng.normal(size=shape) * np.linspace(0.5, 3, features) + 0.5).astype(dtype)
    params = jbn.Params(
        jnp.asarray(rng.uniform(0.5, 2, features), dtype),
        jnp.asarray(rng.normal(size=features), dtype),
    )
    mean = 0.5 + np.linspace(-1, 1, features)
    var = rng.uniform(0.5, 4, features)
    state = jbn.State(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(3))
    return x, params, state


def corrected(x, params, state, r_max, d_max, eps=1e-5, weights=None):
    """r, d, and the scale and bias with which the oracle's plain batch norm is batch renorm."""
    m = oracle.moments(x, weights=weights)
    scale, bias, mean, var = (
        np.asarray(v).astype(np.float64) for v in (*params, state.mean, state.var)
    )
    running_std = np.sqrt(var + eps)
    r = np.clip(np.sqrt(oracle.variance(m) + eps) / running_std, 1 / r_max, r_max)
    d = np.clip((m.mean - mean) / running_std, -d_max, d_max)
    return r, d, scale * r, bias + scale * d


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": jax.nn.relu}, {"weights": np.arange(24).reshape(24, 1, 1) % 3 > 0}],
)
def test_equals_batch_norm_with_the_limits_closed(dtype, options):
    x, params, state = case(dtype=dtype)
    closed = {**options, "r_max": jnp.float32(1), "d_max": jnp.float32(0)}

    def gradients(train, options):
        def loss(x, params):
            y, new = train(x, params, state, **options)
            return jnp.sum(jnp.square(y), dtype=jnp.float32), (y, new)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, params)

    jax.tree.map(
        np.testing.assert_array_equal,
        gradients(jbn.batch_renorm_train, closed),
        gradients(jbn.batch_norm_train, options),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jbn.batch_renorm_train(x, params, state, **closed),
        jbn.batch_norm_train(x, params, state, **options),
    )


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
@pytest.mark.parametrize("masked", [False, True])
def test_values_gradients_and_state_match_the_oracle(activation, masked):
    x, params, state = case()
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    weights = np.random.default_rng(2).random((*x.shape[:2], 1)) < 0.7 if masked else None
    name = activation and activation.__name__

    def loss(x, params):
        y, new = jbn.batch_renorm_train(
            x, params, state, weights=weights, activation=activation, momentum=0.9, **OPEN
        )
        return (y * dy).sum(), (y, new)

    (_, (y, new)), (dx, dparams) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    r, d, scale, bias = corrected(x, params, state, **OPEN, weights=weights)
    for correction, limit in ((r, OPEN["r_max"]), (d, OPEN["d_max"])):
        assert 0 < np.mean(np.abs(correction) < limit) < 1, (
            "the case must have clipped and unclipped channels"
        )
    expected, m = oracle.forward(x, scale, bias, weights=weights, activation=name)
    through = oracle.backward(x, dy, scale, bias, weights=weights, activation=name)
    # 72 values per channel: float32 rounding grows at most with their number.
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=72 * 2**-23, atol=72 * 2**-23 * np.abs(b).max()
    )
    close(y, expected)
    close(dx, through.x)
    # r and d are constants: y = (scale * r) * xhat + (bias + scale * d).
    close(dparams.scale, r * through.scale + d * through.bias)
    close(dparams.bias, through.bias)
    after = oracle.running(oracle.State(state.mean, state.var, 3), m, momentum=0.9)
    close(new.mean, after.mean)
    close(new.var, after.var)
    assert new.count == 4


def test_wide_open_limits_give_the_output_of_inference():
    x, params, state = case()
    y, _ = jbn.batch_renorm_train(x, params, state, r_max=jnp.inf, d_max=jnp.inf)
    expected = oracle.normalize(x, state.mean, state.var, params.scale, params.bias)
    np.testing.assert_allclose(
        y, expected, rtol=1e-5, atol=1e-5
    )  # two roundings of r * rstd and of d, of |y| < 30


@pytest.mark.x64
def test_float64_and_missing_parameters():
    x, params, state = case(dtype=np.float64)
    y, _ = jbn.batch_renorm_train(x, jbn.Params(None, None), state, **OPEN)
    r, d, _, _ = corrected(x, params, state, **OPEN)
    np.testing.assert_allclose(y, oracle.forward(x, r, d)[0], rtol=1e-12, atol=1e-12)


def test_one_compilation_serves_a_schedule_of_limits():
    x, params, state = case()
    step = jax.jit(
        lambda r_max, d_max: jbn.batch_renorm_train(x, params, state, r_max=r_max, d_max=d_max)[0]
    )
    for r_max, d_max in ((1.0, 0.0), (1.5, 0.25), (3.0, 5.0)):
        _, _, scale, bias = corrected(x, params, state, r_max, d_max)
        np.testing.assert_allclose(
            step(r_max, d_max), oracle.forward(x, scale, bias)[0], rtol=2e-5, atol=2e-5
        )
    assert step._cache_size() == 1


def _bytes_accessed(train, *args):
    compiled = (
        jax.jit(jax.value_and_grad(lambda *a: train(*a)[0].sum(), (0, 1))).lower(*args).compile()
    )
    return compiled.cost_analysis()["bytes accessed"]


def test_the_correction_reads_x_no_more_often_than_batch_norm():
    x, params, state = case((4096, 1, 32))
    renorm = _bytes_accessed(lambda *a: jbn.batch_renorm_train(*a, **OPEN), x, params, state)
    plain = _bytes_accessed(jbn.batch_norm_train, x, params, state)
    assert renorm - plain < 0.1 * x.nbytes  # per-channel vectors only; one more pass would be 1.0


@pytest.mark.parametrize("check_vma", [True, False])
def test_synchronized_over_devices_with_unequal_masks(check_vma):
    x, params, state = case((24, 2, 8))
    weights = np.arange(24).reshape(24, 1, 1) < 19  # the shards hold 6, 6, 6 and 1 examples
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def local(x, weights, dy):
        y, vjp, new = jax.vjp(
            lambda x: jbn.batch_renorm_train(
                x, params, state, weights=weights, axis_name="data", **OPEN
            ),
            x,
            has_aux=True,
        )
        return y, vjp(dy)[0], new

    specs = {
        "in_specs": (P("data"), P("data"), P("data")),
        "out_specs": (P("data"), P("data"), P()),
    }
    step = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))
    y, dx, new = step(x, weights, dy)
    _, _, scale, bias = corrected(x, params, state, **OPEN, weights=weights)
    expected, m = oracle.forward(x, scale, bias, weights=weights)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(
        dx, oracle.backward(x, dy, scale, bias, weights=weights).x, rtol=1e-5, atol=2e-5
    )
    np.testing.assert_allclose(
        new.var, oracle.running(oracle.State(state.mean, state.var, 3), m).var, rtol=1e-5
    )
    plain = jax.shard_map(
        lambda x, w: jbn.batch_norm_train(x, params, state, weights=w, axis_name="data"),
        mesh=mesh,
        check_vma=check_vma,
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    reduces = lambda f, *args: jax.jit(f).lower(*args).compile().as_text().count(" all-reduce(")
    forward = jax.shard_map(
        lambda x, w: jbn.batch_renorm_train(x, params, state, weights=w, axis_name="data", **OPEN),
        mesh=mesh,
        check_vma=check_vma,
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    assert reduces(forward, x, weights) == reduces(plain, x, weights) == 2


def test_masked_nan_touches_nothing():
    x, params, state = case()
    mask = (np.arange(24) < 20).reshape(24, 1, 1)
    poisoned = np.where(mask, x, np.nan)
    train = lambda x: jbn.batch_renorm_train(x, params, state, weights=mask, **OPEN)
    (y, new), (y_poisoned, new_poisoned) = train(x), train(poisoned)
    np.testing.assert_array_equal(y[:20], y_poisoned[:20])
    jax.tree.map(np.testing.assert_array_equal, new, new_poisoned)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"r_max": 0.5, "d_max": 0}, "r_max is 0.5"),
        ({"r_max": 1, "d_max": -1}, "d_max is -1"),
        ({"r_max": 2, "d_max": jnp.nan}, "nan"),
    ],
)
def test_limits_out_of_range(limits, message):
    with pytest.raises(ValueError, match=message):
        jbn.batch_renorm_train(*case(), **limits)


def test_a_callable_activation_sees_tracers():
    x, params, state = case()
    slope = lambda s: jbn.batch_renorm_train(x, params, state, activation=lambda z: s * z, **OPEN)[
        0
    ].sum()
    _, _, scale, bias = corrected(x, params, state, **OPEN)
    np.testing.assert_allclose(
        jax.grad(slope)(2.0), oracle.forward(x, scale, bias)[0].sum(), rtol=1e-4
    )


def modules(linen_type, nnx_type, x, **options):
    """For linen and for nnx: a function of a layer's call arguments, which gives (y, mean, var)."""
    _, params, state = case()
    linen_layer, nnx_layer = linen_type(**options), nnx_type(8, rngs=nnx.Rngs(0), **options)
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    nnx.update(nnx_layer, {**variables["params"], **variables["batch_stats"]})

    def call_linen(**arguments):
        y, new = linen_layer.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"], **arguments
        )
        return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]

    def call_nnx(**arguments):
        layer = nnx.clone(nnx_layer)
        return layer(x, use_running_average=False, **arguments), layer.mean[...], layer.var[...]

    return call_linen, call_nnx


@pytest.mark.third_party
def test_both_modules_call_the_function():
    x, params, state = case()
    mask = np.random.default_rng(2).random((*x.shape[:2], 1)) < 0.7
    y, new = jbn.batch_renorm_train(x, params, state, momentum=0.9, weights=mask, **OPEN)
    for call in modules(jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, x, momentum=0.9, **OPEN):
        jax.tree.map(np.testing.assert_array_equal, call(mask=mask), (y, new.mean, new.var))
    for call in modules(
        jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, x, momentum=0.9
    ):  # limits of the call, traced
        scheduled = jax.jit(
            lambda r_max, d_max, call=call: call(mask=mask, r_max=r_max, d_max=d_max)
        )(1.5, 0.25)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            scheduled,
            (y, new.mean, new.var),
        )
        default = jbn.batch_renorm_train(x, params, state, r_max=3.0, d_max=5.0)[0]
        np.testing.assert_array_equal(call()[0], default)


@pytest.mark.third_party
def test_both_modules_equal_batch_norm_with_the_limits_closed():
    x, _, _ = case()
    renorm = modules(
        jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, x, r_max=1.0, d_max=0.0, activation=jax.nn.relu
    )
    plain = modules(jbn.linen.BatchNorm, jbn.nnx.BatchNorm, x, activation=jax.nn.relu)
    for a, b in zip(renorm, plain, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a(), b())
    tree = lambda layer: jax.tree.map(
        jnp.shape, layer.init(jax.random.key(0), x, use_running_average=False)
    )
    assert tree(jbn.linen.BatchRenorm()) == tree(jbn.linen.BatchNorm())


@pytest.mark.third_party
def test_modules_refuse_virtual_batches_and_limits_out_of_range():
    x, _, _ = case()
    for call in modules(jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, x, virtual_batch_size=4):
        with pytest.raises(NotImplementedError, match="virtual_batch_size is 4"):
            call()
    for call in modules(jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, x):
        with pytest.raises(ValueError, match=r"r_max is 0\.5"):
            call(r_max=0.5)


def test_the_corrections_are_constants_to_every_derivative():
    """y depends on the old statistics, and on eps in two places, but for r and d held fixed."""
    x, params, state = case()

    def loss(train, params, state, eps, **limits):
        return jnp.sum(jnp.sin(train(x, params, state, eps=eps, **limits)[0]))

    eps = jnp.float32(0.1)
    renorm = functools.partial(loss, jbn.batch_renorm_train, **OPEN)
    d_mean_var, d_eps = jax.grad(
        lambda stats, eps: renorm(params, jbn.State(*stats, state.count), eps), (0, 1)
    )((state.mean, state.var), eps)
    jax.tree.map(lambda d: np.testing.assert_array_equal(d, 0), d_mean_var)
    r, d, scale, bias = corrected(x, params, state, **OPEN, eps=0.1)
    assert np.any((r != 1.5) & (r != 1 / 1.5))
    assert np.any(np.abs(d) < 0.25)
    fixed = jbn.Params(jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32))
    expected = jax.grad(lambda eps: loss(jbn.batch_norm_train, fixed, state, eps))(eps)
    # 576 terms of order 1 and of either sign.
    np.testing.assert_allclose(d_eps, expected, rtol=1e-4, atol=1e-4)


def counted(kind, x, steps, **options):
    """(y, mean, var, steps) of one training call of a linen or nnx layer after `steps` updates."""
    _, params, state = case()
    stats = {"mean": state.mean, "var": state.var, "steps": jnp.int32(steps)}
    if kind == "linen":
        variables = {"params": params._asdict(), "batch_stats": stats}
        layer = jbn.linen.BatchRenorm(use_running_average=False, **options)
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return y, *(new["batch_stats"][name] for name in ("mean", "var", "steps"))
    layer = jbn.nnx.BatchRenorm(8, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, {**params._asdict(), **stats})
    return layer(x), layer.mean[...], layer.var[...], layer.steps[...]


BOTH = pytest.mark.parametrize("kind", ["linen", "nnx"])


@pytest.mark.third_party
@BOTH
def test_the_warmup_is_batch_norm_and_then_the_limits_are_open(kind):
    x, params, state = case()
    plain, _ = jbn.batch_norm_train(x, params, state)
    for steps in (0, 99):
        y, mean, _, new_steps = counted(kind, x, steps, warmup_steps=100)
        np.testing.assert_array_equal(y, plain)
        assert new_steps == steps + 1
    for steps in (100, 5000):
        y, new_mean, var, _ = counted(kind, x, steps, warmup_steps=100, r_max=1.5, d_max=0.25)
        expected, new = jbn.batch_renorm_train(x, params, state, **OPEN)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(new_mean, mean)
        np.testing.assert_array_equal(var, new.var)
    y, *_ = counted(kind, x, 100, warmup_steps=100)
    np.testing.assert_array_equal(y, jbn.batch_renorm_train(x, params, state, r_max=3, d_max=5)[0])


@pytest.mark.third_party
@BOTH
def test_the_papers_schedule(kind):
    """Plain for 5000 updates; r_max reaches 3 at 40 000 and d_max 5 at 25 000 (section 4)."""
    x, params, state = case()
    schedule = {
        "r_max": optax.linear_schedule(1.0, 3.0, 35_000, 5_000),
        "d_max": optax.linear_schedule(0.0, 5.0, 20_000, 5_000),
    }
    for steps, r_max, d_max in (
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**6, 3, 5),
    ):
        y, _, _, new_steps = counted(kind, x, steps, **schedule)
        expected, _ = jbn.batch_renorm_train(x, params, state, r_max=r_max, d_max=d_max)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert new_steps == steps + 1
    both = counted(kind, x, 15_000, warmup_steps=20_000, **schedule)[0]
    np.testing.assert_array_equal(both, jbn.batch_norm_train(x, params, state)[0])


@pytest.mark.third_party
def test_the_counter_exists_only_when_asked_for_and_counts_updates_only():
    x, _, _ = case()
    poisoned = np.where(np.arange(24)[:, None, None] == 3, np.nan, x)
    layer = jbn.linen.BatchRenorm(warmup_steps=2, skip_nonfinite=True)
    init = lambda layer, **options: layer.init(jax.random.key(0), x, **options)["batch_stats"]
    for average in (True, False):
        assert set(init(layer, use_running_average=average)) == {"mean", "var", "steps"}
        assert init(layer, use_running_average=average)["steps"] == 0
        plain = init(jbn.linen.BatchRenorm(), use_running_average=average)
        assert set(plain) == {"mean", "var"}
    variables = layer.init(jax.random.key(0), x, use_running_average=True)

    @jax.jit
    def train(variables, x):
        return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[1]

    for batch, count in ((x, 1), (poisoned, 1), (x, 2), (x, 3)):
        variables = {**variables, **train(variables, batch)}
        assert variables["batch_stats"]["steps"] == count
    without = {**variables, "batch_stats": dict(variables["batch_stats"])}
    del without["batch_stats"]["steps"]  # evaluation needs no count: other checkpoints do
    layer.apply(without, x, use_running_average=True)

    assert not hasattr(jbn.nnx.BatchRenorm(8, rngs=nnx.Rngs(0)), "steps")
    layer = jbn.nnx.BatchRenorm(8, warmup_steps=2, rngs=nnx.Rngs(0), skip_nonfinite=True)
    for batch, count in ((x, 1), (poisoned, 1), (x, 2)):
        nnx.jit(lambda layer, x: layer(x))(layer, batch)
        assert layer.steps[...] == count
    layer(x, use_running_average=True)
    assert layer.steps[...] == 2
    layer.update_stats = False
    layer(x)
    assert layer.steps[...] == 2


@pytest.mark.third_party
def test_limits_of_the_call_go_before_the_warmup():
    x, params, state = case()
    layer = jbn.linen.BatchRenorm(use_running_average=False, warmup_steps=100)
    stats = {"mean": state.mean, "var": state.var, "steps": jnp.int32(0)}
    variables = {"params": params._asdict(), "batch_stats": stats}
    y, _ = layer.apply(variables, x, **OPEN, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, jbn.batch_renorm_train(x, params, state, **OPEN)[0])


@pytest.mark.third_party
@BOTH
@pytest.mark.parametrize("warmup_steps", [None, 3])
def test_the_first_batches_of_data_far_from_zero_give_sane_outputs(kind, warmup_steps):
    """|y| stays within d_max + r_max times the largest |xhat|, whatever the running statistics."""
    rng = np.random.default_rng(0)
    linen_layer = jbn.linen.BatchRenorm(use_running_average=False, warmup_steps=warmup_steps)
    nnx_layer = jbn.nnx.BatchRenorm(4, warmup_steps=warmup_steps, rngs=nnx.Rngs(0))
    variables = linen_layer.init(jax.random.key(0), np.zeros((2, 4), np.float32))
    for step in range(6):
        x = (rng.normal(size=(256, 4)) * [1e-2, 1, 30, 1e3] + [5, 1e4, -1e4, 1e6]).astype("f")
        if kind == "linen":
            y, new = linen_layer.apply(variables, x, mutable=["batch_stats"])
            variables = {**variables, **new}
        else:
            y = nnx_layer(x)
        xhat = np.abs((x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64)).max()
        closed = warmup_steps is not None and step < warmup_steps
        assert np.abs(y).max() <= 1.001 * (xhat if closed else 5 + 3 * xhat)
        deviation = np.asarray(y, np.float64).std(0)
        np.testing.assert_array_less(deviation, 3.01)
        if closed:
            # Data of 1e6 with a standard deviation of 1e3 are rounded to 6e-5 of it.
            var = x.var(0, dtype=np.float64)
            np.testing.assert_allclose(deviation, np.sqrt(var / (var + 1e-5)), rtol=1e-3)


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 1.5}, r"warmup_steps is 1\.5"),
        ({"warmup_steps": 10, "r_max": 0.5}, r"r_max is 0\.5"),
        ({"d_max": lambda steps: -1.0}, r"d_max is -1\.0"),
    ],
)
def test_schedules_out_of_range(options, message):
    x, _, _ = case()
    with pytest.raises(ValueError, match=message):
        jbn.linen.BatchRenorm(use_running_average=False, **options).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        jbn.nnx.BatchRenorm(8, rngs=nnx.Rngs(0), **options)(x)
