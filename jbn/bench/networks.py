"""The networks whose train steps are compared, and one such step, for any batch norm.

Each model takes images [batch, height, width, 3] to float32 logits [batch, classes]; `norm` is one
of `resnet.norms`. Dropout and stochastic depth are left out: they cost both sides the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jbn.bench.resnet import CLASSES, ResNet


class InvertedBottleneck(nn.Module):
    """A widening 1x1 convolution, a depthwise one, squeeze-and-excitation, a narrowing 1x1."""

    filters: int
    stride: int
    expansion: int
    kernel: int
    activation: Callable
    squeezed: int  # channels of squeeze-and-excitation; 0: there is none
    norm: Callable
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(self.norm, activation=self.activation)
        width = self.expansion * x.shape[-1]
        y = x if self.expansion == 1 else norm()(conv(width, (1, 1))(x))
        kernel = (self.kernel, self.kernel)
        y = norm()(conv(width, kernel, strides=self.stride, feature_group_count=width)(y))
        if self.squeezed:
            gate = nn.Dense(self.squeezed, dtype=self.dtype)(y.mean((1, 2)))
            gate = nn.Dense(width, dtype=self.dtype)(nn.silu(gate))
            y = y * nn.sigmoid(gate)[:, None, None, :]
        y = conv(self.filters, (1, 1))(y)
        return self.norm()(y, residual=x) if x.shape == y.shape else self.norm()(y)


class MobileNet(nn.Module):
    """A stem, inverted bottlenecks, a 1x1 convolution and a linear layer."""

    norm: Callable
    activation: Callable
    # (expansion, filters, blocks, stride of the first, kernel) of each stage.
    stages: tuple[tuple[int, int, int, int, int], ...]
    excited: bool = False
    classes: int = CLASSES
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = conv(32, (3, 3), strides=2)(images.astype(self.dtype))
        x = norm(activation=self.activation)(x)
        for expansion, filters, blocks, stride, kernel in self.stages:
            for block in range(blocks):
                x = InvertedBottleneck(
                    filters,
                    1 if block else stride,
                    expansion,
                    kernel,
                    self.activation,
                    x.shape[-1] // 4 if self.excited else 0,
                    norm,
                    self.dtype,
                )(x)
        x = norm(activation=self.activation)(conv(1280, (1, 1))(x))
        return nn.Dense(self.classes, dtype=jnp.float32)(x.mean((1, 2)).astype(jnp.float32))


# Sandler et al. 2018, table 2.
_MOBILENET_V2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
# Tan & Le 2019, table 1.
_EFFICIENTNET_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

# By the name on the command line: the name in the tables, and the model as a function of the norm.
NETWORKS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "resnet50": ("ResNet-50", ResNet),
    "mobilenet_v2": (
        "MobileNetV2",
        functools.partial(MobileNet, activation=nn.relu6, stages=_MOBILENET_V2),
    ),
    "efficientnet_b0": (
        "EfficientNet-B0",
        functools.partial(MobileNet, activation=nn.silu, stages=_EFFICIENTNET_B0, excited=True),
    ),
}


def training(
    norm: Callable, network: str = "resnet50", **options: Any
) -> tuple[Callable, Callable]:
    """(init(key, images) -> train state, step(train state, images, labels) -> (train state, loss)),
    not jitted.

    SGD with Nesterov momentum and weight decay, as the reference recipe for ImageNet.
    """
    model = NETWORKS[network][1](norm, **options)
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)
    )

    def init(key, images):
        variables = model.init(key, images, train=True)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(state, images, labels):
        params, stats, moments = state

        def loss_of(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new[
                "batch_stats"
            ]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), loss

    return init, step
