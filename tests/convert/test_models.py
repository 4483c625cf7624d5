"""A torch ResNet-18 in linen: the same logits, also with every batch norm folded away."""

import functools
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

WIDTH, CLASSES, SIZE = (
    8,
    10,
    32,
)  # an eighth of the width of ResNet-18: the same 62 modules at a 64th of the work


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
    with pytest.raises(ValueError, match="'norm' holds"):
        models.from_torch_model(embedding)
    with pytest.raises(ValueError, match="one path"):
        models.from_torch_model(trained.state_dict(), lambda prefix: ("layer",))
