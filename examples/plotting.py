"""Draw what the batch norms of a digits network do: distributions, history, drift and an overview.

python examples/plotting.py [--out FOLDER]      four pictures

The network is trained on digits, then shown inverted ones, on which its running statistics drift.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn
from jbn import health, plot

LAYERS = ("first", "second")


def create():
    rng = np.random.default_rng(0)
    draw = lambda rows, columns: jnp.asarray(
        rng.normal(size=(rows, columns)) * (2 / rows) ** 0.5, jnp.float32
    )
    norms = {name: jbn.init(32) for name in LAYERS}
    params = {name: pair[0] for name, pair in norms.items()}
    weights = {"first": draw(64, 32), "second": draw(32, 32), "out": draw(32, 10)}
    return {"weights": weights, "norms": params}, {name: pair[1] for name, pair in norms.items()}


def forward(learned, states, x):
    """(logits, new states, the input of each norm)."""
    new, inputs = {}, {}
    for name in LAYERS:
        inputs[name] = x @ learned["weights"][name]
        x, new[name] = jbn.batch_norm_train(
            inputs[name], learned["norms"][name], states[name], activation=jax.nn.relu, momentum=0.9
        )
    return x @ learned["weights"]["out"], new, inputs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    folder = Path(tempfile.gettempdir()) / "jbn_plots"
    parser.add_argument("--out", type=Path, default=folder, help="default: %(default)s")
    arguments = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    learned, states = create()
    optimizer, rng = optax.sgd(0.1, momentum=0.9), np.random.default_rng(0)

    @jax.jit
    def step(learned, states, opt_state, x, label):
        def loss(learned):
            logits, new, _ = forward(learned, states, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(learned)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(learned, updates), new, opt_state

    opt_state, recorded = optimizer.init(learned), [states["first"]]
    for _ in (bar := tqdm(range(arguments.steps), desc="compiling")):
        rows = rng.integers(1400, size=64)
        learned, states, opt_state = step(learned, states, opt_state, images[rows], labels[rows])
        recorded.append(states["first"])
        bar.set_description("training", refresh=False)

    _, _, inputs = forward(learned, states, 1 - images[1400:])
    model = {name: (learned["norms"][name], states[name]) for name in LAYERS}
    report = health.model_report(model, {name: jbn.moments(x) for name, x in inputs.items()})
    print(report)
    params, state = model["first"]
    pictures = {
        "before_after": plot.before_after(inputs["first"], params, state),
        "history": plot.history(recorded),
        "drift": plot.drift(report),
        "overview": plot.overview(report),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(arguments.out / f"{name}.png", dpi=110)
    print(f"drew {', '.join(pictures)} into {arguments.out}")


if __name__ == "__main__":
    main()
