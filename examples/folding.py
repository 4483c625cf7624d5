"""Fold the batch norms of a trained digits network into its convolutions: the same answers, faster.

python examples/folding.py       error, answers and time of the network before and after
"""

import argparse
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen
from jbn.fold import FoldedNorm, certify, find_pairs, fold_variables

SPLIT = 1400


class Network(nn.Module):
    """Three convolutions and their norms. Folded, a convolution has a bias and no norm after it."""

    norm: Any = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        folded = self.norm is FoldedNorm
        for features, stride in ((16, 1), (32, 2), (32, 1)):
            x = nn.Conv(features, (3, 3), stride, use_bias=folded)(x)
            x = self.norm(use_running_average=not train, momentum=0.9, activation=nn.relu)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def train(images, labels, steps):
    variables = Network().init(jax.random.key(0), images[:2], train=True)
    optimizer, rng = optax.sgd(0.1, momentum=0.9), np.random.default_rng(0)

    @jax.jit
    def step(variables, opt_state, x, label):
        def loss(params):
            trained = {**variables, "params": params}
            logits, new = Network().apply(trained, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    opt_state = optimizer.init(variables["params"])
    for _ in (bar := tqdm(range(steps), desc="compiling")):
        rows = rng.integers(SPLIT, size=128)
        variables, opt_state = step(variables, opt_state, images[rows], labels[rows])
        bar.set_description("training", refresh=False)
    return variables


def milliseconds(function, x):
    """The median of 50 calls."""
    times = []
    for _ in range(51):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[1:]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1), jnp.asarray(labels)
    variables = train(images, labels, steps)
    pairs = find_pairs(lambda v, x: Network().apply(v, x), variables, images[:2])
    for pair in pairs:
        print(f"{'/'.join(pair.norm)} into {'/'.join(pair.layer)}")
    folded = fold_variables(variables, pairs)
    before = jax.jit(lambda x: Network().apply(variables, x))
    after = jax.jit(lambda x: Network(FoldedNorm).apply(folded, x))
    test = images[SPLIT:]
    certificate = certify(before, after, [test]).require(1e-3)
    print(f"largest difference of {test.shape[0] * 10} outputs: {certificate.max_error:.1e}")
    for name, network in (("with batch norm", before), ("folded", after)):
        accuracy = float((network(test).argmax(-1) == labels[SPLIT:]).mean())
        print(f"{name:16} test accuracy {accuracy:.4f}, {milliseconds(network, test):.2f} ms")


if __name__ == "__main__":
    main()
