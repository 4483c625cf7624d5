"""Four networks as their papers have them, in plain flax.linen: somebody else's models, to switch.

The arguments make them smaller; the defaults are the papers', stochastic depth and dropout apart.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

Activation = Callable[[Array], Array]


def conv(features, kernel=3, stride=1, groups=1):
    return nn.Conv(features, (kernel, kernel), stride, feature_group_count=groups, use_bias=False)


class Bottleneck(nn.Module):
    features: int
    stride: int
    activation: Activation

    @nn.compact
    def __call__(self, x, train):
        shortcut = x
        y = self.activation(nn.BatchNorm(not train)(conv(self.features, 1)(x)))
        y = self.activation(nn.BatchNorm(not train)(conv(self.features, 3, self.stride)(y)))
        y = nn.BatchNorm(not train)(conv(4 * self.features, 1)(y))
        if shortcut.shape != y.shape:
            shortcut = nn.BatchNorm(not train)(conv(4 * self.features, 1, self.stride)(x))
        return self.activation(y + shortcut)


class ResNet50(nn.Module):
    """He et al. 2016, with the stride in the 3 x 3 convolution."""

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    activation: Activation = nn.relu

    @nn.compact
    def __call__(self, x, train):
        x = self.activation(nn.BatchNorm(not train)(conv(self.width, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride, self.activation)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class MBConv(nn.Module):
    expand: int
    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        inner, y = self.expand * x.shape[-1], x
        if self.expand > 1:
            y = nn.silu(nn.BatchNorm(not train)(conv(inner, 1)(y)))
        y = nn.silu(nn.BatchNorm(not train)(conv(inner, self.kernel, self.stride, inner)(y)))
        squeezed = y.mean((1, 2), keepdims=True)
        squeezed = nn.silu(nn.Conv(max(1, x.shape[-1] // 4), (1, 1))(squeezed))
        y = y * nn.sigmoid(nn.Conv(inner, (1, 1))(squeezed))
        y = nn.BatchNorm(not train)(conv(self.features, 1)(y))
        return x + y if x.shape == y.shape else y


# expansion, features, repeats, stride, kernel: table 1 of the paper
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetB0(nn.Module):
    """Tan & Le 2019; `narrower` divides all widths."""

    stages: Sequence[tuple[int, ...]] = STAGES
    narrower: int = 1
    classes: int = 1000

    @nn.compact
    def __call__(self, x, train):
        x = nn.silu(nn.BatchNorm(not train)(conv(32 // self.narrower, 3, 2)(x)))
        for expand, features, repeats, stride, kernel in self.stages:
            for repeat in range(repeats):
                block = MBConv(
                    expand, features // self.narrower, kernel, stride if repeat == 0 else 1
                )
                x = block(x, train)
        x = nn.silu(nn.BatchNorm(not train)(conv(1280 // self.narrower, 1)(x)))
        return nn.Dense(self.classes)(x.mean((1, 2)))


class DenseNet121(nn.Module):
    """Huang et al. 2017, with bottlenecks and a compression of one half."""

    blocks: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    classes: int = 1000
    activation: Activation = nn.relu

    @nn.compact
    def __call__(self, x, train):
        x = self.activation(nn.BatchNorm(not train)(conv(2 * self.growth, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, layers in enumerate(self.blocks):
            if stage > 0:
                x = conv(x.shape[-1] // 2, 1)(self.activation(nn.BatchNorm(not train)(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(layers):
                y = conv(4 * self.growth, 1)(self.activation(nn.BatchNorm(not train)(x)))
                y = conv(self.growth)(self.activation(nn.BatchNorm(not train)(y)))
                x = jnp.concatenate([x, y], -1)
        x = self.activation(nn.BatchNorm(not train)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


class Twice(nn.Module):
    features: int
    activation: Activation

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = self.activation(nn.BatchNorm(not train)(conv(self.features)(x)))
        return x


class UNet(nn.Module):
    """Ronneberger et al. 2015, padded, with batch norm after each 3 x 3 convolution."""

    levels: int = 4
    width: int = 64
    classes: int = 2
    activation: Activation = nn.relu

    @nn.compact
    def __call__(self, x, train):
        twice = functools.partial(Twice, activation=self.activation)
        skipped = []
        for level in range(self.levels):
            skipped.append(twice(self.width * 2**level)(x, train))
            x = nn.max_pool(skipped[-1], (2, 2), (2, 2))
        x = twice(self.width * 2**self.levels)(x, train)
        for level in reversed(range(self.levels)):
            x = nn.ConvTranspose(self.width * 2**level, (2, 2), (2, 2))(x)
            x = twice(self.width * 2**level)(jnp.concatenate([skipped[level], x], -1), train)
        return nn.Conv(self.classes, (1, 1))(x)


def small() -> dict[str, nn.Module]:
    """The four at their full depth, narrow enough for a CPU, and smooth: see switch.py."""
    return {
        "ResNet-50": ResNet50(width=8, classes=10, activation=nn.silu),
        "EfficientNet-B0": EfficientNetB0(narrower=4, classes=10),
        "U-Net": UNet(width=8, activation=nn.silu),
        "DenseNet-121": DenseNet121(growth=8, classes=10, activation=nn.silu),
    }


def tiny() -> dict[str, nn.Module]:
    """As `small`, with a block or two per stage: what compiles in seconds."""
    return {
        "ResNet-50": ResNet50((1, 2), width=8, classes=10, activation=nn.silu),
        "EfficientNet-B0": EfficientNetB0(STAGES[:3], narrower=4, classes=10),
        "U-Net": UNet(levels=2, width=8, activation=nn.silu),
        "DenseNet-121": DenseNet121((2, 2), growth=8, classes=10, activation=nn.silu),
    }
