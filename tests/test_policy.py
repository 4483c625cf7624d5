"""Which statistics normalize, whether they update, whether scale and bias train: each alone."""

import collections
import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbn
import jbn.linen
from jbn.policy import norm_mask, not_

pytestmark = pytest.mark.third_party


class Model(nn.Module):
    frozen_first: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = jbn.linen.BatchNorm(use_running_average=not train or self.frozen_first, name="first")(
            nn.Dense(4, name="in")(x)
        )
        x = jbn.linen.BatchNorm(use_running_average=not train, use_scale=False, name="second")(
            nn.relu(x)
        )
        return nn.Dense(1, name="out")(nn.LayerNorm(name="layer_norm")(x))


def setup(**options):
    model, x = Model(**options), np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    return model, x, model.init(jax.random.key(0), x, train=True)


def test_the_mask_names_norms_and_nothing_else():
    _, _, variables = setup()
    mask = norm_mask(variables["params"])
    assert {name: set(layer.values()) for name, layer in mask.items()} == {
        "in": {False},
        "first": {True},
        "second": {True},
        "layer_norm": {True},
        "out": {False},
    }
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])
    only_first = norm_mask(variables["params"], lambda path: path[-1] == "first")
    assert [name for name, layer in only_first.items() if any(layer.values())] == ["first"]


def test_functional_params_in_any_container():
    params, _ = jbn.init(3, use_bias=False)
    tree = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norms": [params, (params,)]}
    mask = norm_mask(tree)
    assert mask["conv"] == {"kernel": False, "bias": False}
    assert mask["norms"] == [jbn.Params(True, None), (jbn.Params(True, None),)]
    assert not_(mask)["norms"][0] == jbn.Params(False, None)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)


def train_step(model, variables, x, optimizer):
    def loss(params):
        y, new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(y - 1).mean(), new

    gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, _ = optimizer.update(
        gradients, optimizer.init(variables["params"]), variables["params"]
    )
    return {"params": optax.apply_updates(variables["params"], updates), **new}


def changed(before, after):
    """The layers of which anything changed."""
    differs = lambda a, b: any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return {name for name in before if differs(before[name], after[name])}


def test_a_frozen_layer_inside_a_training_model():
    model, x, variables = setup(frozen_first=True)
    mask = norm_mask(variables["params"], lambda path: path[-1] == "first")
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask))
    new = train_step(model, variables, x, optimizer)
    assert changed(variables["params"], new["params"]) == {"in", "second", "layer_norm", "out"}
    assert changed(variables["batch_stats"], new["batch_stats"]) == {"second"}


def test_weight_decay_spares_the_norms():
    _, _, variables = setup()
    decay = optax.add_decayed_weights(0.1, mask=lambda params: not_(norm_mask(params)))
    params = jax.tree.map(lambda p: p + 1.0, variables["params"])
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    assert changed(jax.tree.map(jnp.zeros_like, params), updates) == {"in", "out"}


def test_a_frozen_layer_still_passes_gradients():
    """use_running_average=True in training: y moves with x as a fixed affine map does."""
    params, state = jbn.init(3)
    state = state._replace(var=jnp.full(3, 4.0))
    dx = jax.grad(lambda x: jbn.batch_norm_eval(x, params, state).sum())(jnp.ones((5, 3)))
    np.testing.assert_allclose(dx, np.full((5, 3), 1 / np.sqrt(4 + 1e-5)), rtol=1e-6)


LAYERS = {
    "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "value": {"scale": jnp.ones(2), "value": jnp.ones(2)},
    # Layers, not parameters:
    "scale": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    "bias": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
}
NORMS = {"norm", "bias"}
Pair = collections.namedtuple("Pair", "first second")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Norm:
    scale: Any
    bias: Any


@flax.struct.dataclass
class Dense:
    kernel: Any
    bias: Any


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Linear(2, 2, rngs=rngs)
        self.layers = nnx.List([nnx.BatchNorm(2, use_scale=False, rngs=rngs)])


CONTAINERS = {
    "dict": LAYERS,
    "FrozenDict": flax.core.freeze(LAYERS),
    "OrderedDict": collections.OrderedDict(LAYERS),
    "named tuple": Pair(LAYERS, [LAYERS, (LAYERS,)]),
    "dataclasses": {"norm": Norm(1.0, 2.0), "dense": Dense(1.0, 2.0)},
    "State": nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param),
    "pure dict": nnx.to_pure_dict(nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)),
    "boxes": {"norm": {"scale": nn.Partitioned(jnp.ones(2), ("data",))}},
    "only layers called scale and bias": {"scale": LAYERS["dense"], "bias": LAYERS["norm"]},
    "Params": jbn.Params(jnp.ones(2), None),
    "nothing": {},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_mask_is_a_tree_of_the_very_type_and_optax_takes_it(name):
    tree = CONTAINERS[name]
    mask = norm_mask(tree)
    assert type(mask) is type(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    zeroed = optax.masked(optax.set_to_zero(), mask)
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = zeroed.update(ones, zeroed.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    chosen = [bool((np.asarray(u) == 0).all()) for u in jax.tree.leaves(updates)]
    assert chosen == jax.tree.leaves(mask)
    optax.masked(optax.adam(1e-3), lambda params: not_(norm_mask(params))).init(tree)


def test_layers_called_scale_or_bias_are_judged_by_what_they_hold():
    for tree in (LAYERS, flax.core.freeze(LAYERS)):
        mask = norm_mask(tree)
        assert {name for name, layer in mask.items() if any(layer.values())} == NORMS
        assert {name for name, layer in mask.items() if all(layer.values())} == NORMS
    state = norm_mask(CONTAINERS["State"])
    flat = {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
    assert flat == {"layers/0/bias": True, "scale/bias": False, "scale/kernel": False}
    selected = norm_mask(Pair(LAYERS, [LAYERS]), lambda path: path == ("second", "0", "norm"))
    assert sum(jax.tree.leaves(selected)) == 2
    assert selected.second[0]["norm"] == {"scale": True, "bias": True}


def test_keys_that_are_whole_paths():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    mask = norm_mask(flat)
    assert jax.tree.structure(mask) == jax.tree.structure(flat)
    assert jax.tree.leaves(mask) == [False, False, True, True]
    dense, norm = ({"bias": 0.0, "kernel": 0.0}, {"bias": 0.0, "scale": 0.0})
    by_path = flax.traverse_util.flatten_dict({"a": dense, "b": norm})
    assert norm_mask(by_path) == {key: key[0] == "b" for key in by_path}
    assert norm_mask(by_path, lambda path: path != ("b",)) == dict.fromkeys(by_path, False)


def test_no_tree_no_function_and_no_mask_are_errors():
    with pytest.raises(TypeError, match="params is a str"):
        norm_mask("scale")
    with pytest.raises(TypeError, match="select is 3"):
        norm_mask({"scale": 0.0}, 3)
    with pytest.raises(TypeError, match="mask is Array"):
        not_({"scale": jnp.ones(2)})


def test_a_bias_beside_a_layer_that_is_called_scale_is_no_norm():
    dense = {"bias": 0.0, "kernel": 0.0}
    params = {"bias": 0.0, "scale": dense, "head": {"scale": 0.0, "bias": dense}}
    assert not any(jax.tree.leaves(norm_mask(params)))
