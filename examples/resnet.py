"""ResNet-50 whose batch norms add the residual and apply ReLU, and its training step."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jbn.linen


class FlaxNorm(nn.Module):
    """flax.linen.BatchNorm with the signature of jbn.linen.BatchNorm, to compare the two in one model."""

    use_running_average: bool
    momentum: float = 0.99
    dtype: Any = None
    scale_init: Callable = nn.initializers.ones
    activation: Callable | None = None

    @nn.compact
    def __call__(self, x, residual=None):
        y = nn.BatchNorm(self.use_running_average, momentum=self.momentum, dtype=self.dtype, scale_init=self.scale_init)(x)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


class Bottleneck(nn.Module):
    filters: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x):
        y = self.norm(activation=jax.nn.relu)(self.conv(self.filters, (1, 1))(x))
        y = self.norm(activation=jax.nn.relu)(self.conv(self.filters, (3, 3), strides=self.stride)(y))
        y = self.conv(4 * self.filters, (1, 1))(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.filters, (1, 1), strides=self.stride)(x))
        # The last scale of a block starts at zero, so that the block starts as the identity (Goyal et al. 2017).
        return self.norm(activation=jax.nn.relu, scale_init=nn.initializers.zeros)(y, residual=x)


class ResNet(nn.Module):
    """Images [batch, height, width, 3] to float32 logits [batch, classes] (He et al. 2015, stride in the 3x3 convolution)."""

    norm: Callable  # jbn.linen.BatchNorm or FlaxNorm
    classes: int = 1000
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = conv(self.width, (7, 7), strides=2, padding=3)(images.astype(self.dtype))
        x = norm(activation=jax.nn.relu)(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride, conv, norm)(x)
        return nn.Dense(self.classes, dtype=jnp.float32)(x.mean((1, 2)).astype(jnp.float32))


def setup(args, classes, batch_size, total):
    """The model, the optimizer (a twentieth of the steps to warm up), and the function of a key that makes the first state."""
    norm = {"jbn": jbn.linen.BatchNorm, "flax": FlaxNorm}[args.norm]
    model = ResNet(norm, classes, tuple(args.blocks), args.width)
    peak = args.learning_rate * batch_size / 256  # Goyal et al. 2017
    schedule = optax.warmup_cosine_decay_schedule(0, peak, total // 20, total)
    decay = optax.add_decayed_weights(1e-4, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    optimizer = optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
    return model, optimizer, functools.partial(first_state, model, optimizer, args.image_size)


def first_state(model, optimizer, image_size, key):
    """Everything that changes while training, a pytree."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
    return {**variables, "optimizer": optimizer.init(variables["params"]), "step": jnp.zeros((), jnp.int32)}


def train_step(model, optimizer, state, batch):
    """The next state, and the loss with label smoothing 0.1."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(logits, labels).mean(), new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "batch_stats": batch_stats, "optimizer": opt_state, "step": state["step"] + 1}, loss


def count_correct(model, state, batch):
    """How many images of the batch are classified right; none with label -1."""
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    return (model.apply(variables, batch["image"], train=False).argmax(-1) == batch["label"]).sum()
