"""A torch ResNet-18 in linen: the same logits, also with every batch norm folded away."""

import functools
import importlib
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn import fold
from jbn.convert import models

pytestmark = pytest.mark.third_party
torch = pytest.importorskip("torch", reason="needs torch: pip install torch")

# An eighth of the width of ResNet-18: the same 62 modules at a 64th of the work.
WIDTH, CLASSES, SIZE = 8, 10, 32


class TorchBlock(torch.nn.Module):
    """torchvision's BasicBlock, with its names."""

    def __init__(self, features_in, features, stride):
        super().__init__()
        conv = functools.partial(torch.nn.Conv2d, bias=False)
        self.conv1 = conv(features_in, features, 3, stride, 1)
        self.bn1 = torch.nn.BatchNorm2d(features)
        self.conv2 = conv(features, features, 3, 1, 1)
        self.bn2 = torch.nn.BatchNorm2d(features)
        self.downsample = None
        if stride > 1:
            self.downsample = torch.nn.Sequential(
                conv(features_in, features, 1, stride), torch.nn.BatchNorm2d(features)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet18(torch.nn.Module):
    """torchvision's resnet18, with its names and a narrower stem."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(WIDTH)
        for stage in range(4):
            features, stride = WIDTH * 2**stage, 1 if stage == 0 else 2
            blocks = (
                TorchBlock(features // stride, features, stride),
                TorchBlock(features, features, 1),
            )
            setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(8 * WIDTH, CLASSES)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Block(nn.Module):
    features: int
    stride: int
    norm: Any
    conv: Any

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = self.norm(activation=jax.nn.relu, name="bn1")(y)
        y = self.conv(self.features, (3, 3), padding=1, name="conv2")(y)
        if self.stride > 1:
            x = self.conv(self.features, (1, 1), strides=self.stride, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return self.norm(activation=jax.nn.relu, name="bn2")(y, residual=x)


class ResNet18(nn.Module):
    norm: Any = jbn.linen.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, images):
        norm = functools.partial(self.norm, use_running_average=True)
        conv = functools.partial(nn.Conv, use_bias=self.use_bias)
        x = conv(WIDTH, (7, 7), strides=2, padding=3, name="conv1")(images)
        x = nn.max_pool(
            norm(activation=jax.nn.relu, name="bn1")(x), (3, 3), (2, 2), ((1, 1), (1, 1))
        )
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(WIDTH * 2**stage, stride, norm, conv, name=f"layer{stage + 1}_{block}")(x)
        return nn.Dense(CLASSES, name="fc")(x.mean((1, 2)))


def images(seed, batch=8):
    return np.random.default_rng(seed).normal(0.3, 1, (batch, SIZE, SIZE, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def trained():
    """A ResNet-18 of random weights after 20 steps in train mode, in eval mode."""
    torch.manual_seed(0)
    model = TorchResNet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(20):
        labels = torch.from_numpy(np.random.default_rng(step).integers(0, CLASSES, 8))
        loss = torch.nn.functional.cross_entropy(model(to_torch(images(step))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_torch_resnet_converts_and_folds(trained):
    variables = models.from_torch_model(trained.state_dict())
    expected = jax.eval_shape(ResNet18().init, jax.random.key(0), images(0))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected), (
        "the converted tree is not the model's"
    )

    def reference(x):
        with torch.no_grad():
            return trained(to_torch(x))

    inputs = [images(100), images(101, 3)]
    before = jax.jit(functools.partial(ResNet18().apply, variables))
    converted = fold.certify(reference, before, inputs)
    pairs = fold.find_pairs(lambda v, x: ResNet18().apply(v, x), variables, images(0))
    assert len(pairs) == 20
    folded_variables = fold.fold_variables(variables, pairs)
    assert set(folded_variables) == {"params"}
    assert not any(
        "bn" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(folded_variables)
    )
    after = ResNet18(norm=fold.FoldedNorm, use_bias=True)
    folded = fold.certify(reference, functools.partial(after.apply, folded_variables), inputs)
    print(f"converted: {converted}\nfolded: {folded}")
    converted.require(1e-4)
    folded.require(1e-4)
    assert converted.max_output > 0.1, "the logits say nothing"


def test_other_modules_and_clashing_paths_are_errors(trained):
    embedding = {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"'norm' holds .*with running statistics"):
        models.from_torch_model(embedding)
    with pytest.raises(ValueError, match="one path"):
        models.from_torch_model(trained.state_dict(), lambda prefix: ("layer",))


def test_a_layer_alone_and_layers_in_a_model():
    layers = {
        "norm": (torch.nn.BatchNorm2d(4), nn.BatchNorm(use_running_average=True)),
        "conv": (
            torch.nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.Conv(6, (3, 3), use_bias=False, padding=1),
        ),
        "transposed": (
            torch.nn.ConvTranspose2d(4, 6, 3, stride=2),
            nn.ConvTranspose(6, (3, 3), (2, 2), padding="VALID", transpose_kernel=True),
        ),
        "group": (torch.nn.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5)),
    }
    x = images(0, 2)[:, :6, :5]
    x = np.concatenate([x, x[..., :1]], -1)
    for name, (source, target) in layers.items():
        with torch.no_grad():
            for value in source.state_dict().values():
                if value.dtype.is_floating_point:
                    value.uniform_(0.1, 1)
            expected = np.asarray(source.eval()(to_torch(x))).transpose(0, 2, 3, 1)
        for model in (source, source.state_dict()):
            if name == "group" and model is not source:
                with pytest.raises(ValueError, match="with running statistics"):
                    models.from_torch_model(model)
                continue
            variables = models.from_torch_model(model)
            np.testing.assert_allclose(target.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_without_bias_is_told_by_the_model():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match=r"'0' holds a matrix without bias.*pass the model itself"):
        models.from_torch_model(model.state_dict())
    params = models.from_torch_model(model)["params"]
    tokens = np.array([[1, 2], [3, 9]])
    y = nn.Embed(10, 4).apply({"params": params["0"]}, tokens)
    y = nn.Dense(2, use_bias=False).apply({"params": params["1"]}, y)
    with torch.no_grad():
        np.testing.assert_allclose(y, model(torch.from_numpy(tokens)), rtol=1e-5, atol=1e-6)


class Flattening(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", name="0")(x)
        return nn.Dense(5, name="2")(x.reshape(len(x), -1))


def test_a_dense_layer_that_reads_a_flattened_image():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 3, 5)
    )
    x = images(0, 2)[:, :6, :5]
    with pytest.raises(ValueError, match="'2' reads 48 features, the layer before makes 4"):
        models.from_torch_model(model.state_dict())
    for source in (model, model.state_dict()):
        variables = models.from_torch_model(source, flattened={"2": (4, 4, 3)})
        with torch.no_grad():
            expected = model(to_torch(x))
        np.testing.assert_allclose(Flattening().apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    unchanged = models.from_torch_model(model, flattened={"2": None})["params"]["2"]["kernel"]
    np.testing.assert_array_equal(unchanged, model[2].weight.detach().numpy().T)
    with pytest.raises(ValueError, match=r"is \(4, 4, 4\), 64 values, expected the 48"):
        models.from_torch_model(model, flattened={"2": (4, 4, 4)})
    with pytest.raises(ValueError, match=r"flattened names \['0'\]"):
        models.from_torch_model(model, flattened={"0": (4, 4, 3)})


class FlattenedNorm(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", name="0")(x)
        x = self.norm(name="2")(x.reshape(len(x), -1))
        return nn.Dense(5, name="3")(x)


NORMS = {
    "BatchNorm1d": functools.partial(nn.BatchNorm, use_running_average=True),
    "LayerNorm": functools.partial(nn.LayerNorm, epsilon=1e-5),
    "RMSNorm": nn.RMSNorm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_reads_a_flattened_image(name):
    norm = getattr(torch.nn, name)(48)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), norm, torch.nn.Linear(48, 5)
    ).eval()
    with torch.no_grad():
        for value in norm.state_dict().values():
            if value.dtype.is_floating_point:
                value.uniform_(0.1, 1)
    if name == "RMSNorm":
        norm.eps = 1e-6
    x = images(0, 2)[:, :6, :5]
    shape = (4, 4, 3)
    of_dict = [model.state_dict()] if name == "BatchNorm1d" else []
    for source in (model, *of_dict):
        for flattened in (None, {"3": shape}):
            with pytest.raises(ValueError, match="'2' reads 48 features, the layer before makes 4"):
                models.from_torch_model(source, flattened=flattened)
        with pytest.raises(ValueError, match="'3' reads 48 features, the layer before makes 4"):
            models.from_torch_model(source, flattened={"2": shape})
        variables = models.from_torch_model(source, flattened={"2": shape, "3": list(shape)})
        found = FlattenedNorm(NORMS[name]).apply(variables, x)
        with torch.no_grad():
            np.testing.assert_allclose(found, model(to_torch(x)), rtol=1e-4, atol=1e-5)
    params = models.from_torch_model(model, flattened={"2": None})["params"]
    np.testing.assert_array_equal(params["2"]["scale"], norm.weight.detach().numpy())
    np.testing.assert_array_equal(params["3"]["kernel"], model[3].weight.detach().numpy().T)


def test_norms_of_concatenated_images_are_not_taken_for_flattened_ones():
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 4, 1)]
    before_a_convolution = torch.nn.Sequential(*layers)
    models.from_torch_model(before_a_convolution)
    models.from_torch_model(before_a_convolution.state_dict())
    models.from_torch_model(torch.nn.Sequential(*layers[:2]))
    # A densenet ends like this; that it concatenates shows before.
    last = [torch.nn.BatchNorm2d(20), torch.nn.Flatten(), torch.nn.Linear(20, 2)]
    models.from_torch_model(torch.nn.Sequential(*layers, *last).state_dict())
    # Here the convolution does not read what the norm makes.
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm1d(16), torch.nn.ConvTranspose2d(4, 4, 3)]
    with pytest.raises(ValueError, match="'1' reads 16 features"):
        models.from_torch_model(torch.nn.Sequential(*layers))
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(16, 4), torch.nn.Conv2d(16, 4, 1)]
    with pytest.raises(ValueError, match="'1' reads 16 features"):
        models.from_torch_model(torch.nn.Sequential(*layers))
    group = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 16))
    with pytest.raises(ValueError, match="'1' reads 16 features"):
        models.from_torch_model(group)
    with pytest.raises(ValueError, match="whose groups would be others"):
        models.from_torch_model(group, flattened={"1": (4, 2, 2)})


def test_a_layer_norm_over_a_whole_image():
    norm = torch.nn.LayerNorm([3, 4, 5])
    with torch.no_grad():
        norm.weight.uniform_(0.1, 1)
        norm.bias.uniform_(-1, 1)
    model = torch.nn.Sequential(norm)
    with pytest.raises(
        ValueError, match=r"layer norm over \(3, 4, 5\): if the channels stand first"
    ):
        models.from_torch_model(model)
    with pytest.raises(ValueError, match=r"is \(3, 20\), 60 values, expected the 60"):
        models.from_torch_model(model, flattened={"0": (3, 20)})
    variables = models.from_torch_model(model, flattened={"0": (3, 4, 5)})["params"]["0"]
    axes = (1, 2, 3)
    target = nn.LayerNorm(reduction_axes=axes, feature_axes=axes, epsilon=1e-5)
    x = images(0, 2)[:, :4, :5]
    found = np.asarray(target.apply({"params": variables}, x)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(to_torch(x)), rtol=1e-4, atol=1e-5)
    as_it_is = models.from_torch_model(model, flattened={"0": None})["params"]["0"]
    np.testing.assert_array_equal(as_it_is["scale"], norm.weight.detach().numpy())


class Unflattening(nn.Module):
    """A dense layer, perhaps a batch norm, and a convolution of what they make as an image."""

    norm: bool
    convolution: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24, name="0")(x)
        x = nn.BatchNorm(use_running_average=True, name="1")(x) if self.norm else x
        x = nn.relu(x).reshape(len(x), 2, 3, 4)
        return self.convolution(name="4")(x)


UNFLATTENED = {
    "transposed": (
        torch.nn.ConvTranspose2d(4, 3, 3),
        functools.partial(nn.ConvTranspose, 3, (3, 3), padding="VALID", transpose_kernel=True),
    ),
    "plain": (torch.nn.Conv2d(4, 3, 2), functools.partial(nn.Conv, 3, (2, 2), padding="VALID")),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", UNFLATTENED)
def test_a_dense_layer_that_makes_a_flattened_image(kind, norm):
    convolution, target = UNFLATTENED[kind]
    layers = [
        torch.nn.Linear(5, 24),
        torch.nn.BatchNorm1d(24) if norm else torch.nn.Identity(),
        torch.nn.ReLU(),
        torch.nn.Unflatten(1, (4, 2, 3)),
        convolution,
    ]
    model = torch.nn.Sequential(*layers).eval()
    if norm:
        with torch.no_grad():
            for value in (*model[1].parameters(), *list(model[1].buffers())[:2]):
                value.uniform_(0.1, 1)
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy().transpose(0, 2, 3, 1)
    shape = {"4": (4, 2, 3)}
    for source, flattened in ((model, None), (model, shape), (model.state_dict(), shape)):
        variables = models.from_torch_model(source, flattened=flattened)
        found = Unflattening(norm, target).apply(variables, x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    as_it_is = models.from_torch_model(model, flattened={"4": None})["params"]["0"]
    np.testing.assert_array_equal(as_it_is["kernel"], model[0].weight.detach().numpy().T)
    np.testing.assert_array_equal(as_it_is["bias"], model[0].bias.detach().numpy())
    with pytest.raises(ValueError, match=r"is \(4, 2, 2\), expected the 24 values that the dense"):
        models.from_torch_model(model, flattened={"4": (4, 2, 2)})
    if kind == "transposed":  # where only a state_dict says so, or a reshape in `forward`
        with pytest.raises(ValueError, match="'4' reads 4 channels, the dense layer before makes"):
            models.from_torch_model(model.state_dict())


def test_dense_layers_before_a_layer_that_does_not_read_them():
    linear, conv = torch.nn.Linear, torch.nn.Conv2d
    gate = [conv(3, 8, 3), linear(8, 2), linear(2, 8), torch.nn.ConvTranspose2d(4, 4, 3)]
    models.from_torch_model(torch.nn.Sequential(*gate))
    scale_and_shift = [conv(3, 4, 3), linear(5, 8), conv(4, 4, 3)]
    models.from_torch_model(torch.nn.Sequential(*scale_and_shift))
    flat = [linear(5, 8), torch.nn.BatchNorm1d(48)]  # of which the norm reads a flattened image
    scale = torch.arange(48.0)
    flat[1].weight.data = scale
    params = models.from_torch_model(torch.nn.Sequential(*flat), flattened={"1": (4, 4, 3)})
    moved = scale.numpy().reshape(4, 4, 3).transpose(1, 2, 0).ravel()
    np.testing.assert_array_equal(params["params"]["1"]["scale"], moved)
    image = [linear(5, 24), torch.nn.BatchNorm2d(4), conv(4, 2, 2)]
    for source in (torch.nn.Sequential(*image), torch.nn.Sequential(*image).state_dict()):
        with pytest.raises(ValueError, match="'1' reads 4 channels, the dense layer before makes"):
            models.from_torch_model(source)
        params = models.from_torch_model(source, flattened={"1": (4, 2, 3)})["params"]
        moved = np.asarray(image[0].weight.detach()).reshape(4, 2, 3, 5).transpose(3, 1, 2, 0)
        np.testing.assert_array_equal(params["0"]["kernel"], moved.reshape(5, 24))
    two = torch.nn.Sequential(conv(3, 4, 3), conv(4, 4, 3))
    with pytest.raises(ValueError, match=r"flattened names \['1'\], a convolution, expected a d"):
        models.from_torch_model(two, flattened={"1": (4, 1, 1)})


def test_quantized_layers_are_not_dropped():
    float_model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(float_model, {torch.nn.Linear})
    with pytest.raises(
        TypeError, match=r"'0' is a torch\.ao\..*Linear that holds \['scale', 'zero"
    ):
        models.from_torch_model(model)
    norm = torch.ao.nn.quantized.BatchNorm2d(4)
    with pytest.raises(ValueError, match=r"'' is a batch norm that holds .*'scale'"):
        models.from_torch_model(norm)


def test_what_a_layer_holds_besides_arrays_is_not_dropped():
    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return 3

    with pytest.raises(ValueError, match=r"'0' is a dense layer that holds \['_extra_state'"):
        models.from_torch_model(torch.nn.Sequential(Extra(3, 4)))


def test_reparametrized_convolutions_name_the_way_back():
    prune = importlib.import_module("torch.nn.utils.prune")
    utils, conv = torch.nn.utils, lambda **options: torch.nn.Conv2d(3, 4, 3, **options)
    parametrize = utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: weight_norm is deprecated
        layers = {
            "remove_weight_norm": utils.weight_norm(conv()),
            r"prune\.remove": prune.random_unstructured(conv(), "weight", 0.3),
            "remove_spectral_norm": utils.spectral_norm(conv()),
            "remove_parametrizations": parametrize(conv()),
            r"remove_parametrizations\(": parametrize(conv(bias=False)),
        }
    for message, layer in layers.items():
        model = torch.nn.Sequential(layer)
        with pytest.raises((TypeError, ValueError), match=f"'0.*first call .*{message}"):
            models.from_torch_model(model)
        if "parametrizations" not in message:
            with pytest.raises(ValueError, match=f"'0.*first call .*{message}"):
                models.from_torch_model(model.state_dict())


@pytest.mark.parametrize(
    ("error", "message", "paths"),
    [
        (ValueError, r"leads through 'kernel', an array", {"0": ("a",), "1": ("a", "kernel")}),
        (ValueError, r"\('a',\) has \['bias'\]", {"0": ("a", "bias"), "1": ("a",)}),
        (TypeError, r"path\('0'\) is \['0'\], expected a tuple", {"0": ["0"], "1": ["1"]}),
        (TypeError, r"path\('0'\) is 'conv', expected a tuple", {"0": "conv", "1": "norm"}),
        (TypeError, r"path\('0'\) is \(\['a'\],\)", {"0": (["a"],), "1": ("b",)}),
    ],
)
def test_paths_that_make_no_tree(error, message, paths):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(error, match=message):
        models.from_torch_model(model, paths.__getitem__)


@pytest.mark.parametrize("shape", [16, (4.0, 2, 2), (-4, -2, 2), (), "4", (True, 16)])
def test_shapes_that_are_none(shape):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    error = ValueError if shape in ((-4, -2, 2), ()) else TypeError
    with pytest.raises(error, match=r"flattened\['2'\] is .*expected the shape \(channels, height"):
        models.from_torch_model(model, flattened={"2": shape})


def test_pairs_of_the_model_itself():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, eps=1e-3))
    pair = fold.Pair(("0",), ("1",), -1, 1e-3)
    assert models.torch_pairs(model) == (pair,)
    assert models.torch_pairs(model.state_dict()) == (pair._replace(eps=1e-5),)
    assert models.torch_pairs(model, eps=0.1) == (pair._replace(eps=0.1),)
    with pytest.raises(TypeError, match="path is 3, expected a function"):
        models.torch_pairs(model, 3)


def test_layers_that_cannot_be_converted_are_errors():
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2))
    with pytest.raises(TypeError, match=r"'0' is a torch.nn.*MultiheadAttention that holds"):
        models.from_torch_model(attention)
    with pytest.raises(ValueError, match="groups=2, expected 1"):
        models.from_torch_model(torch.nn.ConvTranspose2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match="InstanceNorm2d that holds"):
        models.from_torch_model(torch.nn.InstanceNorm2d(4, affine=True))
    wrong = torch.nn.Conv2d(3, 4, 1).state_dict()
    wrong["bias"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"bias of shape \(5,\), expected \(4,\)"):
        models.from_torch_model(wrong)


def test_paths_of_any_module_tree():
    assert models.module_path("features.3.conv.0.1") == ("features_3", "conv_0_1")
    assert models.module_path("trunk_output.block1.block1-0.f.a.0")[-1] == "a_0"
    assert models.module_path("") == models.resnet_path("") == ()
    for prefix in ("conv1", "layer1.0.conv1", "layer4.1.downsample.0", "fc"):
        assert models.module_path(prefix) == models.resnet_path(prefix)


def traced_pairs(model):
    """(convolution, norm) wherever a norm alone reads a convolution, by torch's own tracer."""
    modules, nodes = dict(model.named_modules()), torch.fx.symbolic_trace(model).graph.nodes
    kind = lambda node: type(modules.get(node.target)) if node.op == "call_module" else None
    return {
        (node.args[0].target, node.target)
        for node in nodes
        if kind(node) is torch.nn.BatchNorm2d
        and kind(node.args[0]) is torch.nn.Conv2d
        and len(node.args[0].users) == 1
    }


FAMILIES = {
    "resnet18": {},
    "resnext50_32x4d": {},
    "regnet_y_400mf": {},
    "DenseNet": {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16},
    "mobilenet_v2": {"width_mult": 0.35},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
}


def folded_in_torch(model, folded, pairs):
    """The torch model with the folded kernels, and its norms taken out."""
    for pair in pairs:
        layer, norm = (model.get_submodule(".".join(path)) for path in (pair.layer, pair.norm))
        values = folded["params"]
        for key in pair.layer:
            values = values[key]
        kernel, bias = (torch.from_numpy(np.array(values[name])) for name in ("kernel", "bias"))
        with torch.no_grad():
            layer.weight.copy_(kernel.permute(3, 2, 0, 1))
            layer.bias = torch.nn.Parameter(bias)
        parent, _, name = ".".join(pair.norm).rpartition(".")
        assert norm is getattr(model.get_submodule(parent), name)
        setattr(model.get_submodule(parent), name, torch.nn.Identity())
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_families_convert_and_fold_by_name(name):
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=3, **FAMILIES[name]).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-3
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    split = lambda prefix: tuple(prefix.split("."))
    pairs = models.torch_pairs(model.state_dict(), split, eps=1e-3)
    assert {(".".join(p.layer), ".".join(p.norm)) for p in pairs} == traced_pairs(model)
    assert len(pairs) > 5
    for source in (model, model.state_dict()):
        variables = models.from_torch_model(source, models.module_path)
        count = sum(v.numel() for k, v in model.state_dict().items() if "num_batches" not in k)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    assert len(models.torch_pairs(model.state_dict(), models.module_path)) == len(pairs)
    folded = fold.fold_variables(models.from_torch_model(model, split), pairs)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        expected = model(x)
        found = folded_in_torch(model, folded, pairs)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnety_002"])
def test_timms_names_where_the_modules_are_the_same(name):
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    model = timm.create_model(name, num_classes=3).eval()
    pairs = models.torch_pairs(model.state_dict(), models.module_path)
    norms = [p for p, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if "densenet" in name:  # whose other norms read a concatenation
        norms = [p for p in norms if p.endswith((".norm0", ".norm2"))]
    assert len(pairs) == len(norms)
    models.from_torch_model(model, models.module_path)
