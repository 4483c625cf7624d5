"""Moments: of an array, merged, and summed over devices; always weighted by count."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
from jbn.core import stats

pytestmark = pytest.mark.optimized


def draw(*shape, seed=0, mean=0.0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, shape), dtype)


def assert_moments(actual, expected, rtol=3e-5):
    """Of float32's 6e-8, the one-pass form of m2 loses (mean / std)^2 <= 100 a few times."""
    np.testing.assert_allclose(actual.count, expected.count, rtol=1e-6)
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(actual.m2, expected.m2, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("weights", [None, "mask", "float"])
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), -1), ((4, 3, 2, 5), (1, 3)), ((3, 6), 0)])
def test_moments(shape, axis, weights):
    x = draw(*shape, mean=3)
    if weights is not None:
        weights = draw(*shape, seed=1) > 0 if weights == "mask" else jnp.abs(draw(*shape, seed=1))
    m = jbn.moments(x, axis=axis, weights=weights)
    assert_moments(m, oracle.moments(x, np.atleast_1d(axis), weights))
    assert {a.dtype for a in m} == {jnp.dtype("float32")}


def test_moments_of_bf16_are_float32():
    x = draw(64, 3, mean=5, dtype="bfloat16")
    m = jbn.moments(x)
    assert m.mean.dtype == jnp.float32
    assert_moments(m, oracle.moments(x))


@pytest.mark.x64
def test_moments_of_float64():
    x = draw(64, 3, mean=1e8, dtype="float64")
    m = jbn.moments(x)
    assert m.m2.dtype == jnp.float64
    np.testing.assert_allclose(m.m2, oracle.moments(x).m2, rtol=1e-7)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (1, 7), (4, 4)])
def test_merge_equals_the_whole(sizes):
    x = draw(8, 3, mean=1e3)
    a, b = jbn.moments(x[: sizes[0]]), jbn.moments(x[sizes[0] :])
    assert_moments(
        jbn.merge_moments(a, b), oracle.moments(x), rtol=1e-4
    )  # of a mean of 1e3, float32 keeps 6e-5


@pytest.mark.parametrize("few_first", [False, True])
def test_the_merged_mean_starts_from_the_larger_set(few_first):
    """From the mean of the smaller set, 1e9, the way to 101 would be rounded to multiples of 64."""
    few = jbn.Moments(jnp.ones(1), jnp.full(1, 1e9), jnp.zeros(1))
    many = jbn.Moments(jnp.full(1, 2.0**30), jnp.full(1, 101.0), jnp.zeros(1))
    merged = jbn.merge_moments(*((few, many) if few_first else (many, few)))
    np.testing.assert_allclose(merged.mean, (1e9 + 101 * 2.0**30) / (1 + 2.0**30), rtol=1e-6)


def test_merging_large_counts_does_not_overflow():
    a, b = (jbn.Moments(jnp.full(1, 1e30), jnp.full(1, mean), jnp.ones(1)) for mean in (0.0, 2.0))
    np.testing.assert_allclose(jbn.merge_moments(a, b).m2, 2e30, rtol=1e-6)


def test_merging_nothing_changes_nothing():
    x = draw(8, 3)
    m, nothing = jbn.moments(x), jbn.moments(x, weights=jnp.zeros((8, 1)))
    for merged in (jbn.merge_moments(m, nothing), jbn.merge_moments(nothing, m)):
        jax.tree.map(np.testing.assert_array_equal, merged, m)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), jbn.merge_moments(nothing, nothing))


@pytest.mark.parametrize("unbiased", [False, True])
def test_variance(unbiased):
    m = jbn.Moments(
        jnp.asarray([0.0, 0.5, 1.0, 4.0]), jnp.zeros(4), jnp.asarray([0.0, 1.0, 3.0, 6.0])
    )
    np.testing.assert_allclose(
        stats.variance(m, unbiased=unbiased), oracle.variance(oracle.Moments(*m), unbiased)
    )
    np.testing.assert_allclose(stats.variance(m, unbiased=unbiased)[3], 2.0 if unbiased else 1.5)


def over_devices(how, f, devices):
    """f over the leading axis, one slice each; its result must be equal everywhere."""
    if how == "vmap":
        return jax.vmap(f, axis_name="i")
    if how == "pmap":
        return jax.pmap(f, axis_name="i")
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            lambda *a: jax.tree.map(lambda v: v[None], f(*(v[0] for v in a))),
            mesh=mesh,
            in_specs=P("i"),
            out_specs=P("i"),
        )
    )


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_psum_moments_of_unequal_shares(how, mean):
    """One of the four counts nothing at all; the rest differ."""
    x = draw(4, 32, 3, mean=mean)
    weights = jnp.asarray(
        np.random.default_rng(1).uniform(size=(4, 32, 1))
        < np.array([0.2, 0.9, 0.0, 0.5])[:, None, None]
    )
    summed = over_devices(how, lambda x, w: jbn.psum_moments(jbn.moments(x, weights=w), "i"), 4)(
        x, weights
    )
    expected = oracle.moments(x, weights=weights)
    for k in range(4):
        # Each share's mean is one float32 here: at 1e4 it is off by 5e-4, of which m2 sees the
        # differences.
        assert_moments(
            jax.tree.map(operator.itemgetter(k), summed), expected, rtol=3e-5 if mean == 0 else 1e-3
        )


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
def test_synchronized_training_equals_the_whole_batch(how):
    x, (params, state) = draw(4, 6, 3, mean=2), jbn.init(3)
    weights = jnp.asarray(
        np.random.default_rng(1).uniform(size=(4, 6, 1))
        < np.array([0.3, 0.9, 0.0, 0.5])[:, None, None]
    )
    train = lambda x, w: jbn.batch_norm_train(
        x, params, state, weights=w, axis_name="i", momentum=0.5
    )
    y, new = over_devices(how, train, 4)(x, weights)
    expected, m = oracle.forward(x, weights=weights)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for k in range(4):
        np.testing.assert_allclose(
            new.var[k], oracle.running(oracle.State(*state), m, 0.5).var, rtol=1e-5
        )


def test_groups_of_devices_are_normalized_apart():
    x, (params, state) = draw(4, 6, 3), jbn.init(3)
    groups = [[0, 2], [1, 3]]
    y, new = jax.pmap(
        lambda x: jbn.batch_norm_train(
            x, params, state, axis_name="i", axis_index_groups=groups, momentum=0.0
        ),
        axis_name="i",
    )(x)
    for group in groups:
        part = np.asarray(x)[group]
        expected, m = oracle.forward(part)
        np.testing.assert_allclose(np.asarray(y)[group], expected, atol=1e-5)
        for k in group:
            np.testing.assert_allclose(new.var[k], oracle.variance(m), rtol=1e-5)


def test_a_pool_of_parts_far_from_zero():
    """The rest of the mean that one float32 loses at 1e6 is not counted as variance."""
    x = draw(8, 64, 3, mean=1e6)
    each = jax.vmap(lambda part: jbn.moments(part))(x)
    zero = jnp.zeros_like(each.mean)
    pooled = stats.pool(stats.Stats(each.count, each.mean, zero, each.m2))
    mean = np.asarray(pooled.shift, np.float64) + np.asarray(pooled.offset, np.float64)
    between = 64 * np.square(np.asarray(each.mean, np.float64) - mean).sum(0)
    want = np.asarray(each.m2, np.float64).sum(0) + between
    np.testing.assert_allclose(pooled.m2, want, rtol=1e-5)
