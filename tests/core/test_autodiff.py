"""The derivative rule: first order against the analytic oracle, both modes and orders numerically,
and what it keeps."""
# Options travel in dicts of mixed values.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.test_util import check_grads

import jbn


def draw(*shape, seed=0, mean=0.0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, shape), dtype)


def layer(features, dtype="float32"):
    params, state = jbn.init(features, param_dtype=dtype)
    return jbn.Params(
        draw(*params.scale.shape, seed=1, dtype=dtype),
        draw(*params.bias.shape, seed=2, dtype=dtype),
    ), state


# (x's shape, axis, dtype, weights, residual, activation, mean of x)
CASES = [
    ((16, 5), (1,), "float32", None, False, None, 0.0),
    ((16, 5), (1,), "float32", None, False, None, 1e4),
    ((6, 3, 5), (1,), "float32", "examples", False, "relu", 1.0),
    ((6, 3, 5), (0, 2), "float32", None, True, "relu", 1e4),
    ((6, 3, 5), (2,), "float32", "float", True, "silu", 0.0),
    ((6, 3, 5), (1,), "float32", "elements", True, "gelu", 0.0),
    ((8, 7), (1,), "float32", None, True, "leaky_relu", 0.0),
    ((8, 3, 5), (2,), "bfloat16", None, False, "relu", 0.0),
    ((8, 3, 5), (2,), "bfloat16", "examples", True, "leaky_relu", 0.0),
    ((8, 5), (1,), "float16", None, True, "gelu", 0.0),
]


def draw_weights(kind, shape):
    lead = (shape[0],) + (1,) * (len(shape) - 1)
    if kind == "float":
        return jnp.maximum(draw(*lead, seed=3) + 0.5, 0)
    return None if kind is None else draw(*(lead if kind == "examples" else shape), seed=3) > -0.7


def gradients(x, params, state, dy, dmean, dvar, *, momentum=0.0, **options):
    """Cotangents of x, params, residual and eps; the new state is the batch's own mean and biased
    variance."""

    def f(x, params, residual, eps):
        y, new = jbn.batch_norm_train(
            x, params, state, momentum=momentum, residual=residual, eps=eps, **options
        )
        return y, new.mean, new.var

    residual = options.pop("residual", None)
    _, vjp = jax.vjp(jax.jit(f), x, params, residual, jnp.float32(options.pop("eps")))
    return vjp((dy, dmean, dvar))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "weights", "residual", "activation", "mean"), CASES
)
def test_gradients_equal_the_oracle(shape, axis, dtype, weights, residual, activation, mean):
    """Into x, scale, bias, residual and eps, from y and from the returned state."""
    x, dy = draw(*shape, dtype=dtype, mean=mean), draw(*shape, seed=5, dtype=dtype)
    features = tuple(shape[a] for a in axis)
    params, state = layer(features)
    dmean, dvar = draw(*features, seed=6), draw(*features, seed=7)
    common = {"axis": axis, "weights": draw_weights(weights, shape), "eps": 0.1}
    common["residual"] = draw(*shape, seed=4, dtype=dtype) if residual else None
    function = None if activation is None else getattr(jax.nn, activation)
    dx, dparams, dresidual, deps = gradients(
        x, params, state, dy, dmean, dvar, activation=function, **common
    )
    expected = oracle.backward(
        x, dy, *params, activation=activation, dmean=dmean, dvar=dvar, **common
    )
    # Float32 sums of 16 terms of size 1; a bf16 or f16 result is rounded once, as is y, whose sign
    # is relu's mask.
    rounding = 1e-5 + 2 * float(jnp.finfo(dtype).eps) * (dtype != "float32")
    close = lambda a, b, tolerance: np.testing.assert_allclose(
        np.asarray(a).astype(np.float64),
        b,
        rtol=tolerance,
        atol=tolerance * max(1, np.abs(b).max()),
    )
    assert dx.dtype == x.dtype
    close(dx, expected.x, rounding)
    close(dparams.scale, expected.scale, 2e-5)
    close(dparams.bias, expected.bias, 2e-5)
    close(deps, expected.eps, 2e-5)
    if residual:
        close(dresidual, expected.residual, rounding)


@pytest.mark.optimized
def test_gradients_through_given_statistics():
    """normalize: into mean and var too."""
    x, dy, residual = draw(6, 5), draw(6, 5, seed=5), draw(6, 5, seed=4)
    params, _ = layer(5)
    mean, var = draw(5, seed=6), jnp.abs(draw(5, seed=7))
    f = lambda x, mean, var, params, r: jbn.normalize(
        x, mean, var, params, eps=0.1, residual=r, activation=jax.nn.relu
    )
    dx, dmean, dvar, dparams, dresidual = jax.vjp(f, x, mean, var, params, residual)[1](dy)
    expected = oracle.normalize_backward(
        x, dy, mean, var, *params, eps=0.1, residual=residual, activation="relu"
    )
    for actual, name in (
        (dx, "x"),
        (dmean, "mean"),
        (dvar, "var"),
        (*dparams[:1], "scale"),
        (dresidual, "residual"),
    ):
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hole", [np.nan, np.inf])
@pytest.mark.parametrize("weights", ["mask", "float"])
def test_gradients_beside_a_masked_hole(hole, weights):
    """Finite everywhere; 0 for the hole; the others as if the hole were not there."""
    x, dy = draw(6, 3).at[2].set(hole), draw(6, 3, seed=5)
    residual = draw(6, 3, seed=4)
    weights = jnp.arange(6)[:, None] != 2 if weights == "mask" else jnp.ones((6, 1)).at[2].set(0)
    params, state = layer(3)
    common = {"axis": (1,), "weights": weights, "eps": 0.1, "residual": residual}
    zeros = jnp.zeros(3)
    dx, dparams, dresidual, _ = gradients(
        x, params, state, dy, zeros, zeros, activation=jax.nn.silu, **common
    )
    expected = oracle.backward(x, dy, *params, activation="silu", **common)
    assert not np.asarray(dx[2]).any()
    np.testing.assert_allclose(dx, expected.x, atol=1e-5)
    np.testing.assert_allclose(dparams.scale, expected.scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dparams.bias, expected.bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dresidual, expected.residual, atol=1e-5)


@pytest.mark.x64
def test_both_modes_agree_beside_a_masked_hole():
    x, weights = draw(4, 2, dtype="float64").at[2, 0].set(jnp.nan), jnp.arange(4)[:, None] != 2
    residual, (params, state) = draw(4, 2, seed=4, dtype="float64"), layer(2, "float64")

    def f(params, residual):
        y, new = jbn.batch_norm_train(
            x,
            params,
            state,
            weights=weights,
            residual=residual,
            activation=jax.nn.silu,
            momentum=0.0,
        )
        return y, new.mean, new.var

    tangents = jax.tree.map(lambda a: draw(*a.shape, seed=8, dtype="float64"), (params, residual))
    out, t_out = jax.jvp(f, (params, residual), tangents)
    cotangents = jax.vjp(f, params, residual)[1](out)
    dot = lambda a, b: sum(
        jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    np.testing.assert_allclose(dot(t_out, out), dot(cotangents, tangents), rtol=1e-12)


def test_a_fully_masked_batch_has_finite_gradients():
    x, dy = draw(4, 3), draw(4, 3, seed=5)
    params, state = layer(3)
    common = {"axis": (1,), "weights": jnp.zeros((4, 1)), "eps": 0.1, "residual": None}
    dx, dparams, _, _ = gradients(x, params, state, dy, jnp.ones(3), jnp.ones(3), **common)
    expected = oracle.backward(x, dy, *params, **common)
    np.testing.assert_allclose(dx, expected.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dparams.scale, expected.scale, rtol=1e-5, atol=1e-6)


def test_weights_carry_no_gradient():
    x, (params, state) = draw(6, 3), layer(3)
    f = lambda w: jnp.square(jbn.batch_norm_train(x, params, state, weights=w)[0]).sum()
    np.testing.assert_array_equal(jax.grad(f)(jnp.ones((6, 1))), 0)


CHECKED = [
    (None, False, "examples"),
    ("silu", True, None),
    pytest.param("relu", False, None, marks=pytest.mark.grid),
    pytest.param("gelu", False, "float", marks=pytest.mark.grid),
    pytest.param("leaky_relu", True, "elements", marks=pytest.mark.grid),
]


@pytest.mark.optimized
@pytest.mark.x64
@pytest.mark.parametrize(("activation", "add", "weights"), CHECKED)
def test_check_grads(activation, add, weights):
    """Orders 1 and 2 in both modes against finite differences, y and state in x, params, residual
    and eps."""
    x, residual = draw(5, 2, dtype="float64"), draw(5, 2, seed=4, dtype="float64")
    params, state = layer(2, "float64")
    options = {
        "weights": draw_weights(weights, x.shape),
        "activation": activation and getattr(jax.nn, activation),
    }
    if weights == "float":
        options["weights"] = options["weights"].astype("float64")

    @jax.jit
    def f(x, params, residual, eps):
        y, new = jbn.batch_norm_train(
            x, params, state, residual=residual if add else None, momentum=0.5, eps=eps, **options
        )  # fmt: skip
        return y, new.mean, new.var

    check_grads(f, (x, params, residual, jnp.asarray(0.1)), order=2, modes=("fwd", "rev"))


def test_a_closure_over_a_learned_value_is_differentiated():
    x, (params, state) = draw(6, 3), layer(3)

    def f(slope, x):
        y, _ = jbn.batch_norm_train(
            x, params, state, activation=lambda z: jnp.where(z > 0, z, slope * z), eps=0.1
        )
        return jnp.sin(y).sum()

    slope = jnp.float32(0.3)
    z, _ = oracle.forward(x, *params, eps=0.1)
    y = np.where(z > 0, z, 0.3 * z)
    dslope, dx = jax.grad(f, argnums=(0, 1))(slope, x)
    np.testing.assert_allclose(dslope, np.where(z > 0, 0, np.cos(y) * z).sum(), rtol=1e-5)
    dz = np.cos(y) * np.where(z > 0, 1, 0.3)
    np.testing.assert_allclose(dx, oracle.backward(x, dz, *params, eps=0.1).x, rtol=1e-4, atol=1e-5)


SHAPE = (64, 4, 4, 8)
SAVED = [
    (None, False, ["bfloat16"]),
    ("relu", False, ["bfloat16"]),
    ("silu", False, ["bfloat16"]),
    (None, True, ["bfloat16"]),
    ("relu", True, ["bfloat16"] * 2),
    ("gelu", True, ["bfloat16"] * 2),
]


@pytest.mark.parametrize(("activation", "add", "expected"), SAVED)
@pytest.mark.parametrize("remat", [False, True])
def test_what_is_saved(capsys, activation, add, expected, remat):
    """For bf16 x: x itself and per-channel vectors; with residual and activation one more. Nothing
    else full-size."""
    params, state = layer(8)
    x, residual = draw(*SHAPE, dtype="bfloat16"), draw(*SHAPE, seed=4, dtype="bfloat16")
    function = None if activation is None else getattr(jax.nn, activation)

    def f(x, params, residual):
        y, _ = jbn.batch_norm_train(
            x, params, state, activation=function, residual=residual if add else None
        )
        # Linear, so that it saves nothing itself.
        return y.sum(dtype=jnp.float32)

    if remat:
        f = jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable)
    print_saved_residuals(f, x, params, residual)
    saved = re.findall(r"^(\w+)\[([\d,]*)\]", capsys.readouterr().out, re.MULTILINE)
    sizes = [
        (dtype, np.prod([int(n) for n in shape.split(",") if n], dtype=int))
        for dtype, shape in saved
    ]
    names = {"bf16": "bfloat16", "f32": "float32"}
    assert [names.get(dtype, dtype) for dtype, size in sizes if size >= x.size] == expected
    assert all(size <= 8 for _, size in sizes if size < x.size)


def test_weights_are_saved_as_they_are(capsys):
    params, state = layer(8)
    x, weights = draw(*SHAPE, dtype="bfloat16"), draw(SHAPE[0], 1, 1, 1) > 0
    f = lambda x: jbn.batch_norm_train(x, params, state, weights=weights)[0].sum(dtype=jnp.float32)
    print_saved_residuals(f, x)
    saved = re.findall(r"^(\w+)\[([\d,]*)\]", capsys.readouterr().out, re.MULTILINE)
    assert [dtype for dtype, shape in saved if shape == "64,4,4,8"] == ["bf16"]
    assert ("bool", "64,1,1,1") in saved


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradient_of_the_parameters_alone_makes_no_dx(activation):
    """The program that is lowered for it writes no more full-size arrays than one that has no use
    for dx."""
    (params, state), x = layer(8), draw(*SHAPE)
    function = None if activation is None else getattr(jax.nn, activation)

    def loss(x, params, dy):
        y, _ = jbn.batch_norm_train(x, params, state, activation=function)
        return (y * dy).sum()

    def flops(argnums):
        compiled = jax.jit(jax.grad(loss, argnums=argnums)).lower(x, params, x).compile()
        return compiled.cost_analysis()["flops"]

    # dx costs a multiplication by gain, and one and an addition for what the statistics send back,
    # per element at least.
    assert flops((0, 1)) - flops(1) >= 3 * x.size


def test_gradient_into_the_returned_state():
    """As a regularizer of the running statistics would use it: momentum scales it."""
    x, (params, state) = draw(6, 3), layer(3)
    f = lambda x, momentum: jbn.batch_norm_train(x, params, state, momentum=momentum)[1].var.sum()
    centered = np.asarray(x) - np.mean(np.asarray(x), 0)
    for momentum in (0.0, 0.75):
        dx = jax.grad(functools.partial(f, momentum=momentum))(x)
        np.testing.assert_allclose(dx, (1 - momentum) * 2 * centered / 6, rtol=1e-5, atol=1e-7)


def test_gradient_into_moments():
    x = draw(6, 3)
    dx = jax.grad(lambda x: (jbn.moments(x).m2 * jnp.arange(1.0, 4.0)).sum())(x)
    np.testing.assert_allclose(
        dx, 2 * (np.asarray(x) - np.mean(np.asarray(x), 0)) * np.arange(1, 4), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_cotangent_that_is_not_finite_under_weight_zero_stays_there(activation, bad):
    """x is finite there: what is not comes from the loss, and from the residual."""
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, 12, 5)).astype(np.float32)
    mask = np.arange(12) < 9
    params, state = jbn.init(5)
    dy_bad, residual_bad = (np.where(mask[:, None], v, np.float32(bad)) for v in (dy, residual))

    def gradients(x, dy, residual, weights):
        def loss(x, params, residual):
            y, _ = jbn.batch_norm_train(
                x, params, state, residual=residual, activation=activation, weights=weights
            )
            return jnp.sum(y * dy)

        return jax.grad(loss, (0, 1, 2))(x, params, residual)

    dx, dparams, dresidual = gradients(x, dy_bad, residual_bad, jnp.asarray(mask)[:, None])
    want_dx, want_dparams, want_dresidual = gradients(x[:9], dy[:9], residual[:9], None)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    close(dx[:9], want_dx)
    close(dresidual[:9], want_dresidual)
    jax.tree.map(close, dparams, want_dparams)


def test_a_tangent_that_is_nan_at_a_masked_element_stays_there():
    x = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    mask = jnp.arange(12)[:, None] < 9
    params, state = jbn.init(5)
    layer = lambda x: jbn.batch_norm_train(x, params, state, weights=mask)
    tangent = np.where(mask, 1, np.nan).astype(np.float32) * x[::-1]
    _, (t_y, t_state) = jax.jvp(layer, (x,), (tangent,))
    without = lambda x: jbn.batch_norm_train(x, params, state)
    _, (want, want_state) = jax.jvp(without, (x[:9],), (tangent[:9],))
    np.testing.assert_allclose(t_y[:9], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t_state.var, want_state.var, rtol=1e-4, atol=1e-6)
