"""Pairs of models of every kind of linear layer: each fold is exact, each trap is left out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn import fold

pytestmark = pytest.mark.third_party

KINDS = pytest.mark.parametrize("kind", [nn.BatchNorm, jbn.linen.BatchNorm])
NNX_KINDS = pytest.mark.parametrize("kind", [nnx.BatchNorm, jbn.nnx.BatchNorm])


def draw(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_random_statistics(variables, seed=0):
    """Scales, biases, means and variances as training could have left them."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        [jnp.asarray(rng.uniform(0.002, 1, leaf.shape), leaf.dtype) for leaf in leaves]
    )


class One(nn.Module):
    """A linear layer and a norm."""

    layer: type
    norm: type
    options: dict
    norm_options: dict

    @nn.compact
    def __call__(self, x):
        x = self.layer(**self.options, name="layer")(x)
        return self.norm(use_running_average=True, name="norm", **self.norm_options)(x)


def found(model, x):
    variables = with_random_statistics(model.init(jax.random.key(0), x))
    return variables, fold.find_pairs(model.apply, variables, x)


def require_equal(model, variables, after, folded, x, tolerance=1e-5):
    """The folded linen model gives what the model gave, to a part of the largest output."""
    certificate = fold.certify(
        functools.partial(model.apply, variables), functools.partial(after.apply, folded), [x]
    )
    certificate.require(tolerance * certificate.max_output)


LAYERS = {  # name -> (layer, options, options of the norm, shape of x, out_axis)
    "Dense": (nn.Dense, {"features": 3}, {}, (5, 4), -1),
    "Dense of rank 4": (nn.Dense, {"features": 4}, {}, (4, 4, 4, 4), -1),
    "DenseGeneral": (nn.DenseGeneral, {"features": 3}, {}, (5, 4), -1),
    "DenseGeneral that reads two axes": (
        nn.DenseGeneral,
        {"features": 3, "axis": (-2, -1)},
        {},
        (5, 3, 3),
        -1,
    ),
    "DenseGeneral of two features": (
        nn.DenseGeneral,
        {"features": (3, 4)},
        {"axis": (-2, -1)},
        (5, 4),
        (-2, -1),
    ),
    "Conv": (nn.Conv, {"features": 4, "kernel_size": (3, 3)}, {}, (4, 4, 4, 4), -1),
    "Conv in groups": (
        nn.Conv,
        {"features": 4, "kernel_size": (2,), "feature_group_count": 2, "strides": 2},
        {},
        (2, 4, 4),
        -1,
    ),
    "Conv of one example": (nn.Conv, {"features": 4, "kernel_size": (3, 3)}, {}, (4, 4, 4), -1),
    "Conv of two batch axes": (
        nn.Conv,
        {"features": 4, "kernel_size": (3,)},
        {},
        (4, 4, 4, 4),
        -1,
    ),
    "Conv, circular and causal": (
        nn.Conv,
        {"features": 4, "kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
        {},
        (4, 4, 4),
        -1,
    ),
    "ConvTranspose": (
        nn.ConvTranspose,
        {"features": 4, "kernel_size": (3, 3), "strides": (2, 2)},
        {},
        (2, 4, 4, 4),
        -1,
    ),
    "ConvTranspose of a transposed kernel": (
        nn.ConvTranspose,
        {"features": 4, "kernel_size": (3,), "transpose_kernel": True},
        {},
        (2, 4, 4),
        -2,
    ),
}


@KINDS
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_linen_layers(name, use_bias, kind):
    layer, options, norm_options, shape, out_axis = LAYERS[name]
    make = lambda norm, bias: One(layer, norm, {**options, "use_bias": bias}, norm_options)
    norm_options = {**norm_options, "epsilon": 3e-3}
    model, x = make(kind, use_bias), draw(*shape)
    variables, pairs = found(model, x)
    assert pairs == (fold.Pair(("layer",), ("norm",), out_axis, 3e-3),)
    after = make(fold.FoldedNorm, True)
    folded = fold.fold_variables(variables, pairs)
    expected = jax.eval_shape(after.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, expected)
    require_equal(model, variables, after, folded, x)


class Epsilons(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        for number, epsilon in enumerate((1e-3, 1e-5, 0.1)):
            x = nn.Dense(4, name=f"dense{number}")(x)
            norm = self.norm(use_running_average=True, name=f"norm{number}", epsilon=epsilon)
            x = nn.relu(norm(x))
        return x


@KINDS
def test_several_epsilons_in_one_model(kind):
    model, x = Epsilons(kind), draw(5, 4)
    variables, pairs = found(model, x)
    assert [pair.eps for pair in pairs] == [1e-3, 1e-5, 0.1]
    after = Epsilons(fold.FoldedNorm)
    require_equal(model, variables, after, fold.fold_variables(variables, pairs), x)
    with pytest.raises(ValueError, match=r"eps is 0\.1, but the program adds 0\.001"):
        fold.find_pairs(model.apply, variables, x, eps=0.1)


def test_an_epsilon_that_cannot_be_read_must_be_given():
    def apply(variables, x):
        dense, norm = variables["params"]["layer"], variables["params"]["norm"]
        stats = variables["batch_stats"]["norm"]
        y = x @ dense["kernel"] + dense["bias"]
        gain = norm["scale"] * jnp.exp(-0.5 * jnp.log(stats["var"] + 1e-3))
        return (y - stats["mean"]) * gain + norm["bias"]

    model, x = One(nn.Dense, nn.BatchNorm, {"features": 4}, {}), draw(5, 4)
    variables = model.init(jax.random.key(0), x)
    assert fold.find_pairs(apply, variables, x) == ()
    (pair,) = fold.find_pairs(apply, variables, x, eps=1e-3)
    assert pair == fold.Pair(("layer",), ("norm",), -1, 1e-3)


class Twice(nn.Module):
    """A norm that is called twice: each time after its own dense layer, or in a row."""

    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=True, name="norm")
        y = norm(nn.Dense(4, name="first")(x))
        return norm(y) if self.how == "in a row" else norm(nn.Dense(4, name="second")(y))


class Scanned(nn.Module):
    """The convolution's output is read by a loop, in which a norm reads something else."""

    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4, name="layer")(x)
        norm = self.norm(use_running_average=True, name="norm")
        run = nn.scan(
            lambda m, c, _: (m(c * c), None),
            variable_broadcast=["params", "batch_stats"],
            split_rngs={"params": False},
            length=2,
        )
        return run(norm, y, None)[0]


class ReadTwice(nn.Module):
    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4, name="layer")(x)
        return self.norm(use_running_average=True, name="norm")(y) * y


class OtherAxis(nn.Module):
    """Features along axis 1 of a layer that makes them along the last; both have size 4."""

    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=True, name="norm", axis=1)
        if self.how == "Conv":
            return norm(nn.Conv(4, (3, 3), name="layer")(x))
        if self.how == "transposed":
            return norm(nn.Dense(4, name="layer")(x).swapaxes(1, 2))
        return norm(nn.DenseGeneral((4, 4), name="layer")(x))


class Residual(nn.Module):
    """The norm reads x; its residual, not what it normalizes, comes from the layer."""

    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=True, name="norm")
        return norm(jnp.sin(x), residual=nn.Dense(4, name="layer")(x))


TRAPS = [
    *((Twice, how, kind) for how in ("in a row", "") for kind in (nn.BatchNorm, None)),
    *((Scanned, "", kind) for kind in (nn.BatchNorm, None)),
    *((ReadTwice, "", kind) for kind in (nn.BatchNorm, None)),
    *((OtherAxis, how, k) for how in ("Conv", "transposed", "") for k in (nn.BatchNorm, None)),
    (Residual, "", None),
]


@pytest.mark.parametrize(("trap", "how", "kind"), TRAPS)
def test_traps_are_no_pairs(trap, how, kind):
    kind = kind or jbn.linen.BatchNorm
    shape = (4, 4, 4, 4) if how in ("Conv", "transposed") else (4, 4)
    assert found(trap(kind, how), draw(*shape))[1] == ()


CUSTOM = {  # name -> what a layer with kernel K and bias b computes
    "reversed bias": lambda x, K, b: x @ K + b[None, ::-1],
    "changed bias": lambda x, K, b: x @ K + (2 * b + 1)[None],
    "squashed bias": lambda x, K, b: x @ K + jnp.tanh(b)[None],
    "rotated bias": lambda x, K, b: x @ K + jnp.concatenate([b[2:], b[:2]])[None],
    "transposed bias": lambda x, K, b: (
        x @ K + jax.lax.reshape(b.reshape(2, 2), (1, 4), dimensions=(1, 0))
    ),
    "rounded bias": lambda x, K, b: x @ K + b.astype(int).astype("f")[None],
    "unused bias": lambda x, K, b: x @ K,
    "reversed kernel": lambda x, K, b: x @ jax.lax.rev(K, (1,)) + b[None],
    "rounded kernel": lambda x, K, b: x @ K.astype(int).astype("f") + b[None],
    "rounded output": lambda x, K, b: (x @ K + b[None]).astype(int),
    "bool output": lambda x, K, b: (x @ K + b[None]).astype(bool),
    "float8 output": lambda x, K, b: (x @ K + b[None]).astype(jnp.float8_e4m3fn).astype("f"),
    "plain": lambda x, K, b: x @ K + b[None],
    "cast": lambda x, K, b: (
        x.astype("bfloat16") @ K.astype("bfloat16") + b.astype("bfloat16")[None]
    ).astype("f"),
    "reversed window": lambda x, K, b: x[:, ::-1] @ jax.lax.rev(K, (0,)) + b.reshape(1, 4),
}


class Custom(nn.Module):
    """A layer that someone wrote: it may do more with its bias and kernel than add and multiply."""

    compute: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1), (4, 4))
        bias = self.param("bias", nn.initializers.normal(1), (4,))
        return CUSTOM[self.compute](x, kernel, bias)


@KINDS
@pytest.mark.parametrize("compute", CUSTOM)
def test_a_layer_that_changes_its_kernel_bias_or_output_is_no_pair(compute, kind):
    model, x = One(Custom, kind, {"compute": compute}, {}), draw(5, 4)
    foldable = compute in ("plain", "cast", "reversed window")
    expected = (fold.Pair(("layer",), ("norm",), -1, 1e-5),) if foldable else ()
    variables, pairs = found(model, x)
    assert pairs == expected
    after = One(Custom, fold.FoldedNorm, {"compute": compute}, {})
    if foldable:
        # bfloat16 rounds the kernel and bias, which the fold scales by up to 1 / sqrt(0.002) = 22.
        tolerance = 0.1 if compute == "cast" else 1e-5
        folded = fold.fold_variables(variables, pairs)
        require_equal(model, variables, after, folded, x, tolerance)


def test_a_norm_that_rounds_what_it_normalizes_is_no_pair():
    def apply(variables, x):
        dense, norm = variables["params"]["layer"], variables["params"]["norm"]
        stats = variables["batch_stats"]["norm"]
        centered = x @ dense["kernel"] + dense["bias"] - stats["mean"]
        gain = norm["scale"] * jax.lax.rsqrt(stats["var"] + 1e-3)
        return centered.astype(int).astype("f") * gain + norm["bias"]

    model, x = One(nn.Dense, nn.BatchNorm, {"features": 4}, {}), draw(5, 4)
    assert fold.find_pairs(apply, model.init(jax.random.key(0), x), x) == ()


class Block(nnx.Module):
    """A block that is its own dense layer, with a norm in it; the bias is read where `how` says."""

    def __init__(self, how, kind, rngs):
        self.kernel = nnx.Param(draw(4, 4))
        self.bias = nnx.Param(draw(4, seed=2))
        self.norm = kind(4, use_running_average=True, rngs=rngs)
        self.how = how

    def __call__(self, x):
        y = x @ self.kernel[...]
        y = y if self.how == "after" else y + self.bias[...][None]
        return self.norm(y) if self.how == "before" else self.norm(y) + self.bias[...][None]


@NNX_KINDS
@pytest.mark.parametrize("how", ["before", "after", "twice"])
def test_a_layer_that_is_the_model_is_folded_if_its_bias_is_added_before_the_norm(how, kind):
    model, x = Block(how, kind, nnx.Rngs(0)), draw(5, 4)
    nnx.update(model, with_random_statistics(nnx.state(model)))
    pairs = nnx_pairs(model, x)
    assert pairs == ((fold.Pair((), ("norm",), -1, 1e-5),) if how == "before" else ())
    certificate = fold.certify(model, fold.fold_nnx(model, pairs), [x])
    certificate.require(1e-5 * certificate.max_output)


@KINDS
def test_a_linen_layer_that_is_the_model_is_folded(kind):
    class Model(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(1), (4, 3))
            bias = self.param("bias", nn.initializers.normal(1), (3,))
            return self.norm(use_running_average=True, name="norm")(x @ kernel + bias[None])

    model, x = Model(kind), draw(5, 4)
    variables, pairs = found(model, x)
    assert pairs == (fold.Pair((), ("norm",), -1, 1e-5),)
    folded = fold.fold_variables(variables, pairs)
    require_equal(model, variables, Model(fold.FoldedNorm), folded, x)


class Named(nnx.Module):
    """Attributes with the names of linen's collections."""

    def __init__(self, rngs):
        self.params = nnx.Dict(layer=nnx.Linear(4, 4, rngs=rngs))
        self.batch_stats = nnx.Dict(norm=nnx.BatchNorm(4, use_running_average=True, rngs=rngs))

    def __call__(self, x):
        return self.batch_stats["norm"](self.params["layer"](x))


def test_an_nnx_model_may_use_the_names_of_linens_collections():
    model, x = Named(nnx.Rngs(0)), draw(5, 4)
    nnx.update(model, with_random_statistics(nnx.state(model)))
    pairs = nnx_pairs(model, x)
    assert pairs == (fold.Pair(("params", "layer"), ("batch_stats", "norm"), -1, 1e-5),)
    certificate = fold.certify(model, fold.fold_nnx(model, pairs), [x])
    certificate.require(1e-5 * certificate.max_output)


class Holder(nnx.BatchNorm):
    """A norm that holds the layer before it."""

    def __init__(self, rngs):
        super().__init__(4, use_running_average=True, rngs=rngs)
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.layer(x))


def test_a_layer_that_its_norm_holds_is_no_pair():
    model, x = Holder(nnx.Rngs(0)), draw(5, 4)
    assert nnx_pairs(model, x) == ()
    with pytest.raises(ValueError, match="layer layer lies in norm the model itself"):
        fold.fold_nnx(model, [fold.Pair(("layer",), ())])


@KINDS
def test_an_axis_before_the_last_is_a_pair_where_the_layer_makes_it(kind):
    """A transpose brings the layer's features to axis 1, where the norm has them."""

    class Model(nn.Module):
        norm: type
        transpose: bool = True

        @nn.compact
        def __call__(self, x):
            y = jnp.moveaxis(nn.Dense(4, name="layer")(x), -1, 1)
            return self.norm(use_running_average=True, name="norm", axis=1)(y)

    model, x = Model(kind), draw(4, 4, 4, 4)
    variables, pairs = found(model, x)
    assert pairs == (fold.Pair(("layer",), ("norm",), -1, 1e-5),)
    folded = fold.fold_variables(variables, pairs)
    require_equal(model, variables, Model(fold.FoldedNorm), folded, x)


@KINDS
@pytest.mark.parametrize("lifted", [nn.remat, nn.jit])
def test_pairs_inside_lifted_transforms(kind, lifted):
    model, x = lifted(One)(nn.Dense, kind, {"features": 4}, {"epsilon": 1e-2}), draw(5, 4)
    assert found(model, x)[1] == (fold.Pair(("layer",), ("norm",), -1, 1e-2),)


class Plain(nnx.Module):
    def __init__(self, layer, norm):
        self.layer, self.norm = layer, norm

    def __call__(self, x):
        return self.norm(self.layer(x))


NNX_LAYERS = {
    "Linear": (lambda bias, r: nnx.Linear(4, 4, use_bias=bias, rngs=r), (4, 4)),
    "LinearGeneral": (lambda bias, r: nnx.LinearGeneral(4, 4, use_bias=bias, rngs=r), (4, 4, 4)),
    "Conv": (lambda bias, r: nnx.Conv(4, 4, (3, 3), use_bias=bias, rngs=r), (4, 4, 4, 4)),
    "ConvTranspose": (
        lambda bias, r: nnx.ConvTranspose(4, 4, (3,), strides=2, use_bias=bias, rngs=r),
        (4, 4, 4),
    ),
    "ConvTranspose of a transposed kernel": (
        lambda bias, r: nnx.ConvTranspose(4, 4, (3,), transpose_kernel=True, use_bias=bias, rngs=r),
        (4, 4, 4),
    ),
}


def nnx_pairs(model, x):
    graph, state = nnx.split(model)
    return fold.find_pairs(lambda v, x: nnx.merge(graph, v)(x), state, x)


@NNX_KINDS
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", NNX_LAYERS)
def test_nnx_layers(name, use_bias, kind):
    make, shape = NNX_LAYERS[name]
    rngs = nnx.Rngs(0)
    norm = kind(4, use_running_average=True, epsilon=2e-3, rngs=rngs)
    model, x = Plain(make(use_bias, rngs), norm), draw(*shape)
    nnx.update(model, with_random_statistics(nnx.state(model)))
    (pair,) = nnx_pairs(model, x)
    assert pair.eps == 2e-3
    folded = fold.fold_nnx(model, [pair])
    certificate = fold.certify(model, folded, [x])
    certificate.require(1e-5 * certificate.max_output)


class Whole(nnx.Module):
    """Norms as attributes, in a tuple, in a dict, and shared by two names; PReLU as activation."""

    def __init__(self, rngs):
        norm = lambda **options: jbn.nnx.BatchNorm(
            4, use_running_average=True, rngs=rngs, **options
        )
        linear = lambda: nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.layers = nnx.List([linear() for _ in range(4)])
        self.norm = norm(activation=nnx.PReLU(0.3))
        self.pair = nnx.data((norm(epsilon=1e-2), norm(activation=jax.nn.relu)))
        self.named = nnx.data({"only": norm()})
        self.again = self.norm

    def __call__(self, x):
        x = self.again(self.layers[0](x))
        x = self.pair[1](self.pair[0](self.layers[1](x)) + self.layers[2](x))
        return self.named["only"](self.layers[3](x))


def test_a_folded_nnx_model_is_a_model_like_any_other():
    model, x = Whole(nnx.Rngs(0)), draw(5, 4)
    nnx.update(model, with_random_statistics(nnx.state(model)))
    pairs = nnx_pairs(model, x)
    assert [pair.layer[-1] for pair in pairs] == [0, 1, 3]
    folded = fold.fold_nnx(model, pairs)
    kinds = [type(module) for _, module in nnx.iter_modules(folded)]
    assert kinds.count(fold.FoldedNorm) == 3
    assert kinds.count(jbn.nnx.BatchNorm) == 1
    expected = model(x)
    graph, state = nnx.split(folded)
    for run in (
        folded,
        nnx.clone(folded),
        functools.partial(nnx.jit(lambda m, x: m(x)), folded),
        functools.partial(jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state),
    ):
        np.testing.assert_allclose(run(x), expected, rtol=1e-4, atol=1e-5)
    slopes = [v for path, v in nnx.to_flat_state(state) if "negative_slope" in path]
    assert len(slopes) == 1
    gradient = nnx.grad(lambda m: m(x).sum())(folded)
    assert any(
        np.abs(v[...]).max() > 0
        for path, v in nnx.to_flat_state(gradient)
        if "negative_slope" in path
    )
    assert isinstance(model.norm, jbn.nnx.BatchNorm), "the model given must stay as it was"


def test_a_path_that_is_not_in_the_nnx_model_is_an_error():
    model = Plain(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no module other in the model"):
        fold.fold_nnx(model, [fold.Pair(("layer",), ("other",))])
