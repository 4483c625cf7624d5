"""Trees whose modules are named like collections, complex layers, and counts of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
from jbn import health

ONE = {"scale": np.ones(3), "bias": np.zeros(3)}
FINE = {"mean": np.full(3, 0.1), "var": np.full(3, 2.0)}
BROKEN = FINE | {"mean": np.full(3, np.nan)}


@pytest.mark.parametrize(
    ("params", "batch_stats", "broken", "fine"),
    [
        ({"state": ONE, "a": ONE}, {"state": BROKEN, "a": FINE}, "state", "a"),
        ({"state": ONE, **ONE}, {"state": BROKEN, **FINE}, "state", "layer"),
        (
            {"e": {"batch_stats": ONE, **ONE}},
            {"e": {"batch_stats": BROKEN, **FINE}},
            "e/batch_stats",
            "e",
        ),
        ({"e": {"params": ONE}, "a": ONE}, {"e": {"params": BROKEN}, "a": FINE}, "e/params", "a"),
    ],
)
def test_a_module_may_be_named_like_a_collection(params, batch_stats, broken, fine):
    tree = {"params": params, "batch_stats": batch_stats}
    layers = {m.layer: m for m in health.model_report(tree).layers}
    assert set(layers) == {broken, fine}
    assert [f.kind for f in layers[broken].findings] == ["not finite"]
    assert layers[fine].findings == ()
    assert all((m.scale == 1).all() for m in layers.values())
    numbers = health.metrics(tree, gradients=params, pairs={broken: f"{broken}/scale"})
    assert numbers[f"{broken}/nonfinite"] == 3
    assert numbers[f"{fine}/nonfinite"] == 0
    np.testing.assert_allclose(numbers[f"{broken}/effective_lr"], 1 / np.sqrt(3), rtol=1e-6)


def test_no_layer_hides_another_whose_name_would_be_the_same():
    keys = {"a/b": ONE, "a": {"b": ONE}}, {"a/b": BROKEN, "a": {"b": FINE}}
    report = health.model_report({"params": keys[0], "batch_stats": keys[1]})
    assert len({m.layer for m in report.layers}) == 2
    assert [f.kind for f in report.findings] == ["not finite"]


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"model": {"batch_stats": {"bn": FINE}}}, "model/bn"),
        ({"state": {"params": {"bn": ONE}, "batch_stats": {"bn": FINE}}}, "bn"),
        ({"state": {**ONE, **FINE}}, "layer"),
        ({"params": {"bn": ONE}, "state": {"bn": FINE}}, "bn"),
    ],
)
def test_names_leave_collections_out(tree, name):
    assert [m.layer for m in health.model_report(tree).layers] == [name]


def test_attributes_of_nnx_modules_named_like_collections():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.state = jbn.nnx.BatchNorm(3, rngs=rngs)
            self.batch_stats = jbn.nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.batch_stats(self.state(x))

    model, x = Two(nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
    moments = health.input_moments(model, x)
    report = health.model_report(model, moments)
    assert {m.layer for m in report.layers} == {"state", "batch_stats"} == set(moments)
    assert all(m.drift is not None for m in report.layers)


def test_a_complex_layer_is_measured_by_magnitudes():
    rng = np.random.default_rng(0)
    x = (rng.normal(3, 2, (256, 3)) + 1j * rng.normal(-1, 1, (256, 3))).astype(np.complex64)
    mean, var = x.mean(0), (np.abs(x - x.mean(0)) ** 2).mean(0)
    bias = np.array([0, 1j, 0], np.complex64)
    tree = {
        "params": {"bn": {"scale": np.full(3, 2, np.complex64), "bias": bias}},
        "batch_stats": {"bn": {"mean": mean - np.sqrt(var[0]) * 1j, "var": var}},
    }
    m = health.model_report(tree).layers[0]
    shifted = np.abs(mean - np.sqrt(var[0]) * 1j)
    np.testing.assert_allclose(m.ratio, shifted / np.sqrt(var), rtol=1e-6)
    np.testing.assert_allclose(m.one_sided, [0, 0.5, 0], rtol=1e-4)
    assert m.findings == ()
    moments = {"bn": jbn.Moments(np.full(3, 256.0), mean, 256 * var)}
    m = health.model_report(tree, moments).layers[0]
    np.testing.assert_allclose(m.drift, np.sqrt(var[0] / var), rtol=1e-5)
    assert [f.kind for f in m.findings] == ["drift"]
    got = jax.jit(health.metrics)(tree, moments)
    np.testing.assert_allclose(got["bn/drift"], m.drift.max(), rtol=1e-5)
    np.testing.assert_allclose(got["bn/scale"], 2, rtol=1e-6)
    assert "NaN" not in health.model_report(tree, moments).to_json()


def test_moments_of_a_complex_layer_come_from_its_input():
    model = jbn.nnx.BatchNorm(3, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, (64, 3)) + 1j * rng.normal(size=(64, 3)), jnp.complex64)
    m = health.model_report(model, health.input_moments(model, x)).layers[0]
    np.testing.assert_allclose(m.drift, np.abs(np.asarray(x).mean(0)), rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "updates", "kinds"),
    [
        (np.array([4, 3]), 3, []),
        (np.float32(np.inf), None, ["not finite", "never updated"]),
        (np.array([np.nan, 5.0]), 5, ["not finite"]),
        (np.int32(-1), -1, ["negative count"]),
        (np.zeros(0, np.int32), None, ["never updated"]),
    ],
)
def test_counts_of_every_kind_are_reported(count, updates, kinds):
    params, state = jbn.init(3)
    report = health.model_report({"bn": (params, state._replace(count=count))}, momentum=0.01)
    assert report.layers[0].updates == updates
    assert [f.kind for f in report.findings] == kinds


def test_one_count_for_stacked_replicas():
    params, state = jax.tree.map(lambda v: jnp.stack([v, v]), jbn.init(3))
    m = health.report(params, state._replace(count=jnp.int32(4)), stacked=True)
    assert m.updates == 4
    with pytest.raises(ValueError, match="mean is a scalar, expected a leading axis of replicas"):
        health.report(params, state._replace(mean=0.5), stacked=True)


@pytest.mark.parametrize(("key", "value"), [("scale", "text"), ("bias", np.array(["a"] * 3))])
def test_a_parameter_that_is_no_array_is_reported(key, value):
    tree = {
        "params": {"a": {**ONE, key: value}, "b": ONE},
        "batch_stats": {"a": FINE, "b": FINE},
    }
    (finding,) = health.model_report(tree).findings
    assert (finding.layer, finding.kind) == ("a", "missing")
    assert finding.what.startswith(f"{key} is no array of numbers but ")
    assert health.metrics(tree)["a/missing"] == 1


def test_arguments_of_the_wrong_kind():
    params, state = jbn.init(3)
    tree = {"bn": (params, state)}
    for value in (None, "abc"):
        with pytest.raises(TypeError, match=r"mean is .*, expected an array of numbers"):
            health.report(params, state._replace(mean=value))
    with pytest.raises(TypeError, match="count is True, expected an array of real numbers"):
        health.report(params, state._replace(count=True))
    with pytest.raises(TypeError, match="layer is 3, expected a str"):
        health.report(params, state, layer=3)
    with pytest.raises(TypeError, match="model_report takes no layer"):
        health.model_report(tree, layer="a")
    for function in (health.model_report, health.metrics):
        with pytest.raises(TypeError, match="moments of bn is a int"):
            function(tree, {"bn": 3})
        with pytest.raises(TypeError, match="moments is a Moments, expected a dict from the names"):
            function(tree, jbn.moments(jnp.ones((8, 3))))
        with pytest.raises(TypeError, match=r"limits is {}, expected jbn.health.Limits"):
            function(tree, limits={})
    for pairs in ("abc", 3, [3], {"bn": 3}):
        with pytest.raises(TypeError, match="pairs "):
            health.metrics(tree, pairs=pairs)
    with pytest.raises(ValueError, match=r"previous holds none of the layers \['bn'\]"):
        health.metrics(tree, previous={"a": ONE})
    with pytest.raises(ValueError, match=r"mean of bn has shape \(2,\) in previous, expected \(3"):
        health.metrics(tree, previous={"bn": jbn.init(2)})
    for momentum in (1, None, jnp.float32(1)):
        with pytest.raises(ValueError, match=r"momentum is .* with previous, expected less than 1"):
            health.metrics(tree, previous=tree, momentum=momentum)
