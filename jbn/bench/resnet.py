"""ResNet-50 for any batch norm, and the norms to compare.

He et al. 2015, with the stride in the 3x3 convolution.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jbn import linen

CLASSES = 1000


class BatchNorm(nn.BatchNorm):
    """flax's with the signature of jbn's: residual and activation follow the norm."""

    activation: Callable | None = None

    def __call__(self, x, *, residual=None):
        y = super().__call__(x) if residual is None else super().__call__(x) + residual
        return y if self.activation is None else self.activation(y)


class Bottleneck(nn.Module):
    filters: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x):
        relu = nn.relu
        y = self.norm(activation=relu)(self.conv(self.filters, (1, 1))(x))
        y = self.norm(activation=relu)(self.conv(self.filters, (3, 3), strides=self.stride)(y))
        y = self.conv(4 * self.filters, (1, 1))(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.filters, (1, 1), strides=self.stride)(x))
        # The last scale of a block starts at zero, so that the block starts as the identity (Goyal
        # et al. 2017).
        return self.norm(activation=relu, scale_init=nn.initializers.zeros)(y, residual=x)


class ResNet(nn.Module):
    """Images [batch, height, width, 3] to float32 logits [batch, classes]; norm: one of `norms`."""

    norm: Callable
    classes: int = CLASSES
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = conv(self.width, (7, 7), strides=2, padding=3)(images.astype(self.dtype))
        x = nn.max_pool(norm(activation=nn.relu)(x), (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride, conv, norm)(x)
        return nn.Dense(self.classes, dtype=jnp.float32)(x.mean((1, 2)).astype(jnp.float32))


def norms() -> dict[str, Callable]:
    """The batch norms that are compared, the reference first."""
    return {"flax.linen": BatchNorm, "jbn": linen.BatchNorm}
