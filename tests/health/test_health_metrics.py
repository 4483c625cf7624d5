"""Metrics are the report's numbers, made inside jit, of every kind of tree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn import fold, health

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (256, 6)).astype(np.float32)


class Net(nn.Module):
    """A dense layer and a norm."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, use_bias=False)(x)
        return jbn.linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)


def updated(variables, x, momentum=0.9):
    _, new = Net(momentum).apply(variables, x, True, mutable=["batch_stats"])
    return {"params": variables["params"], **new}


@pytest.fixture(scope="module")
def variables():
    with jax.numpy_rank_promotion("allow"):
        v = Net().init(jax.random.key(0), X, False)
        for _ in range(30):
            v = updated(v, X + RNG.normal(0, 0.1, X.shape).astype(np.float32))
    return v


def dense(v, x=X):
    return jnp.asarray(x) @ v["params"]["Dense_0"]["kernel"]


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol)


def test_the_numbers_are_those_of_the_report(variables):
    v = jax.tree.map(np.array, variables)
    v["params"]["BatchNorm_0"]["bias"][:] = [0, 9, -9, 0.5, 0]
    v["batch_stats"]["BatchNorm_0"]["var"][4] = 0
    moments = {"BatchNorm_0": jbn.moments(dense(v) * 2 + 1)}
    got = jax.jit(health.metrics)(v, moments)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in got.values())
    m = health.model_report(v, moments).layers[0]
    alive = m.signal > 0.1
    finite = alive & (m.var > 0)  # a running variance of 0 makes drift infinite
    assert np.isinf(got["BatchNorm_0/drift"]) or finite.all()
    close(got["BatchNorm_0/signal"], m.signal.min())
    close(got["BatchNorm_0/std"], np.sqrt(m.var.mean()))
    close(got["BatchNorm_0/bias"], np.sqrt(np.square(m.bias).mean()))
    close(got["BatchNorm_0/input_std"], np.sqrt(m.input_var.mean()))
    close(got["BatchNorm_0/one_sided"], np.mean(np.abs(m.one_sided) > 4))
    assert 0 < got["BatchNorm_0/one_sided"] < 1
    v["batch_stats"]["BatchNorm_0"]["var"][4] = 1
    got, m = health.metrics(v, moments), health.model_report(v, moments).layers[0]
    close(got["BatchNorm_0/drift"], np.abs(m.drift).max(), 1e-4)
    close(got["BatchNorm_0/spread"], np.maximum(m.spread, 1 / m.spread).max(), 1e-4)
    close(got["BatchNorm_0/ratio"], m.ratio.max())


def test_without_a_batch_the_variables_are_judged(variables):
    v = jax.tree.map(np.array, variables)
    stats = v["batch_stats"]["BatchNorm_0"]
    stats["var"][:2], stats["mean"][3] = 1e-9, np.nan
    got = jax.jit(health.metrics)(v)
    close(got["BatchNorm_0/dead"], 2 / 4)  # of the channels that are finite
    assert got["BatchNorm_0/nonfinite"] == 1
    close(got["BatchNorm_0/signal"], np.sqrt(1e-9 / (1e-9 + 1e-5)))
    assert "BatchNorm_0/drift" not in got
    stats["var"][:] = np.nan
    got = health.metrics(v)
    assert np.isnan(got["BatchNorm_0/signal"])
    assert got["BatchNorm_0/nonfinite"] == 6


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_the_batch_follows_from_two_states(variables, momentum):
    """drift and spread of the batch against the statistics before its update, without moments."""
    after = updated(variables, X * 2 + 1, momentum)
    got = jax.jit(lambda a, b: health.metrics(a, previous=b, momentum=momentum))(after, variables)
    moments = {"BatchNorm_0": jbn.moments(dense(variables, X * 2 + 1))}
    wanted = health.metrics(variables, moments)
    for key in ("drift", "spread", "input_std", "signal"):
        close(got[f"BatchNorm_0/{key}"], wanted[f"BatchNorm_0/{key}"], 1e-3)


def test_a_dead_unit_follows_from_two_states(variables):
    dead = jax.tree.map(np.array, variables)
    dead["params"]["Dense_0"]["kernel"][:, 2] = 0
    after = updated(dead, X)
    assert health.metrics(after)["BatchNorm_0/dead"] == 0  # the running variance fell by 10 %
    close(health.metrics(after, previous=dead, momentum=0.9)["BatchNorm_0/dead"], 1 / 5)


def test_effective_learning_rate_and_update(variables):
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
    gradients = jax.tree.map(lambda v: jnp.full(v.shape, 0.5), variables["params"])
    new = {**variables, "params": jax.tree.map(lambda v: v * 1.25, variables["params"])}
    options = {"previous": variables, "gradients": gradients, "momentum": 0.9}
    apply = lambda v, x: Net().apply(v, x, False)
    for pairs in ({"BatchNorm_0": "Dense_0/kernel"}, fold.find_pairs(apply, variables, X)):
        got = health.metrics(new, pairs=pairs, **options)
        size = np.sqrt(np.square(kernel * 1.25).sum())
        close(got["BatchNorm_0/weight"], size)
        close(got["BatchNorm_0/effective_lr"], 0.5 * np.sqrt(kernel.size) / size**2)
        close(got["BatchNorm_0/update"], 0.25)


def test_stacked_layers_of_scan_show_the_worst():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(6, use_bias=False)(x)
            return jbn.linen.BatchNorm(use_running_average=True)(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )
    v = jax.tree.map(np.array, stack().init(jax.random.key(0), X, None))
    v["batch_stats"]["BatchNorm_0"]["var"][1, :3] = 0
    v["batch_stats"]["BatchNorm_0"]["mean"][2, 0] = 50
    v["params"]["Dense_0"]["kernel"][0] *= 0.1
    gradients = jax.tree.map(np.ones_like, v["params"])
    pairs = {"BatchNorm_0": "Dense_0/kernel"}
    got = health.metrics(v, gradients=gradients, pairs=pairs)
    assert got["BatchNorm_0/dead"] == 0.5
    assert got["BatchNorm_0/ratio"] == 50
    kernel = v["params"]["Dense_0"]["kernel"]
    each = 6 / np.square(kernel).sum((1, 2))
    close(got["BatchNorm_0/effective_lr"], each.max())


def test_nnx_functional_and_damaged_trees():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([jbn.nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])

    model = Two(nnx.Rngs(0))
    got = nnx.jit(health.metrics)(model)
    assert {key.rpartition("/")[0] for key in got} == {"norms/0", "norms/1"}
    assert got == health.metrics(nnx.state(model))
    tree = {"a": jbn.init(3), "b": {"mean": jnp.ones(3), "scale": jnp.ones(3)}}
    got = health.metrics(tree)
    assert got["a/signal"] > 0.99
    assert got["b/missing"] == 1
    assert [e.kind for e in health.Monitor().update(0, got)] == ["missing"]


def test_errors_name_what_came(variables):
    m = jbn.moments(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="no batch norm in these variables"):
        health.metrics({"params": variables["params"]["Dense_0"]})
    with pytest.raises(ValueError, match=r"moments of \['other'\]"):
        health.metrics(variables, {"other": m})
    with pytest.raises(ValueError, match=r"moments of BatchNorm_0 have shape \(2,\)"):
        health.metrics(variables, {"BatchNorm_0": m})
    with pytest.raises(ValueError, match="gradients came without pairs"):
        health.metrics(variables, gradients=variables["params"])
    with pytest.raises(ValueError, match=r"no 'Conv_0/kernel' in the variables"):
        health.metrics(variables, pairs={"BatchNorm_0": "Conv_0/kernel"})
