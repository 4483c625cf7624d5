"""Every transform of JAX, alone and nested, equals that of a plain jax.numpy batch norm in float64,
to 1e-8.

Each variant of the function (weights, residual, activation, which statistics) meets each transform
at least once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jbn

pytestmark = pytest.mark.x64

ROWS, CHANNELS = 4, 2
EPS, MOMENTUM = 0.1, 0.3


def inputs(batch=None, seed=0):
    """x, params and residual, as a dict so that every transform sees all of them."""
    rng = np.random.default_rng(seed)
    lead = () if batch is None else (batch,)
    shapes = {
        "x": (ROWS, CHANNELS),
        "scale": (CHANNELS,),
        "bias": (CHANNELS,),
        "residual": (ROWS, CHANNELS),
    }
    return {name: jnp.asarray(rng.normal(size=lead + shape)) for name, shape in shapes.items()}


def start():
    mean, var = np.array([[0.3, -0.2], [0.7, 1.3]])
    return jbn.State(jnp.asarray(mean), jnp.asarray(var), jnp.int32(0))


# (activation, residual, weights): what differs in the derivative rule. tanh runs outside it.
VARIANTS = {
    "plain": (None, False, None),
    "relu": (jax.nn.relu, False, None),
    "silu": (jax.nn.silu, False, None),
    "add+relu": (jax.nn.relu, True, None),
    "add+gelu": (jax.nn.gelu, True, None),
    "add+leaky_relu, weights": (jax.nn.leaky_relu, True, "float"),
    "mask": (None, False, "mask"),
    "add+tanh": (jnp.tanh, True, None),
    "eval+silu": (jax.nn.silu, True, "eval"),
}


def weights_of(kind):
    """One per row; the third is zero."""
    if kind == "mask":
        return jnp.asarray(np.array([[True], [True], [False], [True]]))
    return jnp.asarray(np.array([[1.0], [0.5], [0.0], [2.0]])) if kind == "float" else None


def ours(variant, i):
    """y, running mean and running variance."""
    activation, add, kind = VARIANTS[variant]
    params = jbn.Params(i["scale"], i["bias"])
    common = {"eps": EPS, "residual": i["residual"] if add else None, "activation": activation}
    if kind == "eval":
        # The statistics depend on x too, so that their cotangents are seen.
        mean, var = i["x"].mean(0), 1 + jnp.square(i["x"]).mean(0)
        return jbn.normalize(i["x"], mean, var, params, **common), mean, var
    y, state = jbn.batch_norm_train(
        i["x"], params, start(), momentum=MOMENTUM, weights=weights_of(kind), **common
    )
    return y, state.mean, state.var


def plain(variant, i):
    """The same in jax.numpy, differentiated by JAX."""
    activation, add, kind = VARIANTS[variant]
    x = i["x"]
    if kind == "eval":
        mean, var = x.mean(0), 1 + jnp.square(x).mean(0)
    else:
        weights = weights_of(kind)
        weights = jnp.ones((ROWS, 1)) if weights is None else weights.astype(jnp.float64)
        mean = (weights * x).sum(0) / weights.sum()
        var = (weights * jnp.square(x - mean[None])).sum(0) / weights.sum()
    z = (x - mean[None]) / jnp.sqrt(var + EPS)[None] * i["scale"][None] + i["bias"][None]
    z = z + i["residual"] if add else z
    y = z if activation is None else activation(z)
    if kind == "eval":
        return y, mean, var
    fold = lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new
    return y, fold(start().mean, mean), fold(start().var, var)


def loss(f):
    """A scalar in which nothing cancels: y, mean and var all weigh in, unevenly."""
    coefficient = jnp.asarray(np.random.default_rng(9).normal(size=(ROWS, CHANNELS)))

    def scalar(i):
        y, mean, var = f(i)
        return (
            jnp.sin(y * coefficient).sum() + jnp.square(mean).sum() + (coefficient[0] * var).sum()
        )

    return scalar


def with_x(i, f):
    """f(i) as a function of x alone."""
    return lambda x: f({**i, "x": x})


def directional(f, i, seed):
    """The derivative of f along a fixed direction, by forward mode."""
    return jax.jvp(f, (i,), (inputs(seed=seed),))[1]


def each_row(f):
    return jax.vmap(f)(inputs(batch=3, seed=4))


def scanned_twice(f):
    def step(carry, _):
        y, _, var = f({**inputs(), "x": carry})
        return y, var

    return lambda x: sum(map(jnp.sum, lax.scan(step, x, None, length=2)))


def conditional(f):
    return lambda i: lax.cond(i["x"][0, 0] > 0, loss(f), lambda i: 2 * loss(f)(i), i)


def mapped_over_x(f):
    """Only x is mapped: params and residual are shared."""
    common = inputs()
    return lambda xs: jax.vmap(lambda x: f({**common, "x": x}))(xs).sum()


def remat(policy):
    return lambda f: jax.grad(jax.checkpoint(loss(f), policy=policy))(inputs())


POLICIES = jax.checkpoint_policies

TRANSFORMS = {
    "value": lambda f: f(inputs()),
    "jvp": lambda f: jax.jvp(f, (inputs(),), (inputs(seed=1),)),
    "linearize": lambda f: jax.linearize(f, inputs())[1](inputs(seed=1)),
    "vjp": lambda f: jax.vjp(f, inputs())[1](f(inputs(seed=1))),
    "linear_transpose": lambda f: jax.linear_transpose(jax.linearize(f, inputs())[1], inputs())(
        f(inputs(seed=1))
    ),
    "grad": lambda f: jax.grad(loss(f))(inputs()),
    "jacfwd": lambda f: jax.jacfwd(f)(inputs()),
    "jacrev": lambda f: jax.jacrev(f)(inputs()),
    "hessian": lambda f: jax.hessian(loss(f))(inputs()),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(loss(f)))(inputs()),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(with_x(inputs(), loss(f))))(inputs()["x"]),
    "grad of grad": lambda f: jax.grad(lambda i: jax.grad(loss(f))(i)["x"][1].sum())(inputs()),
    "jvp of grad": lambda f: directional(jax.grad(loss(f)), inputs(), 1),
    "grad of jvp": lambda f: jax.grad(lambda i: directional(loss(f), i, 1))(inputs()),
    "jvp of jvp": lambda f: directional(lambda i: directional(f, i, 1), inputs(), 2),
    "third order, reverse": lambda f: jax.grad(
        lambda i: jax.grad(lambda i: jax.grad(loss(f))(i)["x"][0].sum())(i)["scale"].sum()
    )(inputs()),
    "third order, forward over forward over reverse": lambda f: directional(
        lambda i: directional(jax.grad(loss(f)), i, 1), inputs(), 2
    ),
    "third order, reverse over forward over reverse": lambda f: jax.grad(
        lambda i: directional(jax.grad(loss(f)), i, 1)["x"][0].sum()
    )(inputs()),
    "vmap": each_row,
    "vmap of jvp": lambda f: each_row(lambda i: directional(f, i, 1)),
    "vmap of grad": lambda f: each_row(jax.grad(loss(f))),
    "vmap of jacfwd": lambda f: each_row(jax.jacfwd(lambda i: f(i)[1:])),
    "vmap of jacrev": lambda f: each_row(jax.jacrev(lambda i: f(i)[1:])),
    "vmap of hessian": lambda f: each_row(lambda i: jax.hessian(with_x(i, loss(f)))(i["x"])),
    "vmap of grad of grad": lambda f: each_row(
        jax.grad(lambda i: jax.grad(loss(f))(i)["x"][0].sum())
    ),
    "vmap of vmap": lambda f: jax.vmap(jax.vmap(f))(
        jax.tree.map(lambda a: a[None], inputs(batch=3))
    ),
    "vmap of vmap of grad": lambda f: jax.vmap(jax.vmap(jax.grad(loss(f))))(
        jax.tree.map(lambda a: a[:, None], inputs(batch=3))
    ),
    "vmap over x alone": lambda f: mapped_over_x(loss(f))(inputs(batch=3)["x"]),
    "grad of vmap over x alone": lambda f: jax.grad(mapped_over_x(loss(f)))(inputs(batch=3)["x"]),
    "grad of vmap": lambda f: jax.grad(lambda i: jax.vmap(loss(f))(i).sum())(inputs(batch=3)),
    "hessian of vmap": lambda f: jax.hessian(mapped_over_x(loss(f)))(inputs(batch=2)["x"]),
    "jit": lambda f: jax.jit(f)(inputs()),
    "jit of grad": lambda f: jax.jit(jax.grad(loss(f)))(inputs()),
    "grad of jit": lambda f: jax.grad(jax.jit(loss(f)))(inputs()),
    "remat": remat(None),
    "remat, nothing saveable": remat(POLICIES.nothing_saveable),
    "remat, everything saveable": remat(POLICIES.everything_saveable),
    "remat, dots saveable": remat(POLICIES.dots_saveable),
    "hessian of remat": lambda f: jax.hessian(jax.checkpoint(with_x(inputs(), loss(f))))(
        inputs()["x"]
    ),
    "vmap of remat": lambda f: each_row(jax.grad(jax.checkpoint(loss(f)))),
    "scan": lambda f: scanned_twice(f)(inputs()["x"]),
    "grad of scan": lambda f: jax.grad(scanned_twice(f))(inputs()["x"]),
    "hessian of scan": lambda f: jax.hessian(scanned_twice(f))(inputs()["x"]),
    "jvp of grad of scan": lambda f: directional(
        lambda i: jax.grad(scanned_twice(f))(i["x"]), inputs(), 1
    ),
    "cond": lambda f: conditional(f)(inputs()),
    "grad of cond": lambda f: jax.grad(conditional(f))(inputs()),
    "vmap of grad of cond": lambda f: each_row(jax.grad(conditional(f))),
    "while": lambda f: lax.fori_loop(0, 2, lambda _, x: f({**inputs(), "x": x})[0], inputs()["x"]),
    "grad of map": lambda f: jax.grad(lambda i: lax.map(loss(f), i).sum())(inputs(batch=2)),
}


def pairs():
    """Each transform of one variant in turn, the gradient of all; two more variants each in the
    grid."""
    names = list(VARIANTS)
    for k, transform in enumerate(TRANSFORMS):
        chosen = [names[(2 * k + j) % len(names)] for j in range(3)]
        yield from (
            pytest.param(transform, variant)
            for variant in (names if transform == "grad" else chosen[:1])
        )
        yield from (
            pytest.param(transform, v, marks=pytest.mark.grid)
            for v in chosen[1:]
            if transform != "grad"
        )


@pytest.mark.parametrize(("transform", "variant"), list(pairs()))
def test_equals_plain_jax_numpy(transform, variant):
    f = functools.partial(ours, variant)
    reference = functools.partial(plain, variant)
    run = TRANSFORMS[transform]
    actual, expected = jax.jit(lambda: (run(f), run(reference)))()  # one compilation of both
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
    jax.tree.map(close, actual, expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3


@pytest.mark.parametrize(
    "transform",
    ["jvp", "grad", "grad of jvp"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("vmap of grad", "grad of scan", "grad of cond", "remat")
    ],
)
def test_equals_plain_jax_numpy_without_jit(transform):
    run = TRANSFORMS[transform]
    actual, expected = (
        run(functools.partial(ours, "add+relu")),
        run(functools.partial(plain, "add+relu")),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), actual, expected
    )


ONE_AT_A_TIME = {
    "value": lambda f: f(inputs()),
    "jvp": lambda f: directional(f, inputs(), 1),
    "grad": lambda f: jax.grad(loss(f))(inputs()),
    "jacfwd": lambda f: jax.jacfwd(f)(inputs()),
    "hessian": lambda f: jax.hessian(with_x(inputs(), loss(f)))(inputs()["x"]),
    "third order": lambda f: directional(
        lambda i: directional(jax.grad(loss(f)), i, 1), inputs(), 2
    ),
    "vmap of grad": lambda f: each_row(jax.grad(loss(f))),
    "remat": remat(None),
    "grad of jit": lambda f: jax.grad(jax.jit(loss(f)))(inputs()),
    "jvp of jit": lambda f: directional(jax.jit(f), inputs(), 1),
    "grad of scan": lambda f: jax.grad(
        lambda i: lax.scan(lambda total, _: (total + loss(f)(i), None), 0.0, None, length=2)[0]
    )(inputs()),
}


@pytest.mark.parametrize(
    "variant", ["add+relu", pytest.param("add+leaky_relu, weights", marks=pytest.mark.grid)]
)
@pytest.mark.parametrize("transform", ONE_AT_A_TIME)
def test_one_example_at_a_time(transform, variant):
    """vmap with an axis name, as many write their networks: x of rank 1, statistics over the
    mapped axis."""
    jax.clear_caches()  # a rule traced while the name was bound would hide that it no longer is
    activation, _, kind = VARIANTS[variant]

    def one(x, residual, weights, params):
        y, state = jbn.batch_norm_train(
            x, params, start(), axis_name="batch", eps=EPS, momentum=MOMENTUM,
            residual=residual, weights=weights, activation=activation,
        )  # fmt: skip
        return y, state.mean, state.var

    def f(i):
        weights = weights_of(kind)
        mapped = jax.vmap(
            one, (0, 0, None if weights is None else 0, None), (0, None, None), axis_name="batch"
        )
        return mapped(i["x"], i["residual"], weights, jbn.Params(i["scale"], i["bias"]))

    run = ONE_AT_A_TIME[transform]
    actual, expected = jax.jit(lambda: (run(f), run(functools.partial(plain, variant))))()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), actual, expected
    )
