"""Variables of sbx's CrossQ, and its batch renorm written down in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jbn.linen
from jbn import convert

pytestmark = pytest.mark.third_party
EPS = 1e-6  # so small that it does not matter where sbx leaves it out (see `from_sbx`)


def sbx_layer(x, mean, var, steps, r_max=3, d_max=5, warm_up_steps=100_000, momentum=0.99):
    """(y, mean, var, steps) as sbx computes them; scale 1 and bias 0."""
    x, mean, var = (np.asarray(v, np.float64) for v in (x, mean, var))
    batch_mean, batch_var = x.mean(0), x.var(0)
    r = np.clip(np.sqrt(batch_var + EPS) / np.sqrt(var + EPS), 1 / r_max, r_max)
    d = np.clip((batch_mean - mean) / np.sqrt(var + EPS), -d_max, d_max)
    used = batch_mean, batch_var
    if steps >= warm_up_steps:
        used = batch_mean - d * np.sqrt(batch_var) / r, batch_var / r**2
    y = (x - used[0]) / np.sqrt(used[1] + EPS)
    averaged = [
        momentum * a + (1 - momentum) * b for a, b in ((mean, batch_mean), (var, batch_var))
    ]
    return y, *averaged, steps + 1


def data(seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(32, 5)) * np.linspace(0.5, 8, 5) + np.linspace(-9, 9, 5)).astype("f")


def tree(steps, **limits):
    """What sbx's model of one layer holds; its counters are whatever a checkpoint makes of ints."""
    rng = np.random.default_rng(1)
    stats = {
        "mean": rng.normal(size=5).astype("f"),
        "var": rng.uniform(0.5, 4, 5).astype("f"),
        "r_max": 3,
        "d_max": np.int64(5),
        "steps": np.asarray(steps),
        **limits,
    }
    params = {"scale": np.ones(5, "f"), "bias": np.zeros(5, "f")}
    return {
        "params": {"BatchRenorm_0": params, "Dense_0": {"kernel": np.ones((5, 1), "f")}},
        "batch_stats": {"BatchRenorm_0": stats},
    }


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jbn.linen.BatchRenorm(False, epsilon=EPS, warmup_steps=100_000)(x)
        nn.Dense(1, use_bias=False)(y)
        return y


@pytest.mark.parametrize("steps", [0, 99_999, 100_000, 250_000])
def test_training_goes_on_as_in_sbx(steps):
    given = tree(steps)
    y, new = Model().apply(convert.from_sbx(given), data(), mutable=["batch_stats"])
    layer = given["batch_stats"]["BatchRenorm_0"]
    expected, mean, var, count = sbx_layer(data(), layer["mean"], layer["var"], steps)
    new = new["batch_stats"]["BatchRenorm_0"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], var, rtol=1e-5)
    assert new["steps"] == count
    assert new["steps"].dtype == jnp.int32


def test_there_and_back():
    given = tree(7)
    ours = convert.from_sbx(given)
    assert set(ours["batch_stats"]["BatchRenorm_0"]) == {"mean", "var", "steps"}
    jax.tree.map(np.testing.assert_array_equal, convert.to_sbx(ours), given)
    jax.tree.map(np.testing.assert_array_equal, convert.from_sbx(convert.to_sbx(ours)), ours)


def test_an_ensemble_of_critics():
    given = tree(np.array([4, 4]), r_max=np.array([3, 3]), d_max=np.array([5, 5]))
    ours = convert.from_sbx(given)
    np.testing.assert_array_equal(ours["batch_stats"]["BatchRenorm_0"]["steps"], [4, 4])
    back = convert.to_sbx(ours)["batch_stats"]["BatchRenorm_0"]
    np.testing.assert_array_equal(back["r_max"], [3, 3])


def test_other_limits_are_named():
    with pytest.raises(ValueError, match=r"BatchRenorm_0 has d_max 2, expected 5: give from_sbx"):
        convert.from_sbx(tree(0, d_max=2))
    convert.from_sbx(tree(0, d_max=2), d_max=2)


def test_variables_without_the_layer_are_errors():
    without_steps = jbn.linen.BatchRenorm(use_running_average=False)
    variables = without_steps.init(jax.random.key(0), data())
    with pytest.raises(ValueError, match=r"no layer of \['mean', 'steps', 'var'\].*warmup_steps"):
        convert.to_sbx(variables)
    with pytest.raises(ValueError, match=r"no layer of \['d_max', .*with sbx's BatchRenorm"):
        convert.from_sbx(variables)
    with pytest.raises(ValueError, match=r"hold \['params'\] and no layer of"):
        convert.from_sbx({"params": tree(0)["params"]})
