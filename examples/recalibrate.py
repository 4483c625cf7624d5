"""Average the weights of a digits model over training, and recalibrate its batch norms for them.

python examples/recalibrate.py      test accuracy of the average, with old statistics and with new
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
from jbn.recalibrate import recalibrate_linen

BATCH, SPLIT = 64, 1200


class Network(nn.Module):
    """Two normalized convolutions and a normalized dense layer over 8x8 images."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            jbn.linen.BatchNorm, use_running_average=not train, momentum=0.9, activation=nn.relu
        )
        x = norm()(nn.Conv(8, (3, 3), use_bias=False)(x))
        x = norm()(nn.Conv(16, (3, 3), strides=2, use_bias=False)(x))
        x = norm()(nn.Dense(32, use_bias=False)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def train(images, labels, key, *, steps):
    """Train with stochastic weight averaging.

    Returns:
        The variables after the last step, and the parameters averaged over the second half.
    """
    variables = Network().init(key, images[:BATCH], train=True)
    # The rate is high: the weights wander about the optimum, and their average is nearer to it.
    optimizer = optax.sgd(0.3, momentum=0.9)

    @jax.jit
    def step(carry, index):
        variables, average, opt_state = carry
        rows = jax.random.randint(jax.random.fold_in(key, index), (BATCH,), 0, len(images))
        batch, targets = jnp.asarray(images)[rows], jnp.asarray(labels)[rows]

        def loss(params):
            logits, new = Network().apply(
                {**variables, "params": params}, batch, True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        # The weight is 1 until the second half, so the average starts afresh there.
        weight = 1 / (1 + jnp.maximum(index - steps // 2, 0))
        average = jax.tree.map(lambda a, p: a + weight * (p - a), average, params)
        return {"params": params, **new}, average, opt_state

    carry = variables, variables["params"], optimizer.init(variables["params"])
    for index in (bar := tqdm(range(steps), desc="compiling")):
        carry = step(carry, jnp.int32(index))
        bar.set_description("training", refresh=False)
    variables, average, _ = carry
    return variables, average


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).reshape(-1, 8, 8, 1).astype(np.float32), labels[order]

    last, average = train(images[:SPLIT], labels[:SPLIT], jax.random.key(0), steps=arguments.steps)
    averaged = {"params": average, "batch_stats": last["batch_stats"]}
    # The last batch is shorter, and counts as such.
    batches = [images[start : min(start + BATCH, SPLIT)] for start in range(0, SPLIT, BATCH)]
    apply = lambda variables, batch: Network().apply(variables, batch, train=False)
    recalibrated = recalibrate_linen(apply, averaged, batches, progress=True)

    named = {
        "last weights": last,
        "averaged, old statistics": averaged,
        "averaged, recalibrated": recalibrated,
    }
    for name, variables in named.items():
        correct = apply(variables, images[SPLIT:]).argmax(-1) == labels[SPLIT:]
        print(f"{name:26} test accuracy {float(correct.mean()):.4f}")


if __name__ == "__main__":
    main()
