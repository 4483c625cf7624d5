"""Explicit names: what cannot run says why, before or at lowering; what can, does so under nested
transformations too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jbn
from jbn.core import op, passes
from jbn.core.config import Config
from jbn.kernels import mosaic_gpu

PARAMS, STATE = jbn.init(8)
X = jax.random.normal(jax.random.key(0), (16, 8))


def layer(x, implementation):
    return jbn.batch_norm_train(x, PARAMS, STATE, implementation=implementation)[0]


@pytest.mark.parametrize(
    ("implementation", "platform"),
    [("triton", "cuda"), ("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")],
)
def test_a_kernel_elsewhere_names_its_platform_and_what_runs_anywhere(implementation, platform):
    with pytest.raises(
        NotImplementedError,
        match=f"{implementation}.*runs on {platform}, not on cpu.*{implementation}/interpret",
    ):
        layer(X, implementation)


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        *[
            (f"NVIDIA {kind}", True)
            for kind in ("A100-SXM4-80GB", "A10G", "L4", "L40S", "RTX A6000", "GeForce RTX 4090")
        ],
        *[("Tesla V100-SXM2-16GB", True), ("Tesla T4", True)],
        *[
            (f"NVIDIA {kind}", False)
            for kind in ("H100 80GB HBM3", "H200", "GH200 480GB", "B200", "RTX PRO 6000 Blackwell")
        ],
    ],
)
def test_devices_older_than_hopper_are_known_by_name(kind, old):
    reason = mosaic_gpu.unsupported_device(kind)
    assert (reason is not None) == old
    assert not old or f"compute capability 9.0 (Hopper) or newer, which {kind} has not" in reason


@pytest.mark.parametrize(
    "implementation", ["triton/interpret", "mosaic_gpu/interpret", "mosaic_tpu/interpret"]
)
def test_shapes_a_kernel_does_not_take_say_why(implementation):
    with pytest.raises(
        NotImplementedError, match=f"'{implementation}' takes channels last, not axis"
    ):
        jbn.batch_norm_train(X.T, PARAMS, STATE, axis=0, implementation=implementation)


def test_one_device_or_more():
    """The kernel of a whole pass only where all rows are at hand; elsewhere, and under
    transformations, the two apart."""
    in_one, apart = lambda x: x + 1, lambda x: x + 2
    layer = lambda x: op.in_one(apart, x, kernel=in_one, implementation="triton/interpret")
    split = jax.device_put(
        X, NamedSharding(jax.make_mesh((2,), ("rows",), (AxisType.Auto,)), PartitionSpec("rows"))
    )
    np.testing.assert_array_equal(jax.jit(layer)(X), X + 1)
    np.testing.assert_array_equal(jax.jit(layer)(split), X + 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(layer))(X), X + 2)
    np.testing.assert_array_equal(jax.jvp(layer, (X,), (X,))[1], X)
    np.testing.assert_array_equal(op.in_one(apart, X, kernel=lambda x: None), X + 2)


@pytest.mark.parametrize(
    "transform", ["jit", "vmap", pytest.param("hessian", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_through_the_public_call(transform, with_residual):
    """For a TPU where x fits: forward and backward in one kernel each, interpreted here, against
    XLA."""
    device = AbstractDevice("TPU v5e", 1, "tpu")

    def loss(x, params, implementation):
        residual = jnp.sin(x) if with_residual else None
        y, state = jbn.batch_norm_train(
            x,
            params,
            STATE,
            residual=residual,
            activation=jax.nn.silu,
            implementation=implementation,
        )
        return jnp.sum(y**2 * jnp.cos(X)) + jnp.sum(state.mean + state.var**2)

    derive = jax.hessian if transform == "hessian" else jax.value_and_grad
    run = lambda i: derive(lambda x, params: loss(x, params, i), (0, 1))
    x = jnp.stack((X, X + 1)) if transform == "vmap" else X
    mapped = lambda i: jax.jit(jax.vmap(run(i), (0, None)) if transform == "vmap" else run(i))
    want = mapped("xla")(x, PARAMS)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    ):
        lowered = mapped("mosaic_tpu/interpret").lower(x, PARAMS)
    text = lowered.as_text(debug_info=True)
    assert ("fwd_fused" in text) == (transform != "vmap")
    assert ("bwd_fused" in text) == (
        transform == "jit"
    )  # forward mode over reverse maps what reverse mode runs
    for a, b in zip(
        jax.tree.leaves(lowered.compile()(x, PARAMS)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("implementation", ["triton/interpret", "mosaic_tpu/interpret"])
def test_second_derivatives_through_a_scan(implementation):
    def loss(x, implementation):
        body = lambda carry, _: (jnp.sin(layer(carry, implementation)), None)
        return jnp.sum(jax.lax.scan(body, x, None, length=2)[0] ** 3)

    found, want = (
        jax.jvp(jax.grad(lambda x, i=i: loss(x, i)), (X,), (jnp.cos(X),))
        for i in (implementation, "xla")
    )
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_one_kernel_only_where_nothing_stands_between_the_steps():
    """A collective or weights come between the statistics and y."""
    device = AbstractDevice("TPU v5e", 1, "tpu")
    config = Config((1,), None, X.dtype, "mosaic_tpu/interpret")
    weights = jnp.ones((16, 1))
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    ):
        chosen = lambda config, weights=None: passes._one_kernel("fwd_fused", config, X, weights)
        assert chosen(config) is not None
        assert chosen(config._replace(axis_name="batch")) is None
        assert chosen(config, weights) is None
        assert chosen(config._replace(implementation=None)) is None


def test_gradients_of_all_operands_through_the_fused_kernels():
    """With that of x, without which the backward pass takes no kernel of its own."""
    device = AbstractDevice("TPU v5e", 1, "tpu")
    operands = X, *PARAMS, jnp.cos(X), jnp.float32(0.1)

    def loss(x, scale, bias, residual, eps, implementation):
        known = {"eps": eps, "residual": residual, "implementation": implementation}
        y, _ = jbn.batch_norm_train(x, jbn.Params(scale, bias), STATE, **known)
        return jnp.sum(y**2 * jnp.cos(3 * X))

    gradient = jax.grad(loss, argnums=range(5))
    derive = lambda implementation: jax.jit(lambda *operands: gradient(*operands, implementation))
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    ):
        lowered = derive("mosaic_tpu/interpret").lower(*operands)
    text = lowered.as_text(debug_info=True)
    assert "fwd_fused" in text
    assert "bwd_fused" in text
    want = derive("xla")(*operands)
    for found, right in zip(lowered.compile()(*operands), want, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * float(abs(right).max()))
