"""Train a small residual network on scikit-learn's handwritten digits, and show what batch normalization buys.

    python examples/digits.py                    four runs: with and without, at the learning rate and at ten times it
    python examples/digits.py --norm flax        one run, with flax's BatchNorm in the same places
"""

import argparse
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen

LEARNING_RATE, BATCH = 0.02, 128


class Norm(nn.Module):
    """activation(norm(x) + residual): fused in jbn, spelled out for flax, a learned affine map without normalization."""

    kind: str
    train: bool

    @nn.compact
    def __call__(self, x, residual=None):
        if self.kind == "jbn":
            norm = jbn.linen.BatchNorm(use_running_average=not self.train, momentum=0.9, activation=nn.relu)
            return norm(x, residual=residual)
        if self.kind == "flax":
            x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)
        else:
            features = x.shape[-1:]
            x = x * self.param("scale", nn.initializers.ones, features) + self.param("bias", nn.initializers.zeros, features)
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


def load(seed):
    """1797 real images [N, 8, 8, 1] scaled to [0, 1], 80 % of them for training."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, labels = digits.images[order, ..., None].astype(np.float32) / 16, digits.target[order]
    split = int(0.8 * len(labels))
    return (images[:split], labels[:split]), (images[split:], labels[split:])


def train(kind, learning_rate, steps, seed):
    """Train once; returns the loss of every step and the test accuracy in eval mode."""
    (images, labels), (test_images, test_labels) = load(seed)
    network = Network(kind)
    variables = network.init(jax.random.key(seed), images[:2], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    optimizer = optax.sgd(optax.cosine_decay_schedule(learning_rate, steps), momentum=0.9)

    def loss_fn(params, stats, x, label):
        logits, updated = network.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), updated.get("batch_stats", {})

    @jax.jit
    def step(params, stats, opt_state, x, label):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x, label)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    @jax.jit
    def predict(params, stats, x):
        return network.apply({"params": params, "batch_stats": stats}, x, train=False).argmax(-1)

    opt_state = optimizer.init(params)
    rng, losses = np.random.default_rng(seed), []
    for _ in tqdm(range(steps), desc=f"{kind:5s} at learning rate {learning_rate:g}"):
        batch = rng.integers(len(labels), size=BATCH)
        params, stats, opt_state, loss = step(params, stats, opt_state, images[batch], labels[batch])
        losses.append(float(loss))
    return np.array(losses), float((predict(params, stats, jnp.asarray(test_images)) == test_labels).mean())


def draw(runs, path):
    """Smoothed training curves; a run whose loss is not finite ends where it diverged."""
    fig, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for (kind, rate), (losses, accuracy) in runs.items():
        smooth = np.convolve(losses, np.ones(10) / 10, mode="valid") if len(losses) >= 10 else losses
        name = "without normalization" if kind == "none" else f"with {kind} batch norm"
        style = {"color": "tab:red" if kind == "none" else "tab:blue", "linestyle": "-" if rate == LEARNING_RATE else "--"}
        axes.plot(smooth, label=f"{name}, learning rate {rate:g}: test accuracy {accuracy:.3f}", **style)
    axes.set(xlabel="step", ylabel="training loss (nats, mean of 10 steps)", yscale="log")
    axes.set_title("Handwritten digits: batch norm trains faster, and at ten times the learning rate")
    axes.legend(loc="upper right", fontsize="small")
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("jbn", "flax", "none"), help="one run with this norm instead of the comparison")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="where the picture goes")
    args = parser.parse_args()
    plan = [(args.norm, LEARNING_RATE)] if args.norm else [(k, r * LEARNING_RATE) for r in (1, 10) for k in ("jbn", "none")]
    runs = {(kind, rate): train(kind, rate, args.steps, args.seed) for kind, rate in plan}
    for (kind, rate), (losses, accuracy) in runs.items():
        print(f"{kind:5s} learning rate {rate:<5g} last loss {losses[-1]:8.4f}  test accuracy {accuracy:.4f}")
    draw(runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
