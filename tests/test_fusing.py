"""jbn.fusing.fuse: norms computed with the addition and the activation that follow them."""

import collections
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.fusing import fuse, report
from jbn.kernels.seam import FUSED

pytestmark = pytest.mark.third_party
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
OTHER = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
PARAMS = jbn.Params(jnp.linspace(-1.5, 2, 8), jnp.linspace(-1, 1, 8))
STATE = jbn.init(8)[1]


def norm(x, params=PARAMS, **options):
    return jbn.batch_norm_train(x, params, STATE, **options)[0]


def layer(follow, **options):
    """A function of (x, other, params): what follows a norm, and the norm's new state."""

    def function(x, other, params):
        y, state = jbn.batch_norm_train(x, params, STATE, **options)
        return follow(y, other), state

    return function


def summary(norms):
    return [(n.activation, n.has_residual) for n in norms]


def agree(function, *args, rtol=1e-5):
    """Values and gradients of all arguments, fused and not."""
    weight = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    total = lambda f: (
        lambda *args: sum(
            (leaf * weight(leaf)).sum()
            for leaf in jax.tree.leaves(f(*args))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        )
    )
    both = lambda f: jax.jit(lambda *a: (f(*a), jax.grad(total(f), tuple(range(len(a))))(*a)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    jax.tree.map(close, both(function)(*args), both(fuse(function))(*args))


def remaining(function, *args):
    """How often each primitive stands in the fused program."""
    program = jax.make_jaxpr(fuse(function))(*args)
    return collections.Counter(equation.primitive.name for equation in program.eqns)


@pytest.mark.parametrize("activation", FUSED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("residual", ["none", "after", "before"])
def test_each_activation_with_and_without_a_residual(activation, residual):
    adds = {
        "none": lambda y, other: y,
        "after": lambda y, other: y + jnp.sin(other),
        "before": lambda y, other: jnp.sin(other) + y,
    }
    function = layer(lambda y, other: activation(adds[residual](y, other)))
    args = X, OTHER, PARAMS
    assert summary(report(function, *args)) == [(activation.__name__, residual != "none")]
    agree(function, *args)
    left = set(remaining(function, *args))
    assert left <= {"jbn", "sin"}, "the norm has taken over all that followed it"


@pytest.mark.parametrize(
    "follow",
    {
        "two users": lambda y, other: (jax.nn.relu(y), y),
        "its output twice": lambda y, other: jax.nn.relu(y) * jnp.sin(y),
        "added to itself": lambda y, other: jax.nn.relu(y + y),
        "the sum is used": lambda y, other: (jax.nn.relu(y + other), y + other),
        "a broadcast sum": lambda y, other: jax.nn.relu(y + 1.0),
        "subtracted": lambda y, other: jax.nn.relu(y - other),
        "two sums": lambda y, other: jax.nn.relu(y + other + other),
        "maximum": lambda y, other: jnp.maximum(y, 0),  # its gradient at 0 is 1/2
        "another slope": lambda y, other: jax.nn.leaky_relu(y, 0.2),
        "exact gelu": lambda y, other: jax.nn.gelu(y, approximate=False),
        "soft sign": lambda y, other: jax.nn.soft_sign(y),
        "a part": lambda y, other: jax.nn.relu(y[:4]),
        "a gate": lambda y, other: y * jax.nn.sigmoid(other),
        "a custom relu": lambda y, other: odd_relu(y),
        "nothing": lambda y, other: y,
    }.items(),
    ids=lambda item: item[0],
)
def test_nothing_is_fused_where_it_would_not_be_exact(follow):
    function = layer(follow[1])
    (found,) = report(function, X, OTHER, PARAMS)
    assert found.activation is None
    assert "its output is read by" in found.reason
    agree(function, X, OTHER, PARAMS, rtol=0)


@jax.custom_jvp
def odd_relu(x):
    """relu's value, another derivative."""
    return jax.nn.relu(x)


odd_relu.defjvp(lambda primals, tangents: (odd_relu(*primals), 3 * tangents[0]))


def test_an_own_activation_and_an_own_residual():
    own = layer(lambda y, other: jax.nn.relu(y), activation=jax.nn.silu)
    (found,) = report(own, X, OTHER, PARAMS)
    assert (found.activation, found.reason) == (None, "it has an activation of its own")
    for follow, expected in (
        (jax.nn.relu, ("relu", False)),
        (lambda y: jax.nn.relu(y + OTHER), (None, False)),
    ):
        function = lambda x, other, params, f=follow: f(norm(x, params, residual=other))
        assert summary(report(function, X, OTHER, PARAMS)) == [expected]
        agree(function, X, OTHER, PARAMS)


def test_a_residual_that_depends_on_the_new_statistics():
    def function(x):
        y, state = jbn.batch_norm_train(x, PARAMS, STATE)
        return jax.nn.relu(y + x * state.mean)

    (found,) = report(function, X)
    assert found.reason == "what is added to its output depends on its new statistics"
    agree(function, X, rtol=0)

    def crosswise(x, other):
        """Each norm's residual is made from the other's statistics: one of them can be fused."""
        y, state = jbn.batch_norm_train(x, PARAMS, STATE)
        z, state_z = jbn.batch_norm_train(other, PARAMS, STATE)
        return jax.nn.relu(y + x * state_z.mean), jax.nn.relu(z + x * state.mean)

    assert summary(report(crosswise, X, OTHER)) == [("relu", True), (None, False)]
    agree(crosswise, X, OTHER)


def test_statistics_that_are_read_before_the_activation():
    def function(x, other):
        y, state = jbn.batch_norm_train(x, PARAMS, STATE)
        mean, other = jnp.sin(state.mean), jnp.cos(other)
        return jax.nn.relu(y + other), mean * 2

    assert summary(report(function, X, OTHER)) == [("relu", True)]
    agree(function, X, OTHER)


def test_two_norms_that_are_added():
    """Of a projection and the last norm of a block, one is the other's residual."""

    def function(x, other):
        return jax.nn.relu(norm(x) + norm(other, momentum=0.5))

    first, second = report(function, X, OTHER)
    assert (first.activation, first.has_residual) == ("relu", True)
    assert second.reason.startswith("its output is read by another norm, as residual")
    agree(function, X, OTHER)


def test_inside_jit_remat_scan_and_cond():
    block = lambda x: jax.nn.relu(norm(x) + x)

    def function(x, flag):
        x = jax.jit(block)(jax.jit(block)(x))
        x = jax.checkpoint(block)(x)
        x = jax.lax.scan(lambda x, _: (block(x), None), x, None, length=3)[0]
        return jax.lax.cond(flag[0] > 0, block, lambda x: x, x)

    assert summary(report(function, X, jnp.ones(1))) == [("relu", True)] * 4  # the first two: one
    agree(function, X, jnp.ones(1), rtol=3e-5)  # seven norms on top of each other


def test_inside_other_transforms_nothing_is_fused_and_all_is_right():
    block = lambda x: jax.nn.relu(norm(x) + x)

    def function(x):
        inner = jax.grad(lambda x: jnp.sum(block(x) ** 3))(x)
        return inner + jax.vmap(block)(jnp.stack([x, 2 * x])).sum(0) + jax.jvp(block, (x,), (x,))[1]

    assert report(function, X) == ()
    agree(function, X)


@pytest.mark.slow
def test_under_every_transform_from_outside():
    function = lambda x: jax.nn.silu(norm(x) + jnp.sin(x))
    one = fuse(function)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    stacked = jnp.stack([X, 2 * X])
    close(jax.vmap(one)(stacked), jax.vmap(function)(stacked))
    close(jax.jvp(one, (X,), (OTHER,))[1], jax.jvp(function, (X,), (OTHER,))[1])
    second = lambda f: jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 3))(x) ** 2))
    np.testing.assert_allclose(second(one)(X), second(function)(X), rtol=1e-4, atol=1e-2)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("i")))
    close(jax.jit(one)(x), function(X))


@pytest.mark.slow
def test_masks_virtual_batches_renorm_and_bfloat16():
    mask = np.arange(16)[:, None] % 3 > 0
    for options in (
        {"weights": mask},
        {"virtual_batch_size": 4},
        {"skip_nonfinite": True, "unbiased": True},
        {"implementation": "mosaic_tpu/interpret"},
    ):
        function = layer(lambda y, other: jax.nn.relu(y + other), **options)
        assert summary(report(function, X, OTHER, PARAMS)) == [("relu", True)]
        agree(function, X, OTHER, PARAMS)
    renorm = lambda x, params: jax.nn.gelu(
        jbn.batch_renorm_train(x, params, STATE, r_max=2, d_max=1)[0]
    )
    assert summary(report(renorm, X, PARAMS)) == [("gelu", False)]
    agree(renorm, X, PARAMS)
    narrow = X.astype(jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):  # flax's default gives float32 from bfloat16
        function = layer(lambda y, other: jax.nn.relu(y + other.astype(y.dtype)), dtype=dtype)
        assert summary(report(function, narrow, OTHER, PARAMS)) == [("relu", True)]
        # The sum of a bfloat16 norm is rounded once, not twice, and so are gradients.
        agree(function, narrow, OTHER, PARAMS, rtol=1e-5 if dtype == jnp.float32 else 2**-6)


def test_evaluation_static_arguments_and_closures():
    state = jbn.State(jnp.linspace(-1, 1, 8), jnp.linspace(0.5, 2, 8), jnp.int32(3))

    def function(x, train, *, scale=1.0):
        assert isinstance(train, bool)
        y = norm(x) if train else jbn.batch_norm_eval(x, PARAMS, state)
        return {"y": jax.nn.relu(y) * scale, "none": None}

    for train in (True, False):
        expected, got = function(X, train, scale=2.0), fuse(function)(X, train, scale=2.0)
        np.testing.assert_allclose(got["y"], expected["y"], rtol=1e-6, atol=1e-6)
        assert got["none"] is None
        shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
        assert summary(report(function, shape, train)) == [("relu", False)]
    gradient = jax.grad(lambda a: fuse(lambda x: jax.nn.relu(norm(x)) * a)(X).sum())(2.0)
    np.testing.assert_allclose(gradient, np.maximum(norm(X), 0).sum(), rtol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        shortcut = nn.BatchNorm(not train)(nn.Dense(8)(x))
        y = nn.silu(nn.BatchNorm(not train)(nn.Dense(8)(x)))
        y = nn.BatchNorm(not train, name="last")(nn.Dense(8)(y))
        return nn.relu(y + shortcut)


def test_a_linen_model_that_is_switched():
    model = nn.remat(Block, static_argnums=2)()
    variables = model.init(jax.random.key(0), X, True)

    def function(variables, x):
        with jbn.linen.replacing():
            return model.apply(variables, x, True, mutable=["batch_stats"])

    norms = {n.name.split("/")[-1]: n[1:3] for n in report(function, variables, X)}
    assert norms == {
        "BatchNorm_0": ("relu", True),  # the first in the program takes the other as residual
        "BatchNorm_1": ("silu", False),
        "last": (None, False),
    }
    agree(function, variables, X)
    with jbn.linen.replacing():  # the context may be around it, too
        outside = lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])
        assert len(report(outside, variables, X)) == 3
        agree(outside, variables, X)
    assert report(outside, variables, X) == (), "flax's own norms are nobody's to fuse"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return nnx.relu(self.norm(self.dense(x)) + x)


def test_an_nnx_model_that_is_switched():
    def train(fuse):
        model = jbn.nnx.replace(Net(nnx.Rngs(0)))

        def loss(model, x, power):
            y = model(x)
            return jnp.mean(jnp.abs(y) ** power), {"y": y}

        @nnx.jit
        def step(model, x):
            return nnx.value_and_grad(fuse(loss), has_aux=True)(model, x, 3)

        return step(model, X), step(model, OTHER), nnx.state(model)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    plain, fused = train(lambda f: f), train(jbn.nnx.fuse)
    jax.tree.map(close, jax.tree.leaves(plain), jax.tree.leaves(fused))
    assert fused[2]["calls"][...] == 2
    model = jbn.nnx.replace(Net(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    call = jbn.nnx.fuse(lambda model, x: model(x))
    program = jax.make_jaxpr(lambda state, x: call(nnx.merge(graph, state), x))(state, X)
    assert "custom_jvp_call" not in {e.primitive.name for e in program.eqns}, "a relu is left"


def test_resnet_50(monkeypatch):
    """53 norms: 33 before a relu, 16 before a sum and a relu, 4 of projections."""
    examples = pathlib.Path(__file__).parent.parent / "examples"
    monkeypatch.syspath_prepend(str(examples))
    import networks_linen
    import networks_nnx

    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model = networks_linen.ResNet50(width=8, classes=10)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    with jbn.linen.replacing():
        linen = report(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]), variables, x)
    other = nnx.eval_shape(lambda: networks_nnx.ResNet50(width=8, classes=10, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(jbn.nnx.replace(other))

    def call(state, x):
        copy = nnx.merge(graph, state)
        return copy(x), nnx.state(copy)

    for norms in (linen, report(call, state, x)):
        counts = collections.Counter(summary(norms))
        assert counts == {("relu", False): 33, ("relu", True): 16, (None, False): 4}
    for name in ("networks_linen", "networks_nnx"):
        sys.modules.pop(name)
