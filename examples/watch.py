"""Watch a network while three things go wrong, and write a report that opens in a browser.

python examples/watch.py                  dead units at step 200, a learning rate 100 times too high
                                          at 300, images three times too bright from 400 on
python examples/watch.py --healthy        the same training with nothing wrong: no warning
"""

import argparse
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen
from jbn import health

MOMENTUM = 0.9
PAIRS = {f"BatchNorm_{i}": f"Dense_{i}/kernel" for i in range(3)}  # the weights before each norm


class Network(nn.Module):
    """Three hidden layers of 32 units, each followed by a batch norm and a relu."""

    @nn.compact
    def __call__(self, x, train):
        for _ in range(3):
            x = nn.Dense(32, use_bias=False)(x)
            x = jbn.linen.BatchNorm(
                use_running_average=not train, momentum=MOMENTUM, activation=nn.relu
            )(x)
        return nn.Dense(10)(x)


def make_step(network, optimizer):
    """The jitted training step; it also makes the metrics, from the variables before and after."""

    def loss(params, stats, x, labels):
        variables = {"params": params, "batch_stats": stats}
        logits, new = network.apply(variables, x, True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    @jax.jit
    def step(variables, opt_state, x, labels, factor):
        params, stats = variables["params"], variables["batch_stats"]
        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, stats, x, labels)
        updates, opt_state = optimizer.update(gradients, opt_state)
        updates = jax.tree.map(lambda u: u * factor, updates)
        new = {"params": optax.apply_updates(params, updates), "batch_stats": stats}
        metrics = health.metrics(
            new, previous=variables, momentum=MOMENTUM, gradients=gradients, pairs=PAIRS
        )
        return new, opt_state, {"loss": value, **metrics}

    return step


def watch(steps, faults, seed=0, progress=tqdm):
    """Train, with the faults at 40, 60 and 80 % of the steps; returns the monitor and variables."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    network, optimizer, rng = Network(), optax.adam(3e-3), np.random.default_rng(seed)
    variables = network.init(jax.random.key(seed), images[:2], train=False)
    opt_state, step = optimizer.init(variables["params"]), make_step(network, optimizer)
    monitor = health.Monitor()
    dies, blows_up, brightens = (int(share * steps) for share in (0.4, 0.6, 0.8))
    for i in progress(range(steps)):
        rows = rng.integers(len(labels), size=128)
        x = images[rows] * np.float32(3 if faults and i >= brightens else 1)
        if faults and i == dies:
            kernel = variables["params"]["Dense_1"]["kernel"]
            variables["params"]["Dense_1"]["kernel"] = kernel.at[:, ::2].set(0)
        factor = 100.0 if faults and blows_up <= i < blows_up + 5 else 1.0
        variables, opt_state, metrics = step(variables, opt_state, x, labels[rows], factor)
        for event in monitor.update(i, metrics):
            tqdm.write(str(event))
    return monitor, variables


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--healthy", action="store_true", help="train with nothing wrong")
    in_temporary = Path(tempfile.gettempdir()) / "watch.html"
    parser.add_argument(
        "--out", type=Path, default=in_temporary, help="the page; default: %(default)s"
    )
    args = parser.parse_args()
    monitor, variables = watch(args.steps, faults=not args.healthy)
    args.out.write_text(monitor.to_html(health.model_report(variables)), encoding="utf-8")
    print(f"{sum(not event.back for event in monitor.events)} warnings; wrote {args.out}")


if __name__ == "__main__":
    main()
