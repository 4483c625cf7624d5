"""Recalibrated statistics against float64 ones pooled over all batches, in chains, with masks."""

import collections
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.recalibrate import pooled_moments, recalibrate, recalibrate_linen, recalibrate_nnx

pytestmark = pytest.mark.third_party


def batches(number=50, features=4, seed=0):
    """Batches of unequal size, whose means wander by more than the standard deviation."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([3, 16, 37], number)  # few, as each is compiled
    draw = lambda size: (
        rng.normal(rng.normal(0, 3), 1, (size, 2, features)) * np.linspace(0.5, 3, features) + 10
    )
    return [draw(size).astype(np.float32) for size in sizes]


def pooled(xs, weights=None):
    """float64 mean and biased variance of everything."""
    m = oracle.moments(
        np.concatenate(xs), weights=None if weights is None else np.concatenate(weights)
    )
    return m.mean, oracle.variance(m)


def close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


def relu_normalized(x, mean, var, eps=1e-5):
    return oracle.normalize(x, mean, var, eps=eps, activation="relu")


def test_fifty_batches_pool_to_float64():
    xs = batches()
    m = pooled_moments(xs)
    close((m.mean, m.m2 / m.count), pooled(xs))
    weights = [np.random.default_rng(i).random((len(x), 2, 1)) < 0.7 for i, x in enumerate(xs)]
    m = pooled_moments(zip(xs, weights, strict=True))
    close((m.mean, m.m2 / m.count), pooled(xs, weights))


def test_a_chain_of_functional_norms_is_exact():
    params, state = jbn.init(4)
    xs = batches()

    def collect(states, x):
        y = jbn.batch_norm_eval(x, params, states["first"], activation=jax.nn.relu)
        return {"first": jbn.moments(x), "second": jbn.moments(y)}

    stale = state._replace(mean=state.mean + 7)
    new = recalibrate(collect, {"first": stale, "second": stale}, xs)
    first = pooled(xs)
    close(new["first"], first)
    close(new["second"], pooled([relu_normalized(x, *first) for x in xs]))
    assert new["first"].count == 50
    unbiased = recalibrate(collect, {"first": stale, "second": stale}, xs, unbiased=True)["first"]
    n = sum(x.size for x in xs) / 4
    np.testing.assert_allclose(unbiased.var, first[1] * n / (n - 1), rtol=1e-5)


class LinenModel(nn.Module):
    """Two norms in a chain, a third that is called twice, a mask."""

    norm: type

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = nn.relu(self.norm(use_running_average=not train, name="first")(x, mask=mask))
        y = nn.relu(self.norm(use_running_average=not train, name="second")(x, mask=mask))
        shared = self.norm(use_running_average=not train, name="shared")
        return shared(x, mask=mask) + shared(y, mask=mask)


@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_linen_model_is_exact_in_as_many_passes_as_its_chain(norm, masked):
    model = LinenModel(norm)
    xs = batches(12)
    masks = [
        np.random.default_rng(i).random((len(x), 2, 1)) < 0.7
        if masked
        else np.ones((len(x), 2, 1), bool)
        for i, x in enumerate(xs)
    ]
    variables = {"params": model.init(jax.random.key(0), xs[0])["params"], "batch_stats": _stale()}
    seen = []

    class Loader:
        def __iter__(self):
            seen.append(0)
            return iter(list(zip(xs, masks, strict=True)))

    new = recalibrate_linen(
        lambda v, batch: model.apply(v, batch[0], mask=batch[1]), variables, Loader()
    )["batch_stats"]
    stats = pooled(xs, masks)
    close((new["first"]["mean"], new["first"]["var"]), stats)
    second_in = [relu_normalized(x, *stats) for x in xs]
    stats = pooled(second_in, masks)
    close((new["second"]["mean"], new["second"]["var"]), stats)
    third_in = [relu_normalized(x, *stats) for x in second_in]
    close(
        (new["shared"]["mean"], new["shared"]["var"]), pooled(second_in + third_in, masks + masks)
    )
    assert len(seen) - 1 == 3  # the loader is asked once more, whether it can be iterated again


def _stale():
    return {
        name: {"mean": jnp.full(4, 5.0), "var": jnp.full(4, 9.0)}
        for name in ("first", "second", "shared")
    }


def test_one_pass_in_train_mode_reads_what_batches_normalize():
    model, xs = LinenModel(jbn.linen.BatchNorm), batches(12)
    variables = {"params": model.init(jax.random.key(0), xs[0])["params"], "batch_stats": _stale()}
    apply = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    new = recalibrate_linen(apply, variables, iter(xs), passes=1)["batch_stats"]
    close((new["first"]["mean"], new["first"]["var"]), pooled(xs))
    second_in = [oracle.forward(x, activation="relu")[0] for x in xs]
    close((new["second"]["mean"], new["second"]["var"]), pooled(second_in))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.BatchNorm(4, rngs=rngs)
        self.rest = nnx.List([jbn.nnx.BatchNorm(4, activation=jax.nn.relu, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](nnx.relu(self.first(x)))


def test_an_nnx_model_is_exact_and_changed_in_place():
    model, xs = NnxModel(nnx.Rngs(0)), batches(12)
    model.eval()
    recalibrate_nnx(model, xs)
    stats = pooled(xs)
    close((model.first.mean[...], model.first.var[...]), stats)
    close(
        (model.rest[0].mean[...], model.rest[0].var[...]),
        pooled([relu_normalized(x, *stats) for x in xs]),
    )
    assert isinstance(model.rest[0], jbn.nnx.BatchNorm)
    y = model(xs[0])
    np.testing.assert_array_equal(y, model(xs[0]))


def test_what_cannot_be_iterated_again_is_an_error():
    collect = lambda states, x: {"a": jbn.moments(x), "b": jbn.moments(x)}
    states = dict.fromkeys("ab", jbn.init(4)[1])
    with pytest.raises(ValueError, match="batches is an iterator"):
        recalibrate(collect, states, iter(batches(2)))
    with pytest.raises(ValueError, match="batches is empty"):
        recalibrate(collect, states, [])
    with pytest.raises(ValueError, match="batches is empty"):
        pooled_moments([])


def test_a_progress_bar_shows_each_pass(capsys):
    pytest.importorskip("tqdm", reason="needs tqdm: pip install 'jbn[examples]'")
    recalibrate(
        lambda states, x: {"a": jbn.moments(x)}, {"a": jbn.init(4)[1]}, batches(2), progress=True
    )
    assert "recalibrate, pass 1" in capsys.readouterr().err


class Layer(nn.Module):
    """One link of a chain: a norm and relu."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x)), None


def test_a_scanned_chain_takes_as_many_passes_as_it_has_layers():
    model = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    xs = batches(4)
    variables = nn.FrozenDict(model.init(jax.random.key(0), xs[0]))
    new = recalibrate_linen(jax.jit(lambda v, x: model.apply(v, x)[0]), variables, xs)
    assert isinstance(new, nn.FrozenDict)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for number in range(3):
        stats = pooled(xs)
        norm = new["batch_stats"]["norm"]
        close((norm["mean"][number], norm["var"][number]), stats)
        xs = [relu_normalized(x, *stats) for x in xs]


def test_a_jit_inside_apply_is_an_error():
    model, xs = nn.BatchNorm(use_running_average=True), batches(2)
    variables = model.init(jax.random.key(0), xs[0])
    inner = jax.jit(model.apply)
    with pytest.raises(ValueError, match=r"jax\.jit"):
        recalibrate_linen(lambda v, x: inner(v, x), variables, xs)
    inner(variables, xs[0])
    with pytest.raises(ValueError, match=r"jax\.jit"):
        recalibrate_linen(lambda v, x: inner(v, x), variables, xs)


def test_a_norm_that_is_the_model_with_complex_x():
    x = [(a[..., :4] + 1j * a[..., ::-1]).astype(np.complex64) for a in batches(3)]
    everything = np.concatenate(x).astype(np.complex128).reshape(-1, 4)
    variance = (np.abs(everything - everything.mean(0)) ** 2).mean(0)
    model = jbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), x[0])
    new = recalibrate_linen(model.apply, variables, iter(x))["batch_stats"]
    close((new["mean"], new["var"]), (everything.mean(0), variance))
    norm = jbn.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    recalibrate_nnx(norm, x)
    close((norm.mean[...], norm.var[...]), (everything.mean(0), variance))


def test_passes_end_once_nothing_changes_and_not_before():
    """Three norms side by side need one pass, and a second to see that nothing changed."""
    xs, started = batches(3), []

    class Loader:
        def __iter__(self):
            started.append(0)
            return iter(xs)

    states = dict.fromkeys("abc", jbn.init(4)[1])
    collect = lambda states, x: {key: jbn.moments(x) for key in states}
    recalibrate(collect, states, Loader())
    assert len(started) == 1 + 2  # the first asks whether the loader gives its data again

    def late(states, x):
        """In the second pass only the variance of "b" changes, in the third only that of "c"."""
        spread = {"b": 1 + states["a"].mean[0], "c": 1 + states["b"].var[0] / 100}
        scaled = {key: jbn.moments((x - pooled_mean) * by) for key, by in spread.items()}
        return {"a": jbn.moments(x), **scaled}

    pooled_mean = jnp.asarray(pooled(xs)[0], jnp.float32)[None, None]
    new = recalibrate(late, dict.fromkeys("abc", jbn.init(4)[1]), xs)
    mean, var = pooled(xs)
    of_b = var * (1 + mean[0]) ** 2
    np.testing.assert_allclose(new["b"].var, of_b, rtol=1e-4)
    np.testing.assert_allclose(new["c"].var, var * (1 + of_b[0] / 100) ** 2, rtol=1e-4)


def test_wrong_passes_and_wrong_moments_are_errors():
    states, xs = {"a": jbn.init(4)[1]}, batches(3)
    good = lambda states, x: {"a": jbn.moments(x)}
    for passes in (0, -1):
        with pytest.raises(ValueError, match=f"passes is {passes}, expected at least 1"):
            recalibrate(good, states, xs, passes=passes)
    with pytest.raises(TypeError, match=r"passes is 1\.5"):
        recalibrate(good, states, xs, passes=1.5)
    with pytest.raises(ValueError, match="moments of 'b', expected only keys of states"):
        recalibrate(lambda states, x: {"b": jbn.moments(x)}, states, xs)
    with pytest.raises(TypeError, match=r"for 'a', expected jbn\.Moments"):
        recalibrate(lambda states, x: {"a": x}, states, xs)
    with pytest.raises(TypeError, match="returned a Moments, expected a dict"):
        recalibrate(lambda states, x: jbn.moments(x), states, xs)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 'a', expected that of its state, \(4"):
        recalibrate(lambda states, x: {"a": jbn.moments(x[..., :2])}, states, xs)
    sizes = {len(x) for x in xs}
    assert len(sizes) > 1
    some = lambda states, x: {"a": jbn.moments(x)} if len(x) == len(xs[0]) else {}
    with pytest.raises(ValueError, match="'a' for some batches only"):
        recalibrate(some, states, xs)
    with pytest.raises(ValueError, match=r"variables hold \['params'\], expected 'batch_stats'"):
        recalibrate_linen(lambda v, x: x, {"params": {}}, xs)
    with pytest.raises(ValueError, match="no batch norm was called"):
        recalibrate_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), xs)


def test_statistics_narrower_than_float32_keep_their_dtype():
    """Nothing is averaged into them here, so that they cannot stall: only the result is rounded."""
    xs = batches(4)
    mean, var = pooled(xs)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    narrow = lambda tree: jax.tree.map(lambda v: v.astype(jnp.bfloat16), tree)
    model = jbn.linen.BatchNorm(use_running_average=True)
    variables = narrow(model.init(jax.random.key(0), xs[0]))
    norm = jbn.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    nnx.update(norm, narrow(nnx.state(norm)))
    recalibrate_nnx(norm, xs)
    state = jbn.init(4)[1]
    state = state._replace(mean=state.mean.astype(jnp.bfloat16), var=state.var.astype(jnp.float16))
    functional = recalibrate(lambda states, x: {"a": jbn.moments(x)}, {"a": state}, xs)["a"]
    assert (functional.mean.dtype, functional.var.dtype) == (jnp.bfloat16, jnp.float16)
    linen = recalibrate_linen(model.apply, variables, xs)["batch_stats"]
    for found in ((linen["mean"], linen["var"]), (norm.mean[...], norm.var[...]), functional[:2]):
        assert found[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found[0]), mean, rtol=eps)
        np.testing.assert_allclose(np.float32(found[1]), var, rtol=eps)


class Energy(nn.Module):
    """A model that differentiates itself in its call."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        if self.is_initializing():
            return norm(x)
        return nn.value_and_grad(lambda norm, x: jnp.sum(norm(x) ** 2), norm, x)[0]


def test_a_model_that_differentiates_itself():
    xs = batches(2)
    variables = Energy().init(jax.random.key(0), xs[0])
    norm = recalibrate_linen(Energy().apply, variables, xs)["batch_stats"]["norm"]
    close((norm["mean"], norm["var"]), pooled(xs))


@pytest.mark.x64
def test_float64_batches_in_a_loop_that_carries_float32_statistics():
    xs = [x.astype(np.float64) for x in batches(2)]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            nn.BatchNorm(use_running_average=True, name="norm", dtype=jnp.float64)(x)
            return x, None

    variables = Step().init(jax.random.key(0), xs[0], None)
    axes = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
    loop = nn.scan(Step, length=3, split_rngs={"params": False}, **axes)()
    new = recalibrate_linen(lambda v, x: loop.apply(v, x, None), variables, xs)
    norm = new["batch_stats"]["norm"]
    assert norm["mean"].dtype == jnp.float32
    close((norm["mean"], norm["var"]), pooled(xs))


def test_arguments_of_the_wrong_kind():
    """Each message is jbn's own, and holds the value."""
    model, xs, state = nn.BatchNorm(use_running_average=True), batches(1), jbn.init(4)[1]
    variables = model.init(jax.random.key(0), xs[0])
    norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    good = lambda states, x: {"a": jbn.moments(x)}
    named = {
        "batches is a NoneType": lambda: pooled_moments(None),
        "batches is a dict": lambda: recalibrate_linen(model.apply, variables, {"image": xs[0]}),
        "batches is a int": lambda: recalibrate_nnx(norm, 5),
        "batch holds a str": lambda: recalibrate_nnx(norm, ["cat"]),
        "apply is None": lambda: recalibrate_linen(None, variables, xs),
        "apply is 3": lambda: recalibrate_nnx(norm, xs, 3),
        "variables is a NoneType": lambda: recalibrate_linen(model.apply, None, xs),
        "model is a BatchNorm": lambda: recalibrate_nnx(model, xs),
        "collect is 'x'": lambda: recalibrate("x", {"a": state}, xs),
        "states is a list": lambda: recalibrate(good, [state], xs),
        r"states\['a'\] is a int": lambda: recalibrate(good, {"a": 3}, xs),
        "unbiased is 'no'": lambda: recalibrate(good, {"a": state}, xs, unbiased="no"),
        "progress is 1": lambda: recalibrate_linen(model.apply, variables, xs, progress=1),
        "passes is True": lambda: recalibrate(good, {"a": state}, xs, passes=True),
    }
    for message, call in named.items():
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="holds a tuple of 3"):
        pooled_moments([(xs[0],) * 3])
    shapes = state._replace(var=jnp.ones(3))
    with pytest.raises(ValueError, match=r"var has shape \(3,\), expected \(4,\)"):
        recalibrate(good, {"a": shapes}, xs)


def test_damaged_variables_are_named():
    """Flax makes what is missing anew in a mutable collection, and would then read it."""
    xs = batches(1)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
            return norm("b")(norm("a")(x))

    variables = Two().init(jax.random.key(0), xs[0])
    good = variables["batch_stats"]
    for damaged, message in (
        ({"a": good["a"]}, "b has no mean and var"),
        ({"a": good["a"], "b": {"mean": good["b"]["mean"]}}, "b has no mean and var"),
        ({"a": good["a"], "b": {**good["b"], "var": None}}, "b has a mean .* and var None"),
        ({"a": good["a"], "b": {**good["b"], "var": np.ones(3)}}, r"b has a mean .* and var \(3"),
        ({}, r"batch_stats is \{\}"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate_linen(Two().apply, {**variables, "batch_stats": damaged}, xs)


class One(nn.Module):
    """One norm, which reads 100 + x; a part of larger models."""

    @nn.compact
    def __call__(self, x, train=False):
        return 2 * nn.BatchNorm(use_running_average=not train, name="norm")(100 + x)


def _parts(*names):
    """Variables of several models of one kind, each under its name; and "norm", which none has."""
    own = One().init(jax.random.key(0), np.ones((1, 4)))
    return {c: {"norm": own[c]["norm"], **dict.fromkeys(names, own[c])} for c in own}


def _part(variables, name):
    return {collection: tree[name] for collection, tree in variables.items()}


def test_a_model_on_a_part_of_the_variables():
    xs, variables = batches(2), _parts("encoder", "decoder")
    run = lambda v, x, **options: One().apply(v, x, **options)
    new = recalibrate_linen(lambda v, x: run(_part(v, "encoder"), x), variables, xs)["batch_stats"]
    mean, var = pooled(xs)
    np.testing.assert_allclose(new["encoder"]["norm"]["mean"], 100 + mean, rtol=1e-5)
    np.testing.assert_allclose(new["encoder"]["norm"]["var"], var, rtol=1e-4)
    for unused in (new["decoder"]["norm"], new["norm"]):
        np.testing.assert_array_equal(unused["mean"], 0)
        np.testing.assert_array_equal(unused["var"], 1)


def test_a_model_that_runs_twice_on_a_part_of_the_variables_in_train_mode():
    xs, variables = batches(2), _parts("encoder")

    def apply(v, x):
        own = _part(v, "encoder")
        for shift in (0, 1):
            _, updates = One().apply(own, x + shift, train=True, mutable=["batch_stats"])
            own = {**own, **updates}

    new = recalibrate_linen(apply, variables, xs, passes=1)["batch_stats"]
    mean, var = pooled(xs + [x + 1 for x in xs])
    np.testing.assert_allclose(new["encoder"]["norm"]["mean"], 100 + mean, rtol=1e-5)
    np.testing.assert_allclose(new["encoder"]["norm"]["var"], var, rtol=1e-4)
    np.testing.assert_array_equal(new["norm"]["mean"], 0)


def test_a_part_of_the_variables_that_cannot_be_told_is_an_error():
    changed = lambda v: jax.tree.map(lambda leaf: 2 * leaf, _part(v, "encoder"))
    with pytest.raises(ValueError, match="'norm' cannot be found among the variables"):
        recalibrate_linen(
            lambda v, x: One().apply(changed(v), x), _parts("encoder"), batches(1), passes=1
        )


def test_what_apply_gets_back_from_the_model_holds_no_moments():
    """Old and new variables have one structure, and only what was asked for comes back."""
    xs, variables = batches(2), One().init(jax.random.key(0), np.ones((1, 4)))

    def apply(v, x):
        _, updates = One().apply(v, x, train=True, mutable=["batch_stats"])
        changed = jax.tree.map(jnp.add, v["batch_stats"], updates["batch_stats"])
        _, others = One().apply(v | {"batch_stats": changed}, x, mutable=["intermediates"])
        assert not others

    norm = recalibrate_linen(apply, variables, xs, passes=1)["batch_stats"]["norm"]
    np.testing.assert_allclose(norm["mean"], 100 + pooled(xs)[0], rtol=1e-5)
    np.testing.assert_allclose(norm["var"], pooled(xs)[1], rtol=1e-4)


def test_a_loop_of_jax_that_carries_the_statistics_is_an_error():
    xs, variables = batches(1), One().init(jax.random.key(0), np.ones((1, 4)))

    def apply(v, x):
        def step(held, x):
            v_now = v | {"batch_stats": held}
            return One().apply(v_now, x, train=True, mutable=["batch_stats"])[1]["batch_stats"], 0

        return jax.lax.scan(step, v["batch_stats"], x)

    with pytest.raises(ValueError, match=r"a batch norm ran where .* jax\.lax\.scan"):
        recalibrate_linen(apply, variables, [xs[0][None]], passes=1)


class Foreign:
    """An array of another library, such as torch: its dtype is none of NumPy's."""

    dtype = "another"

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return self.value


def test_arrays_of_other_libraries_and_random_keys_in_batches():
    xs, norm = batches(2), nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    foreign = [Foreign(x) for x in xs]
    m = pooled_moments(foreign)
    close((m.mean, m.m2 / m.count), pooled(xs))
    m = pooled_moments([(x, Foreign(np.ones(4))) for x in foreign])
    close((m.mean, m.m2 / m.count), pooled(xs))
    recalibrate_nnx(norm, [(x, jax.random.key(0)) for x in foreign], lambda m, batch: m(batch[0]))
    close((norm.mean[...], norm.var[...]), pooled(xs))
    with pytest.raises(TypeError, match="batch holds a ndarray"):
        recalibrate_nnx(norm, [Foreign(np.array(["cat"]))])


def test_a_batch_that_is_not_finite_does_not_count_where_the_layer_skips_it():
    xs = batches(3)
    damaged = xs[1].copy()
    damaged[0, 0, 2] = np.inf
    seen = [xs[0], damaged, xs[2]]
    options = {"use_running_average": True, "skip_nonfinite": True}
    model = jbn.linen.BatchNorm(**options)
    new = recalibrate_linen(model.apply, model.init(jax.random.key(0), xs[0]), seen)["batch_stats"]
    close((new["mean"], new["var"]), pooled([xs[0], xs[2]]))
    norm = jbn.nnx.BatchNorm(4, **options, rngs=nnx.Rngs(0))
    recalibrate_nnx(norm, seen)
    close((norm.mean[...], norm.var[...]), pooled([xs[0], xs[2]]))
    model = jbn.linen.BatchNorm(use_running_average=True)
    new = recalibrate_linen(model.apply, model.init(jax.random.key(0), xs[0]), seen)["batch_stats"]
    assert not np.isfinite(new["mean"][2])
    model = nn.BatchNorm(use_running_average=True)  # which jbn computes, with its own options
    variables = model.init(jax.random.key(0), xs[0])

    def replaced(variables, x):
        with jbn.linen.replacing(skip_nonfinite=True):
            return model.apply(variables, x)

    new = recalibrate_linen(replaced, variables, seen)["batch_stats"]
    close((new["mean"], new["var"]), pooled([xs[0], xs[2]]))
    with jbn.linen.replacing(by_path={"": {"skip_nonfinite": True}}):
        new = recalibrate_linen(model.apply, variables, seen)["batch_stats"]
    close((new["mean"], new["var"]), pooled([xs[0], xs[2]]))


def test_other_mappings_of_variables():
    xs = batches(2)
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), xs[0])
    found = recalibrate_linen(model.apply, collections.defaultdict(dict, variables), xs)
    assert isinstance(found, collections.defaultdict)
    assert found.default_factory is dict
    close((found["batch_stats"]["mean"], found["batch_stats"]["var"]), pooled(xs))
    inside = {**variables, "batch_stats": types.MappingProxyType(variables["batch_stats"])}
    for held in (types.MappingProxyType(variables), inside):
        with pytest.raises(TypeError, match="variables hold a mappingproxy"):
            recalibrate_linen(model.apply, held, xs)
