"""The four networks of networks_linen.py in plain flax.nnx: somebody else's models, to switch."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from networks_linen import STAGES


def conv(inputs, features, kernel=3, stride=1, groups=1, *, rngs):
    size = (kernel, kernel)
    return nnx.Conv(
        inputs,
        features,
        size,
        stride,
        feature_group_count=groups,
        use_bias=False,
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """A convolution, a batch norm and an activation."""

    def __init__(self, *args, activation=nnx.relu, rngs, **options):
        self.conv = conv(*args, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(self.conv.out_features, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        y = self.norm(self.conv(x))
        return y if self.activation is None else self.activation(y)


class NormConv(nnx.Module):
    """A batch norm, an activation and a convolution."""

    def __init__(self, inputs, features, kernel=3, *, activation, rngs):
        self.norm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv = conv(inputs, features, kernel, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.conv(self.activation(self.norm(x)))


class Bottleneck(nnx.Module):
    def __init__(self, inputs, features, stride, *, activation, rngs):
        self.activation = activation
        self.layers = nnx.List(
            [
                ConvNorm(inputs, features, 1, activation=activation, rngs=rngs),
                ConvNorm(features, features, 3, stride, activation=activation, rngs=rngs),
                ConvNorm(features, 4 * features, 1, activation=None, rngs=rngs),
            ]
        )
        ends = (inputs, 4 * features, 1, stride)
        same = stride == 1 and inputs == 4 * features
        self.shortcut = None if same else ConvNorm(*ends, activation=None, rngs=rngs)

    def __call__(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet50(nnx.Module):
    """He et al. 2016, with the stride in the 3 x 3 convolution."""

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        width=64,
        classes=1000,
        *,
        activation=nnx.relu,
        rngs,
    ):
        options = {"activation": activation, "rngs": rngs}
        self.stem = ConvNorm(3, width, 7, 2, **options)
        self.blocks, inputs = nnx.List([]), width
        for stage, repeats in enumerate(blocks):
            for block in range(repeats):
                stride, features = 2 if stage > 0 and block == 0 else 1, width * 2**stage
                self.blocks.append(Bottleneck(inputs, features, stride, **options))
                inputs = 4 * features
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(self.stem(x), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class MBConv(nnx.Module):
    def __init__(self, inputs, expand, features, kernel, stride, *, rngs):
        inner, squeezed = expand * inputs, max(1, inputs // 4)
        silu = {"activation": nnx.silu, "rngs": rngs}
        self.expand = ConvNorm(inputs, inner, 1, **silu) if expand > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner, **silu)
        self.squeeze = nnx.Conv(inner, squeezed, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(squeezed, inner, (1, 1), rngs=rngs)
        self.project = ConvNorm(inner, features, 1, activation=None, rngs=rngs)

    def __call__(self, x):
        y = self.depthwise(x if self.expand is None else self.expand(x))
        squeezed = nnx.silu(self.squeeze(y.mean((1, 2), keepdims=True)))
        y = self.project(y * nnx.sigmoid(self.excite(squeezed)))
        return x + y if x.shape == y.shape else y


class EfficientNetB0(nnx.Module):
    """Tan & Le 2019; `narrower` divides all widths."""

    def __init__(self, stages=STAGES, narrower=1, classes=1000, *, rngs):
        inputs = 32 // narrower
        self.stem = ConvNorm(3, inputs, 3, 2, activation=nnx.silu, rngs=rngs)
        self.blocks = nnx.List([])
        for expand, features, repeats, stride, kernel in stages:
            for repeat in range(repeats):
                options = (expand, features // narrower, kernel, stride if repeat == 0 else 1)
                self.blocks.append(MBConv(inputs, *options, rngs=rngs))
                inputs = features // narrower
        self.top = ConvNorm(inputs, 1280 // narrower, 1, activation=nnx.silu, rngs=rngs)
        self.head = nnx.Linear(1280 // narrower, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.top(x).mean((1, 2)))


class DenseNet121(nnx.Module):
    """Huang et al. 2017, with bottlenecks and a compression of one half."""

    def __init__(
        self,
        blocks: Sequence[int] = (6, 12, 24, 16),
        growth=32,
        classes=1000,
        *,
        activation=nnx.relu,
        rngs,
    ):
        options = {"activation": activation, "rngs": rngs}
        self.activation, features = activation, 2 * growth
        self.stem = ConvNorm(3, features, 7, 2, **options)
        self.stages = nnx.List([])
        for stage, layers in enumerate(blocks):
            transition = None
            if stage > 0:
                transition = NormConv(features, features // 2, 1, **options)
                features //= 2
            dense = nnx.List([])
            for _ in range(layers):
                inner = NormConv(features, 4 * growth, 1, **options)
                dense.append(nnx.Sequential(inner, NormConv(4 * growth, growth, **options)))
                features += growth
            self.stages.append(nnx.Dict(transition=transition, dense=dense))
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(self.stem(x), (3, 3), (2, 2), "SAME")
        for stage in self.stages:
            if stage["transition"] is not None:
                x = nnx.avg_pool(stage["transition"](x), (2, 2), (2, 2))
            for layer in stage["dense"]:
                x = jnp.concatenate([x, layer(x)], -1)
        return self.head(self.activation(self.norm(x)).mean((1, 2)))


class UNet(nnx.Module):
    """Ronneberger et al. 2015, padded, with batch norm after each 3 x 3 convolution."""

    def __init__(self, levels=4, width=64, classes=2, *, activation=nnx.relu, rngs):
        options = {"activation": activation, "rngs": rngs}
        widths = [width * 2**level for level in range(levels + 1)]
        twice = lambda i, o: nnx.Sequential(ConvNorm(i, o, **options), ConvNorm(o, o, **options))
        self.down = nnx.List([twice(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True)])
        self.up = nnx.List(
            [nnx.ConvTranspose(2 * w, w, (2, 2), (2, 2), rngs=rngs) for w in widths[:-1]]
        )
        self.joined = nnx.List([twice(2 * w, w) for w in widths[:-1]])
        self.head = nnx.Conv(width, classes, (1, 1), rngs=rngs)

    def __call__(self, x):
        skipped = []
        for down in list(self.down)[:-1]:
            skipped.append(down(x))
            x = nnx.max_pool(skipped[-1], (2, 2), (2, 2))
        x = self.down[-1](x)
        for skip, up, joined in reversed(list(zip(skipped, self.up, self.joined, strict=True))):
            x = joined(jnp.concatenate([skip, up(x)], -1))
        return self.head(x)


def small() -> dict[str, nnx.Module]:
    """The four at their full depth, narrow enough for a CPU, and smooth: see switch.py."""
    rngs = nnx.Rngs(0)
    smooth = {"activation": nnx.silu, "rngs": rngs}
    return {
        "ResNet-50": ResNet50(width=8, classes=10, **smooth),
        "EfficientNet-B0": EfficientNetB0(narrower=4, classes=10, rngs=rngs),
        "U-Net": UNet(width=8, **smooth),
        "DenseNet-121": DenseNet121(growth=8, classes=10, **smooth),
    }


def tiny() -> dict[str, nnx.Module]:
    """As `small`, with a block or two per stage: what compiles in seconds."""
    rngs = nnx.Rngs(0)
    smooth = {"activation": nnx.silu, "rngs": rngs}
    return {
        "ResNet-50": ResNet50((1, 2), width=8, classes=10, **smooth),
        "EfficientNet-B0": EfficientNetB0(STAGES[:3], narrower=4, classes=10, rngs=rngs),
        "U-Net": UNet(levels=2, width=8, **smooth),
        "DenseNet-121": DenseNet121((2, 2), growth=8, classes=10, **smooth),
    }
