"""Questions about what the layer computes: of what it takes the mean, and what its output is."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.patches import Polygon
from questions_common import (
    GREY,
    THIRD,
    WITH,
    WITHOUT,
    Answer,
    canvas,
    claim,
    create,
    fit,
    images,
    label,
    normalized,
    random,
    train_mode,
)

import jbn


def undo(steps):
    """What are gamma and beta for, if they can undo the normalization?

    They give every channel back its freedom: its output has mean beta and standard deviation
    |gamma|, and the layer can still become the identity. What normalization changes is what sets
    this mean and deviation: two trained numbers, and no longer all the weights of the layers
    before.

    With gamma = √(variance + eps) and beta = mean, the layer returns its input to within
    {error:.0e}. Now make the weights of the layer before 100 times as large. The spread of a plain
    "gamma · x + beta" grows {plain:.0f} times; the spread of batch norm's output changes by
    {held:.2%}.
    """
    x = images @ random(1, 64, 8) + 3
    _, state = jbn.init(8)
    m = jbn.moments(x)
    undoing = jbn.Params(scale=jnp.sqrt(m.m2 / m.count + 1e-5), bias=m.mean)
    first = normalized(x)
    restored, _ = jbn.batch_norm_train(x, undoing, state)
    error = float(jnp.abs(restored - x).max())
    claim("gamma = sqrt(var + eps) and beta = mean give the input back", error < 1e-5)
    factors = np.logspace(-1, 1, 9)
    spread = lambda y: float(y[:, 0].std())
    batch_norm = [spread(jbn.batch_norm_train(f * x, undoing, state)[0]) for f in factors]
    affine = [spread(f * first * undoing.scale + undoing.bias) for f in factors]
    held, grown = max(batch_norm) / min(batch_norm) - 1, affine[-1] / affine[0]
    claim("a plain affine layer follows the weights before it, batch norm does not", held < 0.01)
    claim("the plain layer's spread grows 100 times", grown > 99)
    figure, (left, right) = canvas("Gamma and beta can undo batch norm, and they decide alone")
    left.plot(x[::9, 0], first[::9, 0], ".", color=GREY, label="gamma 1, beta 0 (at the start)")
    undone = "gamma = √(variance + eps), beta = mean"
    left.plot(x[::9, 0], restored[::9, 0], ".", color=WITH, label=undone)
    left.axline((2, 2), slope=1, color="black", lw=0.8, label="output = input")
    title = "Undone: the output is the input again"
    label(left, title, "input of the layer, one channel", "output of the layer")
    right.loglog(factors, affine, "s-", color=WITHOUT, label="gamma · x + beta, no normalization")
    right.loglog(factors, batch_norm, "o-", color=WITH, label="batch norm, same gamma and beta")
    title = "Not the same as multiplying and adding alone"
    factor = "factor on the weights of the layer before"
    label(right, title, factor, "standard deviation of the output")
    return Answer(figure, {"error": error, "plain": grown, "held": held})


def undo_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) + 3
    _, state = jbn.init(8)
    mean, var = x.mean(0), x.var(0)
    identity = jbn.Params(scale=jnp.sqrt(var + 1e-5), bias=mean)
    y, _ = jbn.batch_norm_train(x, identity, state)
    assert jnp.allclose(y, x, atol=1e-4)  # undone
    y, _ = jbn.batch_norm_train(100 * x, identity, state)
    assert jnp.allclose(y, x, atol=1e-2)  # the weights before it no longer set the spread


def high(steps):
    """My activations must be high. How do gamma and beta make them high again?

    The normalized value is multiplied by gamma, and beta is added, so an output of 50 ± 10 only
    needs gamma = 10 and beta = 50. Where the loss asks for such values, its gradient moves gamma
    and beta there like any other weight.

    The loss here asks 16 channels for a mean of 50 and a standard deviation of 10. Gamma starts at
    1 and beta at 0. After {steps} steps of gradient descent the channels have mean {mean:.1f} and
    standard deviation {std:.1f}; each step covered a tenth of the distance left, as gradient
    descent at this rate should.
    """
    x = images @ random(1, 64, 16)
    params, state = jbn.init(16)
    target = 10 * normalized(x) + 50

    @jax.jit
    def step(params):
        def loss(params):
            y, _ = jbn.batch_norm_train(x, params, state)
            return 0.5 * jnp.square(y - target).mean(0).sum()

        return jax.tree.map(lambda p, d: p - 0.1 * d, params, jax.grad(loss)(params))

    path = [params]
    for _ in range(steps):
        path.append(step(path[-1]))
    outputs = [jbn.batch_norm_train(x, p, state)[0][:, 0] for p in path]
    means, stds = np.array([y.mean() for y in outputs]), np.array([y.std() for y in outputs])
    left_over = 0.9 ** np.arange(steps + 1)
    claim("beta goes to 50", np.allclose(means, 50 - 50 * left_over, atol=0.01))
    claim("gamma goes to 10", np.allclose(stds, 10 - 9 * left_over, atol=0.01))
    figure, (left, right) = canvas("Gamma and beta learn to make a channel high again")
    shown = ((0, GREY), (min(5, steps), THIRD), (steps, WITH))
    for k, color in shown:
        left.hist(np.asarray(outputs[k]), 40, color=color, alpha=0.7, label=f"after {k} steps")
    label(left, "Outputs of one channel", "output of the layer", "number of images")
    right.plot(means[:61], color=WITH, label="mean of the output (beta), asked for: 50")
    right.plot(stds[:61], color=WITHOUT, label="standard deviation (gamma), asked for: 10")
    for y in (50, 10):
        right.axhline(y, color="black", lw=0.6)
    label(right, "The same channel while it trains", "training step", "value", "center right")
    return Answer(figure, {}, {"steps": steps, "mean": means[-1], "std": stds[-1]})


def high_in_short():
    params, state = jbn.init(64)
    high = jbn.Params(scale=10 * params.scale, bias=params.bias + 50)
    y, _ = jbn.batch_norm_train(images, high, state)
    varying = images.var(0) > 0.01  # some pixels at the edge are always black
    assert jnp.allclose(y.mean(0), 50, atol=1e-2)
    assert jnp.allclose(y.std(0)[varying], 10, atol=1e-2)


def per_channel(steps):
    """Is it per channel or per batch? What exactly is averaged, and what is stored?

    Both: each channel has one mean and one variance, and they are taken over all images of the
    batch and all positions in them. In a block of N images with H rows, W columns and C channels,
    each of the C means is taken over N·H·W values.

    For 16 images of 32 x 32 pixels with 3 channels the layer stores {shapes}. Each mean is over
    {count:.0f} values, 16 · 32 · 32. Afterwards every channel of the batch has mean 0 and variance
    1, but images keep their differences: one channel of a single image still has a mean as far as
    {spread:.1f} from 0.
    """
    brightness = jnp.abs(random(2, 16, 1, 1, 3)) * jnp.array([[[[1.0, 2.0, 4.0]]]])
    x = brightness + random(1, 16, 32, 32, 3)
    params, state = jbn.init(3)
    y, state = jbn.batch_norm_train(x, params, state, momentum=0)  # 0: keep this batch's own
    names = {"gamma": params.scale, "beta": params.bias, "mean": state.mean, "variance": state.var}
    shapes = ", ".join(f"{name} {value.shape}" for name, value in names.items())
    claim("one number per channel each", {v.shape for v in names.values()} == {(3,)})
    claim("the mean is over images and positions", np.allclose(state.mean, x.mean((0, 1, 2))))
    claim("each channel comes out with mean 0", jnp.abs(y.mean((0, 1, 2))).max() < 1e-5)
    claim("and variance 1", jnp.abs(y.var((0, 1, 2)) - 1).max() < 1e-3)
    after = y.mean((1, 2))
    spread = float(jnp.abs(after).max())
    claim("a channel of a single image does not come out with mean 0", spread > 0.5)
    figure, (left, right) = canvas("One mean per channel, over all images and all their positions")
    draw_block(left)
    for c, (name, mark) in enumerate({"first": "o", "second": "s", "third": "^"}.items()):
        color = (WITH, WITHOUT, THIRD)[c]
        numbers = np.arange(1, 17)
        right.plot(numbers, after[:, c], mark, color=color, label=f"{name} channel, one image")
    right.axhline(0, color="black", lw=2, label="each channel over the whole batch: 0")
    title = "After batch norm: images still differ, the batch is centred"
    label(right, title, "number of the image", "mean of the image's channel", None)
    right.set_ylim(top=float(after.max()) + 1.2)
    right.legend(fontsize=8, ncols=2, loc="upper center")
    return Answer(figure, {"count": jbn.moments(x).count[0], "spread": spread, "shapes": shapes})


def draw_block(ax, images=5, positions=6, channels=7, chosen=2):
    """N x (H·W) x C as a box of cells, seen from the front; one channel is coloured."""
    into = np.array([0.45, 0.38])  # where the direction "next image" points on the paper

    def cell(corner, u, v, c):
        corners = [corner, corner + u, corner + u + v, corner + v]
        fill = WITH if c == chosen else "white"
        ax.add_patch(Polygon(corners, facecolor=fill, edgecolor="0.35", lw=0.7))

    right, up = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for c in range(channels):
        for p in range(positions):
            cell(c * right + p * up, right, up, c)
        for n in range(images):
            cell(c * right + positions * up + n * into, right, into, c)
    for n in range(images):
        for p in range(positions):
            cell(channels * right + n * into + p * up, into, up, -1)
    ax.text(channels / 2, -0.6, f"C channels (here {channels})", ha="center")
    ax.text(-0.5, positions / 2, "H · W positions", va="center", ha="center", rotation=90)
    ax.text(channels + 1.6, 0.3, "N images", rotation=40, ha="center", va="center")
    text = "blue: the N · H · W values\nof one channel, from which\none mean and one variance\ncome"
    ax.text(channels + 2.7, positions - 0.5, text, va="top", fontsize=10, color=WITH)
    ax.set(xlim=(-1, channels + 8), ylim=(-1.2, positions + 2.6), aspect="equal")
    ax.set_title("One batch: a block of N x H x W x C numbers", fontsize=11)
    ax.axis("off")


def per_channel_in_short():
    x = images.reshape(-1, 8, 8, 1) * jnp.array([1.0, 2.0, 3.0])  # N x H x W x C: [1797, 8, 8, 3]
    params, state = jbn.init(3)
    y, new = jbn.batch_norm_train(x, params, state, momentum=0)
    assert params.scale.shape == params.bias.shape == new.mean.shape == new.var.shape == (3,)
    assert jnp.allclose(new.mean, x.mean((0, 1, 2)), rtol=1e-4)
    assert jnp.allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    assert abs(y[0].mean()) > 0.01  # a single image keeps a mean of its own


def one_pair(steps):
    """Do gamma and beta vary by input or by mini-batch? Are they one constant for all channels?

    Neither: every channel has its own gamma and its own beta, and all inputs and all mini-batches
    share them. Only the mean and the variance are taken from the batch; gamma and beta move by
    training alone.

    In the first layer of a network trained for {steps} steps, plot the outputs against the
    normalized inputs: each channel lies on one straight line, the same for two different batches.
    Its slope is gamma and its intercept beta, to within {off:.0e}. The 32 gammas of that layer
    differ, from {low:.2f} to {high:.2f}; over 30 batches the mean of a channel has a standard
    deviation of {varies:.2f}.
    """
    net, _, _ = fit(create(), train_mode, steps)
    params, state = net.norms[0], net.states[0]
    rows = np.random.default_rng(1).permutation(1797)[: 30 * 50].reshape(30, 50)
    hidden = [images[r] @ net.weights[0] for r in rows]
    pairs = [(normalized(h), jbn.batch_norm_train(h, params, state)[0]) for h in hidden]
    off = max(float(jnp.abs(y - params.scale * x - params.bias).max()) for x, y in pairs)
    claim("all batches lie on the same line of each channel", off < 1e-5)
    means = np.array([h.mean(0) for h in hidden])
    low, high = float(params.scale.min()), float(params.scale.max())
    claim("the channels have different gammas", high - low > 1e-3)
    claim("the means differ from batch to batch", means.std(0).min() > 1e-3)
    figure, (left, right) = canvas("One gamma and one beta per channel, shared by every batch")
    order = np.argsort(params.scale)
    for c, color in zip(order[[0, 16, -1]], (WITHOUT, THIRD, WITH), strict=True):
        name = f"channel {c}: gamma {params.scale[c]:.2f}, beta {params.bias[c]:.2f}"
        left.axline((0, params.bias[c]), slope=params.scale[c], color=color, lw=0.8, label=name)
        for k, mark in ((0, "o"), (1, "x")):
            left.plot(pairs[k][0][:, c], pairs[k][1][:, c], mark, color=color, ms=5, mfc="none")
        right.plot(range(1, 31), means[:, c], "o-", color=color, ms=3, label=f"channel {c}")
    title = "Two batches (circles and crosses), one line per channel"
    label(left, title, "normalized input", "output")
    label(right, "What does vary: the mean of each batch", "number of the batch", "mean")
    trained = {"steps": steps, "low": low, "high": high, "varies": means[:, order[-1]].std()}
    return Answer(figure, {"off": off}, trained)


def one_pair_in_short():
    params = jbn.Params(scale=jnp.array([0.5, 2.0]), bias=jnp.array([1.0, -1.0]))
    _, state = jbn.init(2)
    for batch in (images[:50, 20:22], images[50:90, 20:22]):  # two batches, two channels
        y, new = jbn.batch_norm_train(batch, params, state, momentum=0)
        xhat = (batch - new.mean) / jnp.sqrt(new.var + 1e-5)  # mean and variance of this batch
        assert jnp.allclose(y, params.scale * xhat + params.bias, atol=1e-5)  # the same two pairs
