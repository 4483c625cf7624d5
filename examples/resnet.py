"""The training of ResNet-50 after Goyal et al. 2017: its state, its step, and its right answers.

The network is that of the benchmark, jbn.bench.resnet: its batch norms add the residual and apply
ReLU.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jbn.linen
from jbn.bench.resnet import BatchNorm, ResNet


def setup(args, classes, batch_size, total):
    """Three functions, not jitted: the first state of a key, `train_step` and `count_correct`."""
    norm = {"jbn": jbn.linen.BatchNorm, "flax": BatchNorm}[args.norm]
    model = ResNet(norm, classes, tuple(args.blocks), args.width)
    peak = args.learning_rate * batch_size / 256
    schedule = optax.warmup_cosine_decay_schedule(0, peak, total // 20, total)
    decay = optax.add_decayed_weights(
        1e-4, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    optimizer = optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
    init = functools.partial(first_state, model, optimizer, args.image_size)
    return (
        init,
        functools.partial(train_step, model, optimizer),
        functools.partial(count_correct, model),
    )


def first_state(model, optimizer, image_size, key):
    """Everything that changes while training, a pytree."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
    return {
        **variables,
        "optimizer": optimizer.init(variables["params"]),
        "step": jnp.zeros((), jnp.int32),
    }


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
    return {
        "params": params,
        "batch_stats": batch_stats,
        "optimizer": opt_state,
        "step": state["step"] + 1,
    }, loss


def count_correct(model, state, batch):
    """How many images of the batch are classified right; none with label -1."""
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    return (model.apply(variables, batch["image"], train=False).argmax(-1) == batch["label"]).sum()
