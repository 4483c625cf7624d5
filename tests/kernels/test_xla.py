"""kernels/xla.py: the specification, and its accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jbn.kernels import xla
from jbn.kernels.seam import Affine, StatsGradient

pytestmark = pytest.mark.optimized

SHAPE, AXIS = (6, 3, 4, 5), (1, 3)


def draw(*shape, seed=0, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, shape), jnp.float32)


def affine_of(x, axis, eps, weights=None):
    """(the map of a batch norm, its offset, scale, bias), from statistics in float64."""
    m = oracle.moments(x, axis, weights)
    rstd = 1 / np.sqrt(oracle.variance(m) + eps)
    scale, bias = draw(*m.mean.shape, seed=1), draw(*m.mean.shape, seed=2)
    shift = jnp.asarray(m.mean, jnp.float32)
    offset = jnp.asarray(m.mean - np.asarray(shift, np.float64), jnp.float32)
    gain = jnp.asarray(scale * rstd, jnp.float32)
    return Affine(shift, gain, bias - offset * gain), offset, scale, bias


@pytest.mark.parametrize("weights", [None, "mask", "float"])
@pytest.mark.parametrize(
    "mean", [0.0, 9.0, 11.0, 1e4], ids=["0", "9 std: one pass", "11 std: recomputed", "1e4 std"]
)
def test_fwd_stats(mean, weights):
    x = draw(*SHAPE, mean=mean)
    weights = (
        None
        if weights is None
        else draw(6, 1, 1, 1, seed=3) > 0
        if weights == "mask"
        else jnp.abs(draw(*SHAPE, seed=3))
    )
    count, shift, offset, m2 = jax.jit(xla.fwd_stats, static_argnames="axis")(
        x, jnp.zeros((3, 5)), weights, axis=AXIS
    )
    expected = oracle.moments(x, AXIS, weights)
    np.testing.assert_allclose(count, expected.count, rtol=1e-6)
    # Of float32's 6e-8, the one-pass form loses (mean / std)^2 = 100 at most.
    np.testing.assert_allclose(m2, expected.m2, rtol=3e-5)
    np.testing.assert_allclose(
        np.float64(shift) + np.float64(offset),
        expected.mean,
        rtol=2e-7,
        atol=1e-5 if mean else 2e-7,
    )


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_fwd_apply(mean):
    x, residual = draw(*SHAPE, mean=mean), draw(*SHAPE, seed=4)
    affine, _, scale, bias = affine_of(x, AXIS, 1e-3)
    y = xla.fwd_apply(x, affine, residual, axis=AXIS, activation=jax.nn.silu, dtype=jnp.float32)
    expected, _ = oracle.forward(
        x, scale, bias, axis=AXIS, eps=1e-3, residual=residual, activation="silu"
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=5e-6)
    y = xla.fwd_apply(x, affine, residual, axis=AXIS, activation=None, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("weights", [None, "mask"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_bwd_stats_and_bwd_apply(activation, mean, weights):
    x, dy = draw(*SHAPE, mean=mean), draw(*SHAPE, seed=5)
    weights = None if weights is None else draw(6, 1, 1, 1, seed=3) > 0
    affine, offset, scale, bias = affine_of(x, AXIS, 1e-3, weights)
    function = None if activation is None else getattr(jax.nn, activation)
    common = {"saved": None, "weights": weights, "axis": AXIS, "activation": function}
    sum_dz, sum_dz_x = xla.bwd_stats(x, dy, affine, **common)
    sum_dz_xc = sum_dz_x - offset * sum_dz
    m = oracle.moments(x, AXIS, weights)
    rstd = 1 / np.sqrt(oracle.variance(m) + 1e-3)
    expected = oracle.backward(
        x, dy, scale, bias, axis=AXIS, eps=1e-3, weights=weights, activation=activation
    )
    np.testing.assert_allclose(sum_dz, expected.bias, atol=1e-5)
    np.testing.assert_allclose(sum_dz_xc * rstd, expected.scale, atol=2e-5)
    # Twice the cotangent of var, and that of mean, over the count: a line about shift.
    slope = -scale * rstd**3 * sum_dz_xc / m.count
    intercept = -scale * rstd * sum_dz / m.count - slope * offset
    stats_gradient = StatsGradient(*(jnp.asarray(v, jnp.float32) for v in (slope, intercept)))
    dx, dresidual = xla.bwd_apply(
        x, dy, affine, stats_gradient=stats_gradient, residual_dtype=jnp.dtype("float32"), **common
    )
    np.testing.assert_allclose(dx, expected.x, atol=1e-5)
    np.testing.assert_allclose(dresidual, expected.residual, atol=1e-5)
    alone, none = xla.bwd_apply(x, dy, affine, stats_gradient=None, residual_dtype=None, **common)
    assert none is None
    wide = lambda v: np.expand_dims(v, (0, 2))
    np.testing.assert_allclose(alone, wide(scale * rstd) * expected.residual, atol=1e-5)


@pytest.mark.parametrize("with_residual", [False, True])
def test_relu_mask_is_linear_about_a_zero_cotangent(with_residual):
    """The mask reads dy twice and compares it with zero; its tangent must not depend on that."""
    x, y, t = draw(*SHAPE), jax.nn.relu(draw(*SHAPE, seed=4)), draw(*SHAPE, seed=5)
    affine, _, _, _ = affine_of(x, AXIS, 1e-3)
    known = {
        "saved": y if with_residual else None,
        "weights": None,
        "axis": AXIS,
        "activation": jax.nn.relu,
    }
    dx = lambda dy: xla.bwd_apply(x, dy, affine, stats_gradient=None, residual_dtype=None, **known)[
        0
    ]
    _, along = jax.jvp(dx, (jnp.zeros_like(t),), (t,))
    np.testing.assert_array_equal(along, dx(t))
    assert 0.3 < (along != 0).mean() < 0.7
