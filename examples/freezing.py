"""Fine-tune a trained network on dim digits: which parts of batch norm may change?

python examples/freezing.py      accuracy on dim digits, before and after four ways to fine-tune

The network is trained on bright digits. Then 200 dim, grey ones adapt it. The masks of `jbn.policy`
choose gamma and beta for optax; `use_running_average` chooses the statistics.
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen
from jbn.policy import norm_mask, not_

SPLIT, FEW = 1400, 200


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (64, 64):
            x = nn.Dense(features, use_bias=False)(x)
            norm = jbn.linen.BatchNorm(not train, momentum=0.9, activation=nn.relu)
            x = norm(x)
        return nn.Dense(10)(x)


def fit(variables, optimizer, images, labels, steps, name, *, frozen_statistics=False):
    """Train on batches of 64. frozen_statistics: normalize by the running ones, and keep them."""
    rng, opt_state = np.random.default_rng(0), optimizer.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, x, label):
        def loss(params):
            logits, new = Network().apply(
                {**variables, "params": params}, x, not frozen_statistics, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **new, "params": params}, opt_state

    for _ in (bar := tqdm(range(steps), desc=f"{name}, compiling")):
        rows = rng.integers(len(labels), size=64)
        variables, opt_state = step(variables, opt_state, images[rows], labels[rows])
        bar.set_description(name, refresh=False)
    return variables


def only(chosen, rate):
    """SGD that leaves alone whatever `chosen`, a function of the parameters to a mask, declines."""
    others = lambda params: not_(chosen(params))
    sgd = optax.sgd(rate, momentum=0.9)
    return optax.chain(sgd, optax.masked(optax.set_to_zero(), others))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    dim = 0.2 * images + 0.4

    def accuracy(variables):
        logits = Network().apply(variables, dim[SPLIT:], False)
        return float((logits.argmax(-1) == labels[SPLIT:]).mean())

    start = Network().init(jax.random.key(0), images[:2], True)
    trained = fit(
        start, optax.sgd(0.1, momentum=0.9), images[:SPLIT], labels[:SPLIT], steps, "train"
    )
    results = {"not at all": accuracy(trained)}
    few = dim[:FEW], labels[:FEW], steps
    norms, everything = norm_mask, lambda params: jax.tree.map(lambda _: True, params)
    without_norms = lambda params: not_(norm_mask(params))
    for name, chosen, frozen in (
        ("gamma and beta alone", norms, True),
        ("gamma, beta, statistics", norms, False),
        ("all but gamma and beta", without_norms, False),
        ("everything", everything, False),
    ):
        tuned = fit(trained, only(chosen, 0.03), *few, name, frozen_statistics=frozen)
        results[name] = accuracy(tuned)
    for name, value in results.items():
        print(f"fine-tuned {name:24} test accuracy on dim digits {value:.4f}")


if __name__ == "__main__":
    main()
