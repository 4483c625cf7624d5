"""Batch size 4 on scikit-learn's digits: batch renormalization beside batch normalization.

python examples/batch_renorm.py              both, three seeds each: test accuracy

At this learning rate, 0.1, batch norm's noise ruins it; at 0.02 both reach 0.98.
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen

BATCH = 4
CHUNK = 250  # steps between two movements of the progress bar


class Network(nn.Module):
    """Two hidden layers, each normalized: a feature has as many values as the batch has examples,
    4."""

    renorm: bool

    @nn.compact
    def __call__(self, x, train, r_max=1.0, d_max=0.0):
        norm = functools.partial(
            jbn.linen.BatchRenorm if self.renorm else jbn.linen.BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            activation=nn.relu,
        )
        limits = {"r_max": r_max, "d_max": d_max} if self.renorm else {}
        for _ in range(2):
            x = norm()(nn.Dense(128, use_bias=False)(x), **limits)
        return nn.Dense(10)(x)


def limits_at(step, steps):
    """A schedule like the paper's: closed for a tenth of the run, then r_max to 3 over a third and
    d_max to 5 over a fifth."""
    open_ = step - 0.1 * steps
    return 1 + 2 * jnp.clip(open_ / (0.33 * steps), 0, 1), 5 * jnp.clip(open_ / (0.2 * steps), 0, 1)


def make_training(images, labels, renorm, steps):
    """(init, train): init(key) gives the first carry, train(carry, key, indices) the one after the
    steps of these indices, all in one scan."""
    model = Network(renorm)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)

    def init(key):
        variables = model.init(key, images[:BATCH], train=True)
        return variables, optimizer.init(variables["params"])

    def step(carry, index, key):
        variables, opt_state = carry
        rows = jax.random.randint(jax.random.fold_in(key, index), (BATCH,), 0, len(images))
        limits = limits_at(index, steps)

        def loss(params):
            given = {**variables, "params": params}
            logits, new = model.apply(given, images[rows], True, *limits, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    @jax.jit
    def train(carry, key, indices):
        return jax.lax.scan(lambda carry, i: (step(carry, i, key), None), carry, indices)[0]

    return jax.jit(init), train


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    (images, tests), (labels, truth) = np.split(images, [1200]), np.split(labels, [1200])
    steps, seeds = arguments.steps, arguments.seeds
    images, labels = jnp.asarray(images), jnp.asarray(labels)  # indexed inside jit
    progress = tqdm(total=2 * seeds * steps, desc="compiling", unit="step")
    for renorm in (False, True):
        init, train = make_training(images, labels, renorm, steps)
        name = "batch renorm" if renorm else "batch norm"
        accuracies = []
        for seed in range(seeds):
            key = jax.random.key(seed)
            carry = init(key)
            for start in range(0, steps, CHUNK):
                indices = jnp.arange(start, min(start + CHUNK, steps))
                carry = jax.block_until_ready(train(carry, key, indices))
                progress.set_description(f"{name}, seed {seed}")
                progress.update(len(indices))
            logits = Network(renorm).apply(carry[0], tests, train=False)
            accuracies.append(float((logits.argmax(-1) == truth).mean()))
        each = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        tqdm.write(
            f"{name:12} batch size {BATCH}: test accuracy {np.mean(accuracies):.4f} (seeds: {each})"
        )
    progress.close()


if __name__ == "__main__":
    main()
