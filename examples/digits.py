"""Train a small residual network on handwritten digits, and show what batch normalization buys.

python examples/digits.py                with and without it, at a learning rate and at ten times it
python examples/digits.py --norm flax    one run, with flax's BatchNorm in the same places
"""

import argparse
import functools
import os
import tempfile

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen
from jbn.plot import COLORS

LEARNING_RATE = 0.02


class Norm(nn.Module):
    """relu(norm(x) + residual): fused in jbn, spelled out for flax.

    "none" normalizes nothing, and still learns a scale and a bias for each channel.
    """

    kind: str
    train: bool

    @nn.compact
    def __call__(self, x, residual=None):
        arguments = {"use_running_average": not self.train, "momentum": 0.9}
        if self.kind == "jbn":
            return jbn.linen.BatchNorm(activation=nn.relu, **arguments)(x, residual=residual)
        if self.kind == "flax":
            x = nn.BatchNorm(**arguments)(x)
        else:
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
            x = x * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return nn.relu(x if residual is None else x + residual)


class Network(nn.Module):
    """A stem and three residual blocks; no convolution has a bias, the norm after it has one."""

    kind: str

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = functools.partial(Norm, self.kind, train)
        x = norm()(conv(16)(x))
        for features, stride in ((16, 1), (32, 2), (32, 1)):
            y = norm()(conv(features, strides=stride)(x))
            y = conv(features)(y)
            if stride > 1:
                x = conv(features, kernel_size=(1, 1), strides=stride)(x)
            x = norm()(y, residual=x)
        return nn.Dense(10)(x.mean((1, 2)))


def train(kind, learning_rate, steps, seed):
    """Train on 80 % of the 1797 images [8, 8, 1].

    Returns:
        The loss of every step, and the accuracy on the other images in evaluation mode.
    """
    digits, rng = load_digits(), np.random.default_rng(seed)
    order, split = rng.permutation(len(digits.target)), int(0.8 * len(digits.target))
    images, labels = digits.images[order, ..., None].astype(np.float32) / 16, digits.target[order]
    network = Network(kind)
    stats = network.init(jax.random.key(seed), images[:2], train=False)
    params = stats.pop("params")
    optimizer = optax.sgd(optax.cosine_decay_schedule(learning_rate, steps), momentum=0.9)

    def loss_fn(params, stats, x, label):
        logits, stats = network.apply(
            {"params": params, **stats}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), stats

    @jax.jit
    def step(params, stats, opt_state, x, label):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x, label)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state, losses = optimizer.init(params), []
    name = f"{kind:5s} at learning rate {learning_rate:g}"
    for _ in (bar := tqdm(range(steps), desc=f"{name}, compiling")):
        batch = rng.integers(split, size=128)
        params, stats, opt_state, loss = step(
            params, stats, opt_state, images[batch], labels[batch]
        )
        losses.append(float(loss))
        bar.set_description(name, refresh=False)
    logits = network.apply({"params": params, **stats}, images[split:], train=False)
    return np.array(losses), float((logits.argmax(-1) == labels[split:]).mean())


def draw(runs, path):
    """Training curves; one whose loss is not finite ends where it diverged."""
    fig, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for (kind, rate), (losses, accuracy) in runs.items():
        window = min(10, len(losses))
        name = {"jbn": "batch norm", "flax": "flax's batch norm", "none": "no batch norm"}[kind]
        label = f"{name}, learning rate {rate:g}: test accuracy {accuracy:.3f}"
        color = COLORS[{"jbn": "jbn", "flax": "peer", "none": "without"}[kind]]
        line = "-" if rate == LEARNING_RATE else "--"
        axes.plot(
            np.convolve(losses, np.ones(window) / window, "valid"),
            label=label,
            color=color,
            linestyle=line,
        )
    axes.set(
        xlabel="step",
        ylabel="training loss (nats, mean of 10 steps)",
        yscale="log",
        ylim=(1e-4, 10),
    )
    axes.set_title(
        "Handwritten digits: batch norm trains faster, and at ten times the learning rate"
    )
    fig.legend(loc="outside lower center", ncols=2, fontsize="small")
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one_run = "one run with this norm instead of the comparison"
    parser.add_argument("--norm", choices=("jbn", "flax", "none"), help=one_run)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    in_temporary = os.path.join(tempfile.gettempdir(), "digits.png")
    parser.add_argument("--out", default=in_temporary, help="the picture; default: %(default)s")
    args = parser.parse_args()
    plan = [(kind, rate * LEARNING_RATE) for rate in (1, 10) for kind in ("jbn", "none")]
    plan = [(args.norm, LEARNING_RATE)] if args.norm else plan
    runs = {(kind, rate): train(kind, rate, args.steps, args.seed) for kind, rate in plan}
    for (kind, rate), (losses, accuracy) in runs.items():
        rates = f"{kind:5s} learning rate {rate:<5g}"
        print(f"{rates} last loss {losses[-1]:8.4f}  test accuracy {accuracy:.4f}")
    draw(runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
