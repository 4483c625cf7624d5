"""jbn.nnx.replace and restore: flax's layers become jbn's in place, wherever they are held."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jbn.nnx

pytestmark = pytest.mark.third_party

FAR = (np.random.default_rng(0).normal(size=(32, 6)) + 1e4).astype(np.float32)
NEAR = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)


def norm(**options):
    return nnx.BatchNorm(6, rngs=nnx.Rngs(0), **options)


class Sub(nnx.BatchNorm):
    pass


class Held(nnx.Module):
    """Norms in every kind of container, one of them twice."""

    def __init__(self, layer=norm):
        self.attribute = layer()
        self.listed = nnx.List([layer(), nnx.Dict(inner=layer(momentum=0.5))])
        self.data = nnx.data([layer(), {"key": (layer(),)}])
        self.sequence = nnx.Sequential(layer(), nnx.Linear(6, 6, rngs=nnx.Rngs(1)), layer())
        self.shared = self.attribute

    def norms(self):
        return [
            self.attribute,
            self.listed[0],
            self.listed[1]["inner"],
            self.data[0],
            self.data[1]["key"][0],
            self.sequence.layers[0],
            self.sequence.layers[2],
            self.shared,
        ]

    def __call__(self, x):
        for layer in self.norms():
            x = x + layer(x)
        return x


def ours(**options):
    return jbn.nnx.BatchNorm(6, rngs=nnx.Rngs(0), **options)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_container_and_every_reference():
    model = Held()
    before, variables = model.norms(), jax.tree.leaves(nnx.state(model))
    objects = [(layer.mean, layer.var, layer.scale, layer.bias) for layer in before]
    outer = model.attribute
    assert jbn.nnx.replace(model) is model
    assert all(type(layer) is jbn.nnx.BatchNorm for layer in model.norms())
    assert all(a is b for a, b in zip(model.norms(), before, strict=True))
    assert model.shared is model.attribute is outer
    for layer, was in zip(model.norms(), objects, strict=True):
        now = (layer.mean, layer.var, layer.scale, layer.bias)
        assert all(a is b for a, b in zip(now, was, strict=True))
    equal(jax.tree.leaves(nnx.state(model)), variables)
    expected = Held(ours)
    equal(model(FAR), expected(FAR))
    equal(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(expected)))
    flaxs = Held()
    flaxs(FAR)  # whose variance of these data is 0
    assert np.abs(flaxs.attribute.var[...] - model.attribute.var[...]).max() > 5e-3


@pytest.mark.parametrize("pytree", [True, False])
def test_modules_that_are_no_pytrees_and_plain_containers(pytree):
    class Model(nnx.Module, pytree=pytree):
        def __init__(self):
            self.layers = [norm(), norm()] if not pytree else nnx.data([norm(), norm()])

    model = jbn.nnx.replace(Model())
    assert all(type(layer) is jbn.nnx.BatchNorm for layer in model.layers)
    for container in ([norm()], {"a": norm()}, (norm(), [norm()])):
        jbn.nnx.replace(container)
        leaves = [m for _, m in nnx.iter_modules(container)]
        assert leaves
        assert all(type(layer) is jbn.nnx.BatchNorm for layer in leaves)


def test_the_model_may_be_a_norm():
    layer = norm()
    assert jbn.nnx.replace(layer) is layer
    equal(layer(FAR), ours()(FAR))
    assert type(jbn.nnx.restore(layer)) is nnx.BatchNorm


def test_an_optimizer_goes_on():
    """Five steps, the switch, five more: as ten steps of a model that was jbn's from the start."""

    def train(model, optimizer, steps):
        @nnx.jit
        def step(model, optimizer):
            loss = lambda model: jnp.square(model(NEAR) - 1).mean()
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(steps):
            step(model, optimizer)

    def start(layer):
        model = Held(layer)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    model, optimizer = start(norm)
    train(model, optimizer, 5)
    jbn.nnx.replace(model)
    train(model, optimizer, 5)
    whole, whole_optimizer = start(ours)
    train(whole, whole_optimizer, 10)
    # float32 rounding of another order of sums, through ten steps of Adam
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, *(jax.tree.leaves(nnx.state(m)) for m in (model, whole)))
    assert optimizer.step[...] == 10


def test_a_cached_jit_traces_anew():
    model = Held()

    @nnx.jit
    def call(model, x):
        return model(x)

    call(model, NEAR)
    jbn.nnx.replace(model, momentum=1.0)
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    call(model, NEAR)
    equal(jax.tree.leaves(nnx.state(model, nnx.BatchStat)), before)  # momentum 1: nothing moves


def test_there_and_back():
    model = Held()
    attributes = lambda: [
        {k: v for k, v in vars(layer).items() if not k.startswith("_pytree")}
        for layer in model.norms()
    ]
    before, graph = attributes(), nnx.graphdef(model)
    jbn.nnx.replace(model, momentum=0.25, axis_name="i", skip_nonfinite=True)
    jbn.nnx.replace(model, momentum=0.75)
    assert nnx.graphdef(model) != graph
    assert jbn.nnx.restore(model) is model
    assert nnx.graphdef(model) == graph
    for layer, was in zip(attributes(), before, strict=True):
        assert layer.keys() == was.keys()
        assert all(layer[key] is was[key] for key in was)
    by_hand = nnx.List([ours(momentum=0.5)])
    jbn.nnx.restore(by_hand)
    assert type(by_hand[0]) is jbn.nnx.BatchNorm, "restore undoes replace, and nothing else"


def test_options_everywhere_and_by_path():
    poisoned = NEAR.copy()
    poisoned[3, 2] = np.nan
    model = nnx.Dict(a=norm(), b=nnx.List([norm(), norm()]), c=norm())
    jbn.nnx.replace(
        model,
        skip_nonfinite=True,
        by_path={"b/*": {"skip_nonfinite": False}, "b/1": {"momentum": 0.5}, "c": None},
    )
    assert type(model["c"]) is nnx.BatchNorm
    assert [model["b"][i].momentum for i in (0, 1)] == [0.99, 0.5]
    for layer in (model["a"], *model["b"]):
        layer(poisoned)
    assert not np.isnan(model["a"].mean[...]).any()
    assert all(np.isnan(layer.mean[...]).any() for layer in model["b"])
    jbn.nnx.replace(model, unbiased=True, by_path={"b/*": None})
    assert model["a"].skip_nonfinite, "what an earlier call gave stays"
    assert [model[k].unbiased for k in ("a", "c")] == [True, True]
    assert not model["b"][0].unbiased


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 8},
        {"unbiased": True},
        {"activation": jax.nn.relu},
        {"update_stats": False},
        {"epsilon": 0.1, "momentum": 0.5, "dtype": jnp.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_option_is_that_of_jbns_layer(options):
    layer, expected = jbn.nnx.replace(norm(), **options), ours(**options)
    equal(layer(NEAR), expected(NEAR))
    equal(jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(nnx.state(expected)))


def test_axis_name_synchronizes_models_that_know_nothing_of_it():
    model = jbn.nnx.replace(nnx.Sequential(norm()), axis_name="batch")
    graph, state = nnx.split(model)

    def shard(x, state):
        copy = nnx.merge(graph, state)
        return copy(x), nnx.state(copy, nnx.BatchStat)

    y, new = jax.vmap(shard, in_axes=(0, None), axis_name="batch")(NEAR.reshape(4, 8, 6), state)
    whole = ours()
    np.testing.assert_allclose(y.reshape(32, 6), whole(NEAR), rtol=1e-5, atol=1e-5)
    mean = jax.tree.leaves(new)[0][2]
    np.testing.assert_allclose(mean, whole.mean[...], rtol=1e-5, atol=1e-7)


def test_vmapped_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return nnx.BatchNorm(6, rngs=nnx.Rngs(key))

    stacked = jbn.nnx.replace(create(jax.random.split(jax.random.key(0), 3)))
    x = np.stack([FAR, 2 * FAR, NEAR])
    y = nnx.vmap(lambda layer, x: layer(x))(stacked, x)
    for i in range(3):
        np.testing.assert_allclose(y[i], ours()(x[i]), rtol=1e-5, atol=1e-5)


def test_train_and_eval_modes_go_on():
    model = Held()
    model.eval()
    jbn.nnx.replace(model)
    assert all(layer.use_running_average for layer in model.norms())
    expected = Held(ours)
    expected.eval()
    equal(model(NEAR), expected(NEAR))
    model.train()
    assert not model.attribute.use_running_average


def test_subclasses_are_left_alone_and_reported():
    model = nnx.Dict(sub=Sub(6, rngs=nnx.Rngs(0)), flaxs=norm(), jbns=ours())
    with pytest.warns(UserWarning, match=r"left alone: sub \(Sub\)\. "):
        jbn.nnx.replace(model, unbiased=True)
    assert type(model["sub"]) is Sub
    assert type(model["flaxs"]) is jbn.nnx.BatchNorm
    assert not model["jbns"].unbiased
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jbn.nnx.replace(nnx.Dict(jbns=ours(), renorm=jbn.nnx.BatchRenorm(6, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip_nonfinit": True}, TypeError, "skip_nonfinit cannot"),
        ({"param_dtype": jnp.bfloat16}, TypeError, "param_dtype cannot"),
        ({"num_features": 3}, TypeError, "num_features cannot"),
        ({"implementation": "cudnn"}, ValueError, "cudnn"),
        ({"by_path": {"*": 0.9}}, TypeError, r"by_path\['\*'\] is a float"),
        ({"by_path": {"nowhere/*": {}}}, ValueError, "nowhere.*expected one that matches.*listed"),
    ],
)
def test_nothing_is_changed_by_a_call_that_raises(options, error, message):
    model = Held()
    with pytest.raises(error, match=message):
        jbn.nnx.replace(model, **options)
    assert all(type(layer) is nnx.BatchNorm for layer in model.norms())


def test_what_holds_no_nnx_modules_is_refused():
    linen_norm = linen.BatchNorm()
    for model in (linen_norm, [linen_norm], 3, None, nnx.state(norm())):
        for function in (jbn.nnx.replace, jbn.nnx.restore):
            with pytest.raises(TypeError, match=r"(?s)without nnx modules.*jbn\.linen\.replacing"):
                function(model)
    without_norms = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert jbn.nnx.replace(without_norms) is without_norms
