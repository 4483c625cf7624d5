"""Questions about what comes out of the layer: for a sigmoid, two channels, the next layer."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.patches import Ellipse
from questions_common import (
    GREY,
    THIRD,
    TRAIN,
    WITH,
    WITHOUT,
    Answer,
    accuracy,
    canvas,
    claim,
    create,
    fit,
    forward,
    images,
    label,
    labels,
    no_norm,
    normalized,
    random,
)

import jbn


def sigmoid(steps):
    """What does an activation like the sigmoid have to do with gamma and beta?

    Normalized values lie mostly between -2 and 2, where a sigmoid is almost a straight line, and
    straight-line layers, stacked, still compute only a straight line. Gamma spreads the values into
    the bends, and beta shifts them to one side, as far as training finds useful.

    On normalized inputs of 1797 digits, a straight line explains {line1:.1%} of the variance of the
    sigmoid's output at gamma 1, {line4:.1%} at gamma 4, and {line16:.1%} at gamma 16.
    """
    xhat = normalized(images @ random(1, 64, 1))[:, 0]

    def explained(gamma):
        y = np.asarray(jax.nn.sigmoid(gamma * xhat))
        residual = y - np.polyval(np.polyfit(xhat, y, 1), xhat)
        return 1 - residual.var() / y.var()

    gammas = np.logspace(-1, 2, 25)
    claim("at gamma 1 the sigmoid is nearly a line", explained(1) > 0.97)
    claim("larger gammas bend it", np.all(np.diff([explained(g) for g in (1, 4, 16)]) < 0))
    figure, (left, right) = canvas("Gamma decides how much of the sigmoid's bend a channel uses")
    z = np.linspace(-10, 10, 201)
    left.plot(z, jax.nn.sigmoid(z), color="black", label="sigmoid")
    for gamma, color in ((1, WITH), (4, WITHOUT)):
        height, edges = np.histogram(gamma * xhat, np.linspace(-10, 10, 61), density=True)
        left.stairs(height, edges, fill=True, color=color, alpha=0.4)
        left.stairs(height, edges, color=color, label=f"where the inputs lie at gamma {gamma}")
    label(left, "Inputs of the sigmoid", "gamma · normalized value (beta 0)", "sigmoid; density")
    right.semilogx(gammas, [100 * explained(g) for g in gammas], color=WITH, label="measured")
    right.plot(1, 100 * explained(1), "o", color=WITH, label="gamma 1, at the start")
    title = "How well a straight line describes the sigmoid"
    label(right, title, "gamma", "explained by a straight line, %", "lower left")
    return Answer(figure, {f"line{g}": explained(g) for g in (1, 4, 16)})


def sigmoid_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
    params, state = jbn.init(1)
    for gamma, bends in ((1.0, False), (16.0, True)):
        params = params._replace(scale=jnp.array([gamma]))
        z, _ = jbn.batch_norm_train(x, params, state)
        line = np.polyfit(z[:, 0], jax.nn.sigmoid(z[:, 0]), 1)
        off = jax.nn.sigmoid(z[:, 0]) - np.polyval(line, z[:, 0])
        assert (off.std() > 0.05) == bends


def decorrelate(steps):
    """Does batch norm decorrelate the components?

    No: each channel is shifted and scaled by itself, so the correlation between two channels stays
    what it was (its sign turns if one of the two gammas is negative). Removing it is called
    whitening, which needs the covariance matrix of all channels.

    Two channels with correlation {before:.4f} come out of batch norm with correlation {after:.4f}:
    a slanted ellipse stays slanted. Whitening makes it a circle: {white:.4f}.
    """
    first, second = (images @ random(seed, 64, 1) for seed in (1, 2))
    x = jnp.concatenate([first + 4, first + 0.6 * second], 1)
    y = normalized(x)
    centred = np.asarray(x - x.mean(0), np.float64)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    whitened = centred @ vectors / np.sqrt(values) @ vectors.T
    stages = (("Before", x, GREY), ("After batch norm", y, WITH), ("Whitened", whitened, THIRD))
    before, after, white = (np.corrcoef(np.asarray(v, np.float64).T)[0, 1] for _, v, _ in stages)
    claim("the correlation does not change", abs(after - before) < 1e-4 and abs(before) > 0.5)
    claim("whitening removes it", abs(white) < 1e-6)
    figure, axes = canvas("Batch norm moves and scales each channel; the ellipse stays slanted", 3)
    correlations = (before, after, white)
    for ax, (name, v, color), correlation in zip(axes, stages, correlations, strict=True):
        v = np.asarray(v, np.float64)
        ax.plot(v[:, 0], v[:, 1], ".", color=color, ms=2)
        values, vectors = np.linalg.eigh(np.cov(v.T))
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        size = 4 * np.sqrt(values[::-1])  # two standard deviations to either side
        ax.add_patch(Ellipse(v.mean(0), *size, angle=angle, fill=False, lw=2))
        ax.set(xlim=(-4.5, 7.5), ylim=(-8.5, 4.5), aspect="equal")
        label(ax, f"{name}: correlation {correlation:.2f}", "channel 1", "channel 2", None)
    return Answer(figure, {"before": before, "after": after, "white": abs(white)})


def decorrelate_in_short():
    x = images[:, [28, 36]]  # two pixels, one above the other
    y, _ = jbn.batch_norm_train(x, *jbn.init(2))
    before, after = np.corrcoef(x.T)[0, 1], np.corrcoef(y.T)[0, 1]
    assert abs(before) > 0.3
    assert abs(before - after) < 1e-3


def output_changes(steps):
    """Does putting in batch norm change the output of a layer?

    Yes: the layers after it see beta + gamma · (normalized value) instead of what they saw before.
    So put it in before training; into a trained network it goes unnoticed only with gamma =
    √(variance + eps) and beta = mean.

    A network trained without batch norm for {steps} steps is right on {original:.1%} of the test
    digits. With batch norm put into both hidden layers at gamma 1 and beta 0, the same weights are
    right on {inserted:.1%}. With gamma and beta set from each layer's own variance and mean, they
    are right on {matched:.1%} again.
    """
    net, _, _ = fit(create(), no_norm, steps, rate=0.03)
    test_x, test_y = images[TRAIN.stop :], labels[TRAIN.stop :]
    keep = lambda x, params, state: jbn.batch_norm_train(x, params, state, momentum=0)
    same = []

    def matching(x, params, state):
        _, state = jbn.batch_norm_train(x, params, state, momentum=0)
        same.append(jbn.Params(jnp.sqrt(state.var + 1e-5), state.mean))
        return keep(x, same[-1], state)

    evaluate = lambda x, params, state: (jbn.batch_norm_eval(x, params, state), state)
    _, at_one = forward(net, images[TRAIN], keep)
    _, matched = forward(net, images[TRAIN], matching)
    matched = matched._replace(norms=same)
    outputs = [forward(n, test_x, f)[0] for n, f in
               ((net, no_norm), (at_one, evaluate), (matched, evaluate))]  # fmt: skip
    right_in = [accuracy(z, test_y) for z in outputs]
    claim("inserted at gamma 1, beta 0, it changes the answers", right_in[1] < right_in[0])
    claim(
        "with the layer's own moments it changes nothing",
        np.allclose(outputs[0], outputs[2], atol=1e-2),
    )
    figure, (left, right) = canvas("Batch norm changes what the next layers see")
    hidden = test_x @ net.weights[0]
    for n, color, name in (
        (at_one, WITHOUT, "gamma 1, beta 0"),
        (matched, WITH, "gamma = √(variance + eps), beta = mean"),
    ):
        y = jbn.batch_norm_eval(hidden, n.norms[0], n.states[0])
        left.plot(hidden[:, 0], y[:, 0], ".", color=color, label=name)
    left.axline((0, 0), slope=1, color="black", lw=0.8, label="output = input")
    label(left, "One channel of the first hidden layer", "input of batch norm", "output")
    names = ["as trained:\nno batch norm", "inserted:\ngamma 1, beta 0", "inserted:\nmatched"]
    bars = right.bar(names, [100 * a for a in right_in], color=(GREY, WITHOUT, WITH))
    right.bar_label(bars, fmt="%.0f %%")
    title = "The same weights, batch norm put in afterwards"
    label(right, title, "", "test digits that are right, %", None)
    numbers = zip(("original", "inserted", "matched"), right_in, strict=True)
    return Answer(figure, {}, {"steps": steps, **dict(numbers)})


def output_changes_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    params, state = jbn.init(8)
    y, state = jbn.batch_norm_train(x, params, state, momentum=0)
    assert jnp.abs(y - x).max() > 1  # another output than before
    matched = jbn.Params(scale=jnp.sqrt(state.var + 1e-5), bias=state.mean)
    assert jnp.allclose(jbn.batch_norm_eval(x, matched, state), x, atol=1e-4)
