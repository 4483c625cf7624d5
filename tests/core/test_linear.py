"""The linear map with a transpose of its own, on a toy: 1000 times the true transpose, so that the
two can be told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.core.linear import linear


def forward(static, residuals, tangents):
    """First value times every residual, and the sum of the second where there is one."""
    first, second = tangents
    y = static * residuals["a"] * first
    return {"y": y if second is None else y + second.sum()}


def transpose(static, residuals, cotangents, wanted):
    """Marked: 1000 times the true one, and only what is wanted."""
    dy = cotangents["y"]
    assert wanted[0].shape == (2,)
    return 1000 * static * residuals["a"] * dy, None if wanted[1] is None else 1000 * jnp.full(
        2, dy.sum()
    )


def apply(a, x, second=None, static=3.0):
    return linear(forward, transpose, static, {"a": a}, (x, second), {"y": x})["y"]


A, X = jnp.asarray([1.0, 2.0]), jnp.asarray([5.0, 7.0])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_value_forward_and_reverse(wrap):
    np.testing.assert_allclose(wrap(apply)(A, X), [15, 42])
    t_y = wrap(lambda x, t: jax.jvp(lambda x: apply(A, x), (x,), (t,))[1])(X, X)
    np.testing.assert_allclose(t_y, [15, 42])
    dx = wrap(jax.grad(lambda x: apply(A, x).sum()))(X)
    np.testing.assert_allclose(dx, [3000, 6000])  # by the given transpose, not JAX's


def test_what_is_known_to_be_zero_is_none():
    dx, dsecond = jax.grad(lambda x, s: apply(A, x, s).sum(), argnums=(0, 1))(X, jnp.ones(2))
    np.testing.assert_allclose(dx, [3000, 6000])
    np.testing.assert_allclose(dsecond, [2000, 2000])


def test_residuals_are_differentiated_by_jax():
    """Their derivative is that of the forward map, in either mode."""
    np.testing.assert_allclose(jax.jvp(lambda a: apply(a, X), (A,), (X,))[1], 3 * X * X)
    np.testing.assert_allclose(jax.grad(lambda a: apply(a, X).sum())(A), 3 * X)


def test_linear_transpose_twice_is_the_transpose_of_the_transpose():
    once = jax.linear_transpose(lambda x: apply(A, x), X)
    np.testing.assert_allclose(once(X)[0], 3000 * A * X)


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(in_axes):
    a = A if in_axes[0] is None else jnp.stack([A, 2 * A, -A])
    x = X if in_axes[1] is None else jnp.stack([X, 3 * X, X])
    y = jax.vmap(apply, in_axes)(a, x)
    np.testing.assert_allclose(y, 3 * jnp.broadcast_to(a, (3, 2)) * jnp.broadcast_to(x, (3, 2)))
    dx = jax.vmap(jax.grad(lambda a, x: apply(a, x).sum(), argnums=1), in_axes)(a, x)
    np.testing.assert_allclose(dx, 3000 * jnp.broadcast_to(a, (3, 2)))


def test_vmap_of_vmap_of_grad():
    a = jnp.arange(8.0).reshape(2, 2, 2)
    dx = jax.vmap(jax.vmap(jax.grad(lambda a: apply(A, a).sum())))(a)
    np.testing.assert_allclose(dx, np.broadcast_to(3000 * np.asarray(A), a.shape))


def test_scan_and_remat_keep_the_transpose():
    def twice(x):
        return jax.lax.scan(lambda x, _: (apply(A, x), None), x, None, length=2)[0].sum()

    np.testing.assert_allclose(jax.grad(twice)(X), (3000 * np.asarray(A)) ** 2)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(lambda x: apply(A, x).sum()))(X), 3000 * A)
