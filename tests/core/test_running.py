"""update_state: how the moments of a batch enter the running state."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn


def state_of():
    mean, var = np.random.default_rng(0).uniform(0.5, 2, (2, 4))
    return jbn.State(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(3))


def moments_of():
    """Four channels: many values, exactly one, nothing, fractional weights."""
    m = np.array([[8.0, 1.0, 0.0, 0.5], [0.3, -1.0, 0.0, 2.0], [5.0, 0.0, 0.0, 0.1]])
    return jbn.Moments(*(jnp.asarray(row, jnp.float32) for row in m))


@pytest.mark.parametrize(
    ("momentum", "unbiased"), list(itertools.product([0.0, 0.9, 1.0, None], [False, True]))
)
def test_update_state(momentum, unbiased):
    state, m = state_of(), moments_of()
    new = jbn.update_state(state, m, momentum=momentum, unbiased=unbiased)
    expected = oracle.running(
        oracle.State(*state), oracle.Moments(*map(np.asarray, m)), momentum, unbiased
    )
    np.testing.assert_allclose(new.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(new.var, expected.var, rtol=1e-6)
    assert new.count == 4
    assert new.mean[2] == state.mean[2]


def test_the_cumulative_average_starts_from_nothing():
    """The first batch replaces the initial mean 0 and variance 1 altogether."""
    _, state = jbn.init(4)
    m = moments_of()
    new = jbn.update_state(state, m, momentum=None)
    np.testing.assert_allclose(new.mean[:2], m.mean[:2])
    np.testing.assert_allclose(new.var[0], m.m2[0] / 8)


@pytest.mark.parametrize("which", ["mean", "m2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("skip", [False, True])
def test_skip_nonfinite(which, bad, skip):
    """The mean of values near 1e30 is finite, their m2 is not."""
    state, m = state_of(), moments_of()
    m = m._replace(**{which: getattr(m, which).at[0].set(bad)})
    new = jbn.update_state(state, m, momentum=0.5, skip_nonfinite=skip)
    if skip:
        jax.tree.map(np.testing.assert_array_equal, new, state)
    else:
        assert not np.isfinite((new.mean, new.var)[which == "m2"][0])
        assert new.count == 4


def test_nothing_counted_is_no_batch():
    state = state_of()
    nothing = jbn.Moments(jnp.zeros(4), jnp.zeros(4), jnp.zeros(4))
    for momentum in (0.5, None):
        jax.tree.map(
            np.testing.assert_array_equal,
            jbn.update_state(state, nothing, momentum=momentum),
            state,
        )


def test_unbiased_never_doubles_the_variance_and_more():
    """Weights that sum to a little more than 1: n / (n - 1) would be 1e7."""
    count = jnp.asarray([1.0000001, 1.5, 1.999, 2.0], jnp.float32)
    m = jbn.Moments(count, jnp.zeros(4), jnp.full(4, 3.0))
    new = jbn.update_state(state_of(), m, momentum=0.0, unbiased=True)
    np.testing.assert_allclose(new.var[:3], 3 / count[:3], rtol=1e-6)
    np.testing.assert_allclose(new.var[3], 3.0, rtol=1e-6)


def test_the_momentum_of_a_long_training():
    """In float32, 1 - 0.9999 would be off by 3e-4 of itself."""
    state = jbn.State(jnp.zeros(1), jnp.zeros(1), jnp.int32(0))
    m = jbn.Moments(jnp.ones(1) * 4, jnp.ones(1), jnp.ones(1) * 4)
    np.testing.assert_allclose(jbn.update_state(state, m, momentum=0.9999).mean, 1e-4, rtol=1e-6)


def test_traced_momentum():
    state, m = state_of(), moments_of()
    new = jax.jit(lambda momentum: jbn.update_state(state, m, momentum=momentum))(0.25)
    np.testing.assert_allclose(new.mean, jbn.update_state(state, m, momentum=0.25).mean, rtol=1e-6)
