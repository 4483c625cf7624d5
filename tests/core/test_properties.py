"""What holds for any data, tried on data that hypothesis draws."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jbn

pytestmark = pytest.mark.optimized

ROWS, CHANNELS = 8, 3
PARAMS, STATE = jbn.init(CHANNELS)


# Seeds of arrays of one shape: one compilation, and shrinking still finds the smallest scale and
# cut.
seeds = st.integers(0, 2**16)
magnitudes = st.sampled_from([1e-3, 1.0, 30.0, 1e4])


def draw(seed, *, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, (ROWS, CHANNELS)), jnp.float32)


def share(x, mask):
    """Moments of the rows where mask is set: shapes stay the same whatever is drawn."""
    return jbn.moments(x, weights=jnp.asarray(mask)[:, None])


def assert_moments(actual, expected, scale):
    """Relative to the size of the numbers that were added."""
    np.testing.assert_allclose(actual.count, expected.count)
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(actual.m2, expected.m2, rtol=1e-4, atol=1e-5 * scale**2)


owners = st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS)


@given(seeds, magnitudes, owners)
def test_merging_shares_gives_the_whole_in_any_order_and_grouping(seed, std, owner):
    x, owner = draw(seed, mean=std, std=std), np.array(owner)
    a, b, c = (share(x, owner == k) for k in range(3))
    merge, whole = jbn.merge_moments, oracle.moments(x)
    assert_moments(merge(merge(a, b), c), whole, std)
    assert_moments(merge(a, merge(b, c)), whole, std)
    assert_moments(merge(merge(c, a), b), whole, std)
    forward, backward = merge(a, b), merge(b, a)
    np.testing.assert_allclose(forward.mean, backward.mean, rtol=1e-6, atol=1e-6 * std)
    np.testing.assert_array_equal(forward.m2, backward.m2)


def train(x, eps=1e-12, **options):
    """y with eps out of the way."""
    return jbn.batch_norm_train(x, PARAMS, STATE, eps=eps, **options)


@given(seeds, st.sampled_from([0.125, 0.5, 4.0, 64.0]), st.integers(-64, 64))
def test_shift_and_scale_do_not_matter(seed, a, b):
    """BN(a x + b) = BN(x), a > 0; a x + b is exact for these a, b and for x in steps of 1/64."""
    x = jnp.round(draw(seed) * 64) / 64
    np.testing.assert_allclose(train(a * x + b)[0], train(x)[0], rtol=1e-4, atol=2e-5)


@given(seeds)
def test_a_negative_scale_turns_the_sign(seed):
    x = draw(seed)
    np.testing.assert_allclose(train(-x)[0], -np.asarray(train(x)[0]), rtol=1e-5, atol=1e-6)


@given(seeds, st.permutations(range(ROWS)))
def test_rows_may_be_permuted(seed, order):
    x, order = draw(seed, mean=3), jnp.asarray(order)
    (y, new), (permuted, new_permuted) = train(x), train(x[order])
    np.testing.assert_allclose(permuted, y[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new_permuted.var, new.var, rtol=1e-5)


@given(
    seeds, st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(lambda mask: sum(mask) > 1)
)
def test_weights_of_0_and_1_remove_rows(seed, mask):
    """As the oracle sees the rows that are left; what stands in the others does not matter."""
    x, keep = draw(seed, mean=2), np.array(mask)
    broken = jnp.where(jnp.asarray(keep)[:, None], x, jnp.float32(np.nan))
    expected, m = oracle.forward(np.asarray(x)[keep])
    for weights in (jnp.asarray(keep)[:, None], jnp.asarray(keep, jnp.float32)[:, None]):
        y, new = train(broken, eps=1e-5, weights=weights, momentum=0.0)
        np.testing.assert_allclose(y[keep], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(new.var, oracle.variance(m), rtol=1e-4, atol=1e-6)


@given(seeds, st.integers(1, 3))
def test_integer_weights_repeat_rows(seed, times):
    x = draw(seed)
    weights = jnp.ones((ROWS, 1)).at[1].set(times)
    y, _ = train(x, eps=1e-5, weights=weights)
    repeated = np.concatenate([np.asarray(x), *[np.asarray(x[1:2])] * (times - 1)])
    np.testing.assert_allclose(y, oracle.forward(repeated)[0][:ROWS], rtol=1e-4, atol=1e-5)


@given(seeds, magnitudes, magnitudes)
def test_y_has_mean_0_and_variance_1(seed, mean, std):
    """However mean and std compare, as far as float32 keeps x itself."""
    x = draw(seed, mean=mean, std=std)
    expected, _ = oracle.forward(x, eps=1e-12)
    y, _ = train(x)
    spread = np.asarray(x).astype(np.float64).std(0).min()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 + 1e-12 / spread**2)
