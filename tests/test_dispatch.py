"""Explicit names: what cannot run says why, before or at lowering; what can, does so under nested transformations too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

PARAMS, STATE = jbn.init(8)
X = jax.random.normal(jax.random.key(0), (16, 8))


def layer(x, implementation):
    return jbn.batch_norm_train(x, PARAMS, STATE, implementation=implementation)[0]


@pytest.mark.parametrize(("implementation", "platform"), [("triton", "cuda"), ("mosaic_tpu", "tpu")])
def test_a_kernel_elsewhere_names_its_platform_and_what_runs_anywhere(implementation, platform):
    with pytest.raises(
        NotImplementedError, match=f"{implementation}.*runs on {platform}, not on cpu.*{implementation}/interpret"
    ):
        layer(X, implementation)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_gpu/interpret"])
def test_what_is_not_written_says_so(implementation):
    with pytest.raises(NotImplementedError, match=f"'{implementation}' is not written yet"):
        layer(X, implementation)


@pytest.mark.parametrize("implementation", ["triton/interpret", "mosaic_tpu/interpret"])
def test_shapes_a_kernel_does_not_take_say_why(implementation):
    with pytest.raises(NotImplementedError, match=f"'{implementation}' takes channels last, not axis"):
        jbn.batch_norm_train(X.T, PARAMS, STATE, axis=0, implementation=implementation)


@pytest.mark.parametrize("implementation", ["triton/interpret", "mosaic_tpu/interpret"])
def test_second_derivatives_through_a_scan(implementation):
    def loss(x, implementation):
        body = lambda carry, _: (jnp.sin(layer(carry, implementation)), None)
        return jnp.sum(jax.lax.scan(body, x, None, length=2)[0] ** 3)

    found, want = (jax.jvp(jax.grad(lambda x, i=i: loss(x, i)), (X,), (jnp.cos(X),)) for i in (implementation, "xla"))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
