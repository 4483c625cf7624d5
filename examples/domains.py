"""One network with a batch-norm state for each domain, chosen by its index under jit.

The states of all domains are stacked in one `jbn.State`, whose arrays have one more axis. A step
takes one state out, uses it, and puts the new one back. The index is an array, so one compilation
serves every domain. Statistics per time step are kept in the same way.

python examples/domains.py       digits plain, inverted and dim: accuracy with own and shared states
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn

DOMAINS, HIDDEN, BATCH, SPLIT = 3, 64, 64, 1200


def in_domain(x, domain):
    """The images of each domain: as they are, inverted, dim and grey."""
    return jnp.stack([x, 1 - x, 0.2 * x + 0.4])[domain]


def init(key):
    keys = jax.random.split(key)
    norm, state = jbn.init(HIDDEN)
    draw = lambda key, rows, columns: jax.random.normal(key, (rows, columns)) / rows**0.5
    params = {"in": draw(keys[0], 64, HIDDEN), "norm": norm, "out": draw(keys[1], HIDDEN, 10)}
    return params, jax.tree.map(lambda leaf: jnp.stack([leaf] * DOMAINS), state)


def logits(params, x, state, *, train):
    """(logits, new state) of one domain's batch by one domain's state."""
    x = x @ params["in"]
    if train:
        x, state = jbn.batch_norm_train(
            x, params["norm"], state, momentum=0.9, activation=jax.nn.relu
        )
    else:
        x = jbn.batch_norm_eval(x, params["norm"], state, activation=jax.nn.relu)
    return x @ params["out"], state


# The rate falls, so that the weights settle and the averages catch up with them.
OPTIMIZER = optax.adam(optax.exponential_decay(1e-2, 100, 0.4))


@jax.jit
def train_step(params, bank, opt_state, x, labels, slot):
    """`slot` is a traced integer: gather one state, scatter the new one."""

    def loss(params):
        z, state = logits(params, x, jax.tree.map(lambda leaf: leaf[slot], bank), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean(), state

    gradients, state = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state)
    bank = jax.tree.map(lambda leaves, leaf: leaves.at[slot].set(leaf), bank, state)
    return optax.apply_updates(params, updates), bank, opt_state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    for name, slot_of in (
        ("a state per domain", lambda domain: domain),
        ("one state for all", lambda domain: 0),
    ):
        params, bank = init(jax.random.key(0))
        opt_state = OPTIMIZER.init(params)
        rng = np.random.default_rng(1)
        for step in (bar := tqdm(range(steps), desc=f"{name}, compiling")):
            domain, rows = step % DOMAINS, rng.integers(0, SPLIT, BATCH)
            x = in_domain(images[rows], domain)
            params, bank, opt_state = train_step(
                params, bank, opt_state, x, labels[rows], jnp.int32(slot_of(domain))
            )
            bar.set_description(name, refresh=False)
        for domain in range(DOMAINS):
            slot = slot_of(domain)
            state = jbn.State(bank.mean[slot], bank.var[slot], bank.count[slot])
            z, _ = logits(params, in_domain(images[SPLIT:], domain), state, train=False)
            accuracy = float((z.argmax(-1) == labels[SPLIT:]).mean())
            seen = f"{int(state.count):4} batches seen"
            print(f"{name:20} domain {domain}: {seen}, test accuracy {accuracy:.4f}")
    print(f"compiled {train_step._cache_size()} time(s)")


if __name__ == "__main__":
    main()
