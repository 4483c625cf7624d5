"""Folding against layer-then-norm in float64, for every layout; pairs of models with traps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import lax

import jbn
import jbn.linen
import jbn.nnx
from jbn import fold

HIGHEST = functools.partial(lax.conv_general_dilated, precision=lax.Precision.HIGHEST)


def norm_of(features, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, features), jnp.float32)
    return jbn.Params(draw(0.5, 2), draw(-1, 1)), jbn.State(draw(-1, 1), draw(0.2, 3), jnp.int32(1))


def normalized(y, params, state, axis, eps=1e-5):
    return oracle.normalize(
        y, state.mean, state.var, params.scale, params.bias, axis=(axis,), eps=eps
    )


def draw(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def laid_out(spec, sizes):
    """A shape from a layout such as "NHWC" and the size of each letter."""
    return tuple(sizes[letter] for letter in spec)


def close(a, b):
    """A float32 sum of at most 108 products on either side, each rounded."""
    np.testing.assert_allclose(a, b, rtol=0, atol=108 * 2**-23 * np.abs(np.asarray(b)).max())


@pytest.mark.parametrize(
    "layouts", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CNHW", "IHWO", "NHWC"), None]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolutions_of_any_layout(layouts, groups, with_bias):
    lhs, rhs, out = layouts or ("NCHW", "OIHW", "NCHW")
    x = draw(*laid_out(lhs, {"N": 2, "H": 6, "W": 5, "C": 4}))
    kernel = draw(*laid_out(rhs, {"H": 3, "W": 2, "I": 4 // groups, "O": 8}), seed=2)
    bias = draw(8, seed=3) if with_bias else None
    params, state = norm_of(8)
    feature = out.index("C")

    def layer(kernel, bias):
        y = HIGHEST(
            x,
            kernel,
            (2, 1),
            "SAME",
            dimension_numbers=layouts,
            feature_group_count=groups,
            rhs_dilation=(1, 2),
        )
        return (
            y if bias is None else y + bias.reshape([-1 if a == feature else 1 for a in range(4)])
        )

    _, out_axis = fold.kernel_axes(layouts, 4)
    folded = fold.fold_previous(kernel, bias, params, state, out_axis=out_axis)
    close(layer(*folded), normalized(layer(kernel, bias), params, state, feature))


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_transposed_convolutions(transpose_kernel):
    x, params, state = draw(2, 5, 5, 3), *norm_of(4)
    kernel = draw(3, 3, *((4, 3) if transpose_kernel else (3, 4)), seed=2)
    layer = lambda kernel: lax.conv_transpose(
        x,
        kernel,
        (2, 2),
        "SAME",
        transpose_kernel=transpose_kernel,
        precision=lax.Precision.HIGHEST,
    )
    _, out_axis = fold.kernel_axes(("NHWC", "HWIO", "NHWC"), 4, transpose_kernel=transpose_kernel)
    folded, bias = fold.fold_previous(kernel, None, params, state, out_axis=out_axis, eps=1e-3)
    close(
        layer(folded) + bias.reshape(1, 1, 1, 4),
        normalized(layer(kernel), params, state, 3, eps=1e-3),
    )


def test_dense_layers_with_one_and_two_feature_axes():
    x, kernel = draw(5, 6), draw(6, 2, 3, seed=2)
    params, state = norm_of((2, 3))
    folded, bias = fold.fold_previous(kernel, None, params, state, out_axis=(-2, -1))
    y = np.einsum("ni,iab->nab", x, kernel)
    close(
        np.einsum("ni,iab->nab", x, folded) + np.asarray(bias)[None],
        oracle.normalize(y, state.mean, state.var, *params, axis=(1, 2)),
    )


@pytest.mark.parametrize("missing", [("scale",), ("bias",), ("scale", "bias")])
def test_norms_without_parameters_and_bfloat16_kernels(missing):
    x, kernel = draw(5, 6), draw(6, 3, seed=2)
    params, state = norm_of(3)
    params = params._replace(**dict.fromkeys(missing))
    folded, bias = fold.fold_previous(kernel, None, params, state)
    close(x @ folded + bias[None], normalized(x @ kernel, params, state, 1))
    low, low_bias = fold.fold_previous(kernel.astype(jnp.bfloat16), None, params, state)
    assert low.dtype == low_bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        low.astype(jnp.float32), folded, rtol=2**-7
    )  # rounded before and after


@pytest.mark.parametrize("layouts", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_into_the_following_convolution(layouts, groups, with_bias):
    lhs, rhs, out = layouts
    x = draw(*laid_out(lhs, {"N": 2, "H": 6, "W": 5, "C": 4}))
    kernel = draw(*laid_out(rhs, {"H": 3, "W": 2, "I": 4 // groups, "O": 8}), seed=2)
    bias = draw(8, seed=3) if with_bias else None
    params, state = norm_of(4)

    def layer(x, kernel, bias):
        y = HIGHEST(
            x, kernel, (1, 1), "VALID", dimension_numbers=layouts, feature_group_count=groups
        )
        return (
            y if bias is None else y + bias.reshape([-1 if letter == "C" else 1 for letter in out])
        )

    in_axis, out_axis = fold.kernel_axes(layouts, 4)
    axes = {"in_axis": in_axis, "out_axis": out_axis, "groups": groups}
    folded = fold.fold_next(params, state, kernel, bias, padding="VALID", **axes)
    before = jnp.asarray(normalized(x, params, state, lhs.index("C")), jnp.float32)
    close(layer(x, *folded), layer(before, kernel, bias))
    assert (
        fold.fold_next(params, state, kernel, bias, padding=((0, 0), (0, 0)), **axes)[0].shape
        == kernel.shape
    )
    for padding in ("SAME", ((1, 1), (0, 0))):
        with pytest.raises(ValueError, match="padding is"):
            fold.fold_next(params, state, kernel, bias, padding=padding, **axes)


def test_into_the_following_dense_layer():
    x, kernel = draw(5, 6), draw(6, 3, seed=2)
    params, state = norm_of(6)
    folded, bias = fold.fold_next(params, state, kernel, None, padding="VALID")
    close(x @ folded + bias[None], normalized(x, params, state, 1) @ np.asarray(kernel))


EXACT = ["VALID", "valid", 0, (0, 0), [(0, 0), (0, 0)], [(-1, 0), (0, -1)], [0, (0, -1)], (-1, -1)]
PADDED = [
    *("SAME", "SAME_LOWER", "CAUSAL", "same", 1, (1, 0), (0, 1), [(1, 1), (0, 0)]),
    *([(1, -1), (0, 0)], [(0, 0), (-1, 1)], [(0, 1), 0], np.int64(2)),
]


def lax_padding(padding):
    """What lax takes, of what Flax takes."""
    if isinstance(padding, str):
        return padding.upper()
    pairs = [padding] * 2 if isinstance(padding, int) else padding
    return [(pair, pair) if isinstance(pair, int) else pair for pair in pairs]


@pytest.mark.parametrize("padding", EXACT, ids=str)
@pytest.mark.parametrize("strides", [1, 2])
def test_padding_that_adds_nothing(padding, strides):
    x, kernel, (params, state) = draw(2, 7, 7, 4), draw(3, 2, 4, 5, seed=2), norm_of(4)
    layer = lambda x, kernel: HIGHEST(
        x, kernel, [strides] * 2, lax_padding(padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    folded, bias = fold.fold_next(
        params, state, kernel, None, padding=padding, strides=strides, transposed=False
    )
    before = jnp.asarray(normalized(x, params, state, 3), jnp.float32)
    close(layer(x, folded) + bias.reshape(1, 1, 1, 5), layer(before, kernel))


@pytest.mark.parametrize("padding", PADDED, ids=str)
def test_padding_that_adds_zeros_is_refused(padding):
    with pytest.raises(ValueError, match="padding is"):
        fold.fold_next(*norm_of(4), draw(3, 3, 4, 5), None, padding=padding)


@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
def test_padding_with_values_of_the_norm_and_windows_of_one(padding):
    window = (3, 3) if padding == "CIRCULAR" else (1, 1)
    layer = nn.Conv(5, window, padding=padding, precision=lax.Precision.HIGHEST)
    x, (params, state) = draw(2, 6, 6, 4), norm_of(4)
    variables = layer.init(jax.random.key(0), x)["params"]
    kernel, bias = fold.fold_next(params, state, *variables.values(), padding=padding)
    before = jnp.asarray(normalized(x, params, state, 3), jnp.float32)
    expected = layer.apply({"params": variables}, before)
    close(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x), expected)


def test_zeros_between_the_values_of_the_norm_are_refused():
    wide, point = draw(3, 3, 4, 5), draw(1, 1, 4, 5)
    refused = functools.partial(fold.fold_next, *norm_of(4), bias=None, padding="VALID")
    for kernel in (wide, point):
        with pytest.raises(ValueError, match="input_dilation is"):
            refused(kernel, input_dilation=(2, 1))
        with pytest.raises(ValueError, match="transposed convolution"):
            refused(kernel, transposed=True, strides=2)
    with pytest.raises(ValueError, match="transposed convolution"):
        refused(wide, transposed=True)
    assert refused(point, transposed=True)[0].shape == point.shape


@pytest.mark.parametrize(
    ("padding", "error"), [("FULL", ValueError), (None, TypeError), ([0.5], TypeError)]
)
def test_padding_of_no_known_form(padding, error):
    with pytest.raises(error, match="padding is"):
        fold.fold_next(*norm_of(4), draw(3, 3, 4, 5), None, padding=padding)


def both_ways(params, state, kernel=None, bias=None, **options):
    """fold_previous and fold_next with the same arguments."""
    kernel = draw(4, 4) if kernel is None else kernel
    yield lambda: fold.fold_previous(kernel, bias, params, state, **options)
    yield lambda: fold.fold_next(params, state, kernel, bias, padding="VALID", **options)


BAD = [  # (what is replaced, error, message)
    ({"var": jnp.array([1, -0.5, 1, 1.0])}, ValueError, r"var is -0\.5 for feature 1 \(1 such"),
    ({"var": jnp.array([1, 1, jnp.nan, 1])}, ValueError, "var is nan for feature 2"),
    ({"var": jnp.ones(3)}, ValueError, r"var has shape \(3,\), expected that of mean"),
    ({"scale": jnp.ones(3)}, ValueError, r"params\.scale has shape \(3,\)"),
    ({"norm_bias": jnp.ones((4, 1))}, ValueError, r"params\.bias has shape \(4, 1\)"),
    ({"mean": jnp.ones(4, jnp.int32)}, TypeError, "mean is of int32"),
    ({"kernel": jnp.ones((4, 4), jnp.int8)}, TypeError, "kernel is of int8"),
    ({"kernel": 3.0}, TypeError, "kernel is of float, expected a floating or complex array"),
    ({"bias": jnp.ones(4, bool)}, TypeError, "bias is of bool"),
    ({"bias": jnp.ones(1)}, ValueError, r"bias has shape \(1,\), expected \(4,\)"),
    ({"bias": jnp.ones((1, 4))}, ValueError, r"bias has shape \(1, 4\), expected \(4,\)"),
    ({"eps": -1e-5}, ValueError, "eps is -1e-05"),
    ({"eps": float("nan")}, ValueError, "eps is nan"),
    ({"out_axis": 2}, ValueError, "axis 2 is out of range"),
]


@pytest.mark.parametrize(("replaced", "error", "message"), BAD)
def test_wrong_arguments_are_named(replaced, error, message):
    params, state = norm_of(4)
    named = {**params._asdict(), **state._asdict(), **replaced}
    params = jbn.Params(named["scale"], replaced.get("norm_bias", params.bias))
    state = state._replace(mean=named["mean"], var=named["var"])
    options = {k: v for k, v in replaced.items() if k in ("kernel", "eps", "out_axis")}
    options["bias"] = replaced.get("bias")
    for call in both_ways(params, state, **options):
        with pytest.raises(error, match=message):
            call()


def test_features_that_do_not_fit():
    params, state = norm_of(4)
    with pytest.raises(ValueError, match=r"features \(3,\)"):
        fold.fold_previous(draw(2, 3), None, params, state)
    with pytest.raises(ValueError, match="reads 2 features"):
        fold.fold_next(params, state, draw(2, 3), None, padding="VALID")
    with pytest.raises(TypeError, match=r"got a dict .*expected a jbn\.Params"):
        fold.fold_previous(draw(2, 4), None, {}, state)


@pytest.mark.third_party
def test_complex_kernels_keep_their_imaginary_part():
    x, (params, state) = draw(5, 6) + 1j * draw(5, 6, seed=9), norm_of(3)
    kernel = draw(6, 3, seed=2) + 1j * draw(6, 3, seed=3)
    folded, bias = fold.fold_previous(kernel, None, params, state)
    y = np.asarray(x, np.complex128) @ np.asarray(kernel)
    gain = np.asarray(params.scale) / np.sqrt(np.asarray(state.var) + 1e-5)
    expected = (y - np.asarray(state.mean)) * gain + np.asarray(params.bias)
    np.testing.assert_allclose(x @ folded + bias[None], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="kernel has dtype float32, expected a complex one"):
        fold.fold_previous(kernel.real, None, params, state._replace(mean=state.mean + 1j))


@pytest.mark.third_party
def test_what_is_left_of_a_norm_adds_the_residual_in_the_dtype_of_x():
    left = fold.FoldedNorm(use_running_average=True, activation=jax.nn.relu)
    x = jnp.asarray([-1.0, 2.0], jnp.bfloat16)
    y = left(x, residual=jnp.asarray([0.5, 0.001], jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), [0, 2])
    assert isinstance(left, nnx.Module)


class Traps(nn.Module):
    """Foldable: Conv_0, Conv_1, ConvTranspose_0, Dense_0. No other norm is."""

    norm: type = jbn.linen.BatchNorm
    use_bias: bool = False
    skipping: bool = True

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(self.norm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        x = norm()(nn.Conv(8, (3, 3), feature_group_count=2, strides=2, use_bias=self.use_bias)(x))
        if self.skipping:
            x = nn.BatchNorm(use_running_average=True, name="after_nothing_linear")(nn.relu(x))
            read_twice = nn.Conv(8, (1, 1), name="read_twice")(x)
            x = (
                nn.BatchNorm(use_running_average=True, name="beside_a_skip")(read_twice)
                + read_twice
            )
            shared = nn.Conv(8, (1, 1), name="shared")
            x = shared(nn.BatchNorm(use_running_average=True, name="after_shared")(shared(x)))
        x = norm()(nn.ConvTranspose(4, (3, 3), transpose_kernel=True)(x))
        return norm()(nn.Dense(5, use_bias=self.use_bias)(x.mean((1, 2))))


def with_random_statistics(variables, seed=0):
    """Scales, biases, means and variances as training could have left them."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        [jnp.asarray(rng.uniform(0.2, 1, leaf.shape), leaf.dtype) for leaf in leaves]
    )


@pytest.mark.third_party
@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
def test_linen_pairs_are_found_and_folded(norm):
    model, x = Traps(norm), draw(2, 8, 8, 4)
    variables = with_random_statistics(model.init(jax.random.key(0), x))
    pairs = fold.find_pairs(lambda v, x: model.apply(v, x), variables, x)
    layers = [("Conv_0",), ("Conv_1",), ("ConvTranspose_0",), ("Dense_0",)]
    assert [pair.layer for pair in pairs] == layers
    assert [pair.norm for pair in pairs] == [(f"BatchNorm_{i}",) for i in range(4)]
    assert [pair.out_axis for pair in pairs] == [-1, -1, -2, -1]
    shape_only = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert fold.find_pairs(lambda v, x: model.apply(v, x), variables, shape_only) == pairs
    folded = fold.fold_variables(variables, pairs)
    assert set(folded["batch_stats"]) == {"after_nothing_linear", "beside_a_skip", "after_shared"}
    after = Traps(fold.FoldedNorm, use_bias=True)
    certificate = fold.certify(
        lambda x: model.apply(variables, x), lambda x: after.apply(folded, x), [x]
    )
    certificate.require(1e-5 * certificate.max_output)
    wrong = [pair._replace(eps=0.1) for pair in pairs]
    with pytest.raises(ValueError, match="max_error"):
        fold.certify(
            lambda x: model.apply(variables, x),
            lambda x: after.apply(fold.fold_variables(variables, wrong), x),
            [x],
        ).require(1e-5 * certificate.max_output)


@pytest.mark.third_party
def test_a_fully_folded_model_has_no_statistics():
    model, x = Traps(skipping=False), draw(2, 8, 8, 4)
    variables = with_random_statistics(model.init(jax.random.key(0), x))
    pairs = fold.find_pairs(lambda v, x: model.apply(v, x), variables, x)
    assert set(fold.fold_variables(variables, pairs)) == {"params"}


class NnxModel(nnx.Module):
    """A bias, a list, a fused activation with a residual; the last norm cannot be folded."""

    def __init__(self, rngs):
        norm = functools.partial(jbn.nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.bn = norm(8, activation=jax.nn.relu)
        self.layers = nnx.List(
            [nnx.Conv(8, 8, (1, 1), use_bias=False, rngs=rngs), norm(8, activation=jax.nn.relu)]
        )
        self.dense, self.last = (
            nnx.Linear(8, 3, rngs=rngs),
            nnx.BatchNorm(3, use_running_average=True, rngs=rngs),
        )

    def __call__(self, x):
        x = self.bn(self.conv(x))
        x = self.layers[1](self.layers[0](x), residual=x)
        return self.last(jnp.sin(self.dense(x.mean((1, 2)))))


@pytest.mark.third_party
def test_nnx_pairs_are_found_and_folded():
    model, x = NnxModel(nnx.Rngs(0)), draw(2, 8, 8, 4)
    nnx.update(model, with_random_statistics(nnx.state(model)))
    graph, state = nnx.split(model)
    pairs = fold.find_pairs(lambda v, x: nnx.merge(graph, v)(x), state, x)
    assert [(pair.layer, pair.norm) for pair in pairs] == [
        (("conv",), ("bn",)),
        (("layers", 0), ("layers", 1)),
    ]
    folded = fold.fold_nnx(model, pairs)
    kinds = [type(module) for _, module in nnx.iter_modules(folded)]
    assert jbn.nnx.BatchNorm not in kinds
    assert nnx.BatchNorm in kinds
    certificate = fold.certify(model, folded, [x, x[:1]])
    certificate.require(1e-5 * certificate.max_output)
    assert certificate.inputs == 2
    assert isinstance(model.bn, jbn.nnx.BatchNorm), "the model given must stay as it was"


def test_bad_pairs_are_errors():
    variables = {
        "params": {"a": {"kernel": draw(2, 3)}},
        "batch_stats": {"n": {"mean": jnp.zeros(3), "var": jnp.ones(3)}},
    }
    with pytest.raises(ValueError, match="two pairs"):
        fold.fold_variables(variables, [fold.Pair(("a",), ("n",)), fold.Pair(("b",), ("n",))])
    with pytest.raises(ValueError, match="no b in the variables"):
        fold.fold_variables(variables, [fold.Pair(("b",), ("n",))])


def test_a_certificate_sees_nan_and_demands_inputs():
    assert np.isnan(
        fold.certify(lambda x: x, lambda x: x * np.nan, [np.ones(2), np.zeros(2)]).max_error
    )
    with pytest.raises(ValueError, match="max_error is nan"):
        fold.certify(lambda x: x, lambda x: x * np.nan, [np.ones(2)]).require(1.0)
    with pytest.raises(ValueError, match="inputs is empty"):
        fold.certify(lambda x: x, lambda x: x, [])
    with pytest.raises(ValueError, match="outputs of shape"):
        fold.certify(lambda x: x, lambda x: x[:1], [np.ones(2)])


def test_a_certificate_sees_imaginary_parts():
    certificate = fold.certify(lambda x: x, lambda x: x + 3j, [np.ones(2) + 4j])
    assert certificate.max_error == 3
    assert certificate.max_output == np.abs(1 + 4j)
    assert fold.certify(lambda x: x, lambda x: x + 2j, [np.ones(2)]).max_error == 2


def test_arguments_of_the_wrong_kind_are_named():
    """Each message is jbn's own, and holds the value."""
    params, state = jbn.init(4)
    kernel = jnp.ones((3, 3, 4, 4))
    pair = fold.Pair(("layers", 0), ("layers", 1))
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
    )
    variables = nnx.to_pure_dict(nnx.state(model))
    boxed = {
        "params": {"layer": {"kernel": nn.Partitioned(draw(3, 4), names=(None, "model"))}},
        "batch_stats": {"norm": state._asdict()},
    }
    following = functools.partial(fold.fold_next, params, state, kernel, None, padding="VALID")
    previous = functools.partial(fold.fold_previous, kernel, None, params)
    for message, call in {
        "groups is '2'": lambda: following(groups="2"),
        r"groups is 1\.0": lambda: following(groups=1.0),
        "strides is 0": lambda: following(strides=(1, 0)),
        "input_dilation is None": lambda: following(input_dilation=None),
        "transposed is 'no'": lambda: following(transposed="no"),
        "eps is '1'": lambda: following(eps="1"),
        "eps is True": lambda: previous(state, eps=True),
        r"axis is 1\.5": lambda: previous(state, out_axis=1.5),
        r"var is 0\.0 .* as eps is 0": lambda: previous(state._replace(var=state.var * 0), eps=0),
        "var is inf": lambda: previous(state._replace(var=state.var * jnp.inf)),
        "mean is nan": lambda: previous(state._replace(mean=state.mean * jnp.nan)),
        "model is a NoneType": lambda: fold.fold_nnx(None, [pair]),
        "pairs holds a NoneType": lambda: fold.fold_nnx(model, None),
        "pairs holds a Pair": lambda: fold.fold_nnx(model, pair),
        "a pair names 'layers/0'": lambda: fold.fold_nnx(model, [fold.Pair("layers/0", "b")]),
        "layers/0 holds .* expected mean and var": lambda: fold.fold_nnx(
            model, [fold.Pair(pair.norm, pair.layer)]
        ),
        "variables is a NoneType": lambda: fold.fold_variables(None, [pair]),
        "apply is None": lambda: fold.find_pairs(None, variables, draw(2, 3)),
        "eps is 'a'": lambda: fold.find_pairs(lambda v, x: x, variables, draw(2, 3), eps="a"),
        "without arrays": lambda: fold.find_pairs(lambda v, x: x, None, draw(2, 3)),
        "dimension_numbers is 'NHWC'": lambda: fold.kernel_axes("NHWC", 4),
        "ndim is 1": lambda: fold.kernel_axes(None, 1),
        "reference is None": lambda: fold.certify(None, jnp.sin, [draw(2, 3)]),
        "inputs is a int": lambda: fold.certify(jnp.sin, jnp.sin, 3),
        "expected one array": lambda: fold.certify(lambda x: {"a": x}, jnp.sin, [draw(2, 3)]),
        "a tuple, expected one array: choose": lambda: fold.certify(
            lambda x: (x, {"mean": x[0]}), jnp.sin, [draw(2, 3)]
        ),
        "a list, expected one array: choose": lambda: fold.certify(
            lambda x: [x, x[0]], jnp.sin, [draw(2, 3)]
        ),
        "in_axis is .0, 1., expected one axis": lambda: following(in_axis=(0, 1)),
        "out_axis is .0, 1., expected one axis": lambda: following(out_axis=(0, 1)),
        "layers/1/mean is a .*, expected a module": lambda: fold.fold_variables(
            variables, [fold.Pair(pair.layer, ("layers", 1, "mean", "z"))]
        ),
        "layers/0/kernel is a .*, expected a module": lambda: fold.fold_variables(
            variables, [fold.Pair(("layers", 0, "kernel"), pair.norm)]
        ),
        "an input is a str .'eval'.": lambda: fold.find_pairs(
            lambda v, x, mode: x, variables, draw(2, 3), "eval"
        ),
        r"kernel is of Partitioned, .* flax\.linen\.unbox": lambda: fold.fold_variables(
            boxed, [fold.Pair(("layer",), ("norm",))]
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
