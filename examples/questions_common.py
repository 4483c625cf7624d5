"""What the answers of examples/questions.py share: digits, colours, a network to train, `claim`.

The names imported and defined at the top are those of the first code block of questions.md, so
that each short program of the page runs here as it stands there.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jbn
from jbn.plot import COLORS

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

WITH, WITHOUT, THIRD, GREY = (COLORS[name] for name in ("jbn", "without", "other", "peer"))
TRAIN = slice(0, 1400)  # the other 397 digits are for testing


class Answer(NamedTuple):
    """One question, answered.

    Attributes:
        figure: the picture.
        numbers: measured, and the same however many steps one trains.
        trained: measured after training.
    """

    figure: Figure
    numbers: dict
    trained: dict = {}  # noqa: RUF012  never changed


class NotSo(AssertionError):
    """A claim of an answer does not hold."""


def claim(text, holds):
    """Every answer stands on these: what is not so stops the script."""
    if not holds:
        raise NotSo(f"not so: {text}")


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm(w):
    return jnp.sqrt(jnp.square(w).sum())


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    return float((logits.argmax(-1) == labels).mean())


def plain(x):
    """No normalization, to compare with."""
    return x


def normalized(x):
    """Batch norm as it starts: gamma 1, beta 0."""
    return jbn.batch_norm_train(x, *jbn.init(x.shape[-1]))[0]


class Network(NamedTuple):
    """Two hidden layers of 32 over the 64 pixels, and what `fit` has learned."""

    weights: list  # of arrays
    norms: list  # of jbn.Params, one per hidden layer
    states: list  # of jbn.State, likewise


def create(seed=0):
    sizes = ((64, 32), (32, 32), (32, 10))
    weights = [random(seed + i, *size) * (2 / size[0]) ** 0.5 for i, size in enumerate(sizes)]
    norms, states = zip(jbn.init(32), jbn.init(32), strict=True)
    return Network(weights, list(norms), list(states))


def train_mode(x, params, state):
    return jbn.batch_norm_train(x, params, state, momentum=0.9)


def eval_mode(x, params, state):
    return jbn.batch_norm_eval(x, params, state), state


def no_norm(x, params, state):
    return x, state


def forward(net, x, layer, activation=jax.nn.relu):
    """(logits, network with new states). layer: train_mode, eval_mode or no_norm."""
    states = []
    for weight, params, state in zip(net.weights, net.norms, net.states, strict=False):
        x, state = layer(x @ weight, params, state)
        x = activation(x)
        states.append(state)
    return x @ net.weights[-1], net._replace(states=states)


def fit(net, layer, steps, *, rate=0.1, activation=jax.nn.relu, fixed=False):
    """Train on batches of 64 digits.

    Returns:
        The network, the loss of each step, and the network after each step (one more axis).
    """
    optimizer = optax.sgd(rate, momentum=0.9)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, TRAIN.stop, (steps, 64)))

    def step(carry, rows):
        net, opt_state = carry

        def loss(learned):
            weights, norms = learned
            net_ = net._replace(weights=weights, norms=net.norms if fixed else norms)
            logits, new = forward(net_, images[rows], layer, activation)
            return cross_entropy(logits, labels[rows]), new.states

        learned = net.weights, net.norms
        (value, states), gradients = jax.value_and_grad(loss, has_aux=True)(learned)
        updates, opt_state = optimizer.update(gradients, opt_state)
        weights, norms = optax.apply_updates(learned, updates)
        net = Network(weights, norms, states)
        return (net, opt_state), (value, net)

    start = net, optimizer.init((net.weights, net.norms))
    (net, _), (losses, path) = jax.jit(lambda start: jax.lax.scan(step, start, rows))(start)
    return net, np.asarray(losses), path


def smooth(losses, window=10):
    window = min(window, len(losses))
    return np.convolve(losses, np.ones(window) / window, "valid")


def canvas(title, columns=2, **kwargs):
    """A figure with two drawings side by side, and a title that says what was found."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(1, columns, **kwargs)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def label(ax, title, x, y, legend="best"):
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(labelleft=True)
    if legend:
        ax.legend(fontsize=9, loc=legend)


def one_line(text):
    return re.sub(r"\s+", " ", text).strip()
