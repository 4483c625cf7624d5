"""Dynamic loss scaling and a batch with an infinity: `skip_nonfinite` saves the statistics.

Loss scaling skips the update of the parameters where the gradients are not finite, and halves the
scale. It does not protect the running statistics: one infinity stays in an average for ever.
`skip_nonfinite=True` refuses that batch.

python examples/loss_scaling.py      bfloat16; batch 100 of 300 holds an infinity; with and without
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen

BATCH, SPLIT = 64, 1200
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class Network(nn.Module):
    skip_nonfinite: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(64, use_bias=False, dtype=jnp.bfloat16)(x)
        norm = jbn.linen.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            activation=nn.relu,
            skip_nonfinite=self.skip_nonfinite,
        )
        return nn.Dense(10, dtype=jnp.bfloat16)(norm(x)).astype(jnp.float32)


def train_step(model, run, x, labels):
    """(run, loss); run: variables, opt_state, scale, and how many steps in a row were good."""
    variables, opt_state, scale, good = run

    def scaled_loss(params):
        logits, new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss * scale, (loss, new)

    gradients, (loss, new) = jax.grad(scaled_loss, has_aux=True)(variables["params"])
    gradients = jax.tree.map(lambda d: d / scale, gradients)
    finite = jnp.isfinite(optax.global_norm(gradients))
    updates, new_opt_state = OPTIMIZER.update(gradients, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    good = jnp.where(finite, good + 1, 0)
    scale = jnp.where(finite, jnp.where(good % 50 == 0, scale * 2, scale), scale / 2)
    # The statistics are kept whether or not the gradients were finite: refusing a bad batch is the
    # layer's own business.
    variables = {"params": keep(params, variables["params"]), **new}
    return (variables, keep(new_opt_state, opt_state), scale, good), loss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    for skip_nonfinite in (False, True):
        model = Network(skip_nonfinite)
        variables = model.init(jax.random.key(0), images[:BATCH], train=True)
        run = variables, OPTIMIZER.init(variables["params"]), jnp.float32(2**12), jnp.int32(0)
        step_of = jax.jit(lambda run, x, labels, model=model: train_step(model, run, x, labels))
        rng = np.random.default_rng(1)
        name = f"skip_nonfinite={skip_nonfinite!s:5}"
        for step in (bar := tqdm(range(steps), desc=f"{name}, compiling")):
            rows = rng.integers(0, SPLIT, BATCH)
            x = images[rows]
            if step == steps // 3:
                x[0, 0] = np.inf
            run, _ = step_of(run, x, labels[rows])
            bar.set_description(name, refresh=False)
        variables, _, scale, _ = run
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables["batch_stats"]))
        accuracy = float(
            (
                model.apply(variables, images[SPLIT:], train=False).argmax(-1) == labels[SPLIT:]
            ).mean()
        )
        statistics = f"{name} statistics finite: {finite!s:5} loss scale {float(scale):6.0f}"
        print(f"{statistics}   test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
