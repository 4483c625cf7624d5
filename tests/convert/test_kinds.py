"""Layers are taken for what they are: batch norms and subclasses convert, all else is refused."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
from jbn import convert

pytestmark = pytest.mark.third_party


def need(name, extra="pip install 'jbn[peers]'"):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip(name, reason=f"needs {name}: {extra}")


def torch_or_skip():
    return need("torch", "pip install torch")


TORCH_OTHERS = {
    "InstanceNorm2d": lambda t: t.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda t: t.GroupNorm(2, 4),
    "LayerNorm": lambda t: t.LayerNorm(4),
    "Conv2d": lambda t: t.Conv2d(4, 4, 1),
    "LocalResponseNorm": lambda t: t.LocalResponseNorm(2),
}


@pytest.mark.parametrize("name", TORCH_OTHERS)
def test_other_layers_of_torch_are_no_batch_norms(name):
    layer = TORCH_OTHERS[name](torch_or_skip().nn)
    for function in (convert.options, convert.from_torch):
        with pytest.raises(TypeError, match=f"{name}, expected a batch norm of"):
            function(layer)


FLAX_OTHERS = [
    nn.LayerNorm(),
    nn.GroupNorm(),
    nn.Dense(3),
    nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
    nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
]


@pytest.mark.parametrize("layer", FLAX_OTHERS, ids=lambda layer: type(layer).__module__)
def test_other_layers_of_flax_are_no_batch_norms(layer):
    with pytest.raises(TypeError, match=f"{type(layer).__name__}, expected a batch norm of"):
        convert.options(layer)


@pytest.mark.parametrize("name", ["SyncBatchNorm", "BatchNorm3d", "subclass"])
def test_subclasses_of_torchs_batch_norm_are_batch_norms(name):
    torch = torch_or_skip()

    class Mine(torch.nn.BatchNorm2d):
        pass

    layer = (Mine if name == "subclass" else getattr(torch.nn, name))(3, momentum=0.2, eps=1e-4)
    expected = {"axis": 1, "momentum": 0.8, "eps": 1e-4, "unbiased": True}
    assert convert.options(layer) == expected
    params, state = convert.from_torch(layer)
    assert jax.tree.structure((params, state)) == jax.tree.structure(jbn.init(3))
    np.testing.assert_array_equal(state.var, np.ones(3))


def test_subclasses_of_flax_are_batch_norms_and_keep_what_jbn_adds():
    class Mine(jbn.linen.BatchNorm):
        pass

    found = convert.options(Mine(momentum=0.5, activation=jax.nn.relu, virtual_batch_size=4))
    assert found == {
        "axis": -1,
        "momentum": 0.5,
        "eps": 1e-5,
        "unbiased": False,
        "activation": jax.nn.relu,
        "virtual_batch_size": 4,
    }


def test_batch_renorm_goes_on_as_batch_renorm():
    layer = jbn.linen.BatchRenorm(r_max=2.0, d_max=4.0, momentum=0.9)
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1
    variables = layer.init(jax.random.key(1), x, use_running_average=True)
    y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    params, state = convert.from_linen(variables)
    found, new = jbn.batch_renorm_train(x, params, state, **convert.options(layer))
    np.testing.assert_allclose(found, y, rtol=1e-6)
    np.testing.assert_allclose(new.mean, updated["batch_stats"]["mean"], rtol=1e-6)
    with pytest.raises(ValueError, match="warmup_steps 7"):
        convert.options(jbn.linen.BatchRenorm(warmup_steps=7))


def test_a_batch_norm_without_running_statistics_is_named_as_such():
    torch = torch_or_skip()
    layer = torch.nn.BatchNorm1d(3, track_running_stats=False)
    for argument in (layer, layer.state_dict()):
        with pytest.raises(ValueError, match="batch norm without running statistics"):
            convert.from_torch(argument)
    with pytest.raises(ValueError, match="batch norm without running statistics"):
        convert.options(layer)
    with pytest.raises(ValueError, match="batch norm without running statistics"):
        convert.from_torch_model(torch.nn.Sequential(layer))


def test_sizes_that_differ_are_an_error():
    torch = torch_or_skip()
    state = torch.nn.BatchNorm1d(3).state_dict()
    state["weight"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"has shapes .*'weight': \(4,\)"):
        convert.from_torch(state)


ACTIVATIONS = {
    "ReLU": jax.nn.relu,
    "SiLU": jax.nn.silu,
    "Identity": None,
    "LeakyReLU": jax.nn.leaky_relu,
    "GELU": "exact",
    "Hardswish": jax.nn.hard_swish,
    "ReLU6": jax.nn.relu6,
    "ELU": "alpha",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_timms_norm_converts_with_its_activation(name):
    torch = torch_or_skip()
    timm = need("timm", "pip install timm")
    act = getattr(torch.nn, name)
    layer = timm.layers.BatchNormAct2d(3, act_layer=act, inplace=False).eval()
    with torch.no_grad():
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(-2, 2)
    options = convert.options(layer)
    if not isinstance(ACTIVATIONS[name], str):
        assert options.get("activation") is ACTIVATIONS[name]
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)
    for option in ("momentum", "unbiased"):
        del options[option]
    y = jbn.batch_norm_eval(x, *convert.from_torch(layer), **options)
    with torch.no_grad():
        np.testing.assert_allclose(y, layer(torch.from_numpy(x)), rtol=1e-4, atol=1e-5)


def test_an_activation_that_is_not_known_is_an_error():
    torch = torch_or_skip()

    layer = torch.nn.BatchNorm2d(3)
    layer.act, layer.drop = torch.nn.Softplus(), torch.nn.Identity()
    with pytest.raises(TypeError, match=r"activation is a torch.*Softplus"):
        convert.options(layer)
    layer.act, layer.drop = torch.nn.ReLU(), torch.nn.Dropout(0.5)
    with pytest.raises(ValueError, match="no dropout"):
        convert.options(layer)


@pytest.mark.parametrize(("data_format", "axis"), [("N...C", -1), ("NC...", 1)])
def test_the_feature_axis_of_haiku(data_format, axis):
    haiku = need("haiku")
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
    x = x if axis == -1 else np.moveaxis(x, -1, 1)
    found = []

    def forward(x):
        layer = haiku.BatchNorm(True, True, 0.9, data_format=data_format)
        y = layer(x, is_training=False)
        found.append(convert.options(layer))
        return y

    params, state = jbn.init(3)
    state = state._replace(mean=jnp.arange(3.0), var=jnp.arange(1.0, 4), count=jnp.int32(3))
    foreign = convert.to_haiku(params, state, ndim=3, axis=axis, momentum=0.9)
    y, _ = haiku.transform_with_state(forward).apply(*foreign, None, x)
    assert found[0]["axis"] == axis
    expected = jbn.batch_norm_eval(x, params, state, axis=found[0]["axis"], eps=found[0]["eps"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_other_layers_of_keras_and_equinox_are_no_batch_norms():
    keras = need("keras")
    with pytest.raises(TypeError, match="LayerNormalization, expected a batch norm of keras"):
        convert.from_keras(keras.layers.LayerNormalization())
    equinox = need("equinox")
    with pytest.raises(TypeError, match="LayerNorm, expected a batch norm of equinox"):
        convert.from_equinox(equinox.nn.LayerNorm(3), None)


def test_variables_of_something_else_are_errors():
    with pytest.raises(ValueError, match="expected 'batch_stats'"):
        convert.from_linen({"params": {"kernel": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"holds \['kernel'\], expected mean and var"):
        convert.from_nnx({"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match="no bn/~/mean_ema in the state"):
        convert.from_haiku({}, {}, "bn")


def test_torch_tensors_without_values_are_named():
    layers = torch_or_skip().nn
    for layer in (layers.LazyBatchNorm1d(), layers.BatchNorm1d(4, device="meta")):
        with pytest.raises(ValueError, match="without values"):
            convert.from_torch(layer)
