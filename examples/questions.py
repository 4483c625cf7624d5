"""Eight questions people bring to batch normalization, each answered by running it.

    python examples/questions.py [1 3 ...] [--out DIR] [--steps N]

Every answer is checked before it is printed: if a claim is false, the script fails and says which.
    Each question draws one
picture. Its docstring is the question and the answer, into which the measured numbers are filled.
"""

import argparse
import functools
import inspect
import itertools
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jbn

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS, LABELS = (
    jnp.asarray(PIXELS / 16, jnp.float32),
    jnp.asarray(LABELS),
)  # 1797 images of 8 x 8 in [0, 1], ten classes
WITH, WITHOUT, THIRD, GREY = "#0b6fb8", "#d1581c", "#3c9a5f", "#8a8a8a"


def undo(steps):
    """Normalization can be undone by scale and bias, so what do they buy? Is a plain scale-and-bias
    layer not the same?

    With scale = sqrt(var + eps) and bias = mean the layer returns its input to within {error:.0e}:
    the identity, nothing is lost. But make the weights below 100 times as large, and the spread of
    a plain affine layer's output grows {plain:.0f} times, that of batch norm's by {held:.1%}: two
    learned numbers set each feature's mean and spread, whatever all the layers below do.
    """
    x = PIXELS @ random(1, 64, 8) + 3
    params, state = jbn.init(8)
    m = jbn.moments(x)
    undoing = jbn.Params(scale=jnp.sqrt(m.m2 / m.count + 1e-5), bias=m.mean)
    normalized, _ = jbn.batch_norm_train(x, params, state)
    restored, _ = jbn.batch_norm_train(x, undoing, state)
    error = float(jnp.abs(restored - x).max())
    claim("scale = sqrt(var + eps) and bias = mean give the input back", error < 1e-5)
    factors = np.logspace(-1, 1, 9)
    batch_norm = [
        float(jbn.batch_norm_train(f * x, undoing, state)[0][:, 0].std()) for f in factors
    ]
    affine = [float((f * normalized * undoing.scale + undoing.bias)[:, 0].std()) for f in factors]
    held, plain = max(batch_norm) / min(batch_norm) - 1, affine[-1] / affine[0]
    claim(
        "the spread of a plain affine layer's output follows the weights below, batch norm's does not",
        held < 1e-2 and plain > 99,
    )
    figure, (left, right) = canvas(
        "Scale and bias can undo batch norm, and set the output's mean and spread by themselves"
    )
    left.plot(
        x[::9, 0], normalized[::9, 0], ".", color=GREY, label="scale 1, bias 0 (at the start)"
    )
    left.plot(
        x[::9, 0], restored[::9, 0], ".", color=WITH, label="scale = √(var + eps), bias = mean"
    )
    left.axline((2, 2), slope=1, color="black", lw=0.8, label="output = input")
    label(
        left,
        "Undone: the output is the input again",
        "input of the layer, one feature",
        "output of the layer",
    )
    right.loglog(
        factors, affine, "s-", color=WITHOUT, label="plain scale and bias, no normalization"
    )
    right.loglog(factors, batch_norm, "o-", color=WITH, label="batch norm, same scale and bias")
    label(
        right,
        "Not the same as a plain affine layer",
        "factor on the weights of the layer below",
        "std of the output",
    )
    return figure, {"error": error, "plain": plain, "held": held}


def per_channel(steps):
    """Are the statistics per channel, per image or per batch? What is stored?

    Per channel, over the whole batch: for 16 RGB images of 32 x 32 the layer stores {shapes}, and
        each mean is over
    {count:.0f} values (16 * 32 * 32). Afterwards every channel of the batch has mean 0 and variance
    1, but images keep
    their differences: the mean of one channel of a single image still lies up to {spread:.1f} from
        0.
    """
    brightness = jnp.abs(random(2, 16, 1, 1, 3)) * jnp.array([[[[1.0, 2.0, 4.0]]]])
    images = brightness + random(1, 16, 32, 32, 3)
    params, state = jbn.init(3)
    y, state = jbn.batch_norm_train(
        images, params, state, momentum=0
    )  # momentum 0: the state is the batch's own
    shapes = ", ".join(
        f"{name} {value.shape}"
        for name, value in (*params._asdict().items(), *state._asdict().items())
    )
    claim(
        "one number per channel each",
        shapes == "scale (3,), bias (3,), mean (3,), var (3,), count ()",
    )
    claim(
        "the stored mean is over images and positions",
        jnp.allclose(state.mean, images.mean((0, 1, 2)), atol=1e-5),
    )
    claim(
        "each channel of the batch comes out with mean 0", jnp.abs(y.mean((0, 1, 2))).max() < 1e-5
    )
    claim("and variance 1", jnp.abs(y.var((0, 1, 2)) - 1).max() < 1e-3)
    before, after = images.mean((1, 2)), y.mean((1, 2))
    spread = float(jnp.abs(after).max())
    claim("a channel of a single image does not come out with mean 0", spread > 0.5)
    figure, axes = canvas(
        "One mean and one variance per channel, over all images and all positions of the batch"
    )
    for ax, values, title in zip(
        axes, (before, after), ("Before batch norm", "After batch norm"), strict=True
    ):
        for c, (name, color) in enumerate(
            {"red": "#c0392b", "green": "#2e8b57", "blue": "#2d6cb5"}.items()
        ):
            ax.plot(
                np.arange(1, 17), values[:, c], "o", color=color, label=f"{name} channel, one image"
            )
            ax.axhline(
                float(values[:, c].mean()),
                color=color,
                lw=(5, 3, 1)[c],
                label=f"{name} channel, whole batch",
            )
        ax.set_xticks(range(1, 17, 3))
        label(
            ax,
            title,
            "number of the image (32 by 32 pixels each)",
            "mean over the pixels of the image",
        )
    axes[0].get_legend().remove()
    axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, {"shapes": shapes, "count": jbn.moments(images).count[0], "spread": spread}


def weight_scale(steps):
    """Why is BN(Wu) = BN((aW)u), and what does that do to the gradient and the learning rate?

    The factor a multiplies mean and std alike and cancels: over a = 0.01 to 100 the output changes
        by {change:.0e} at most
    and the gradient is 1/a of what it was, to within {slope:.0e}. Only the direction of W counts,
    and a step turns it by lr / |W|^2. The gradient is orthogonal to W, so every step lengthens W:
    by {longer:.0%} in {steps} steps, which cut the effective rate to {rate:.0%}.
    """
    params, state = jbn.init(16)
    readout, start = random(2, 16, 10), random(1, 64, 16) / 8

    @jax.jit
    def output(w):
        return jbn.batch_norm_train(PIXELS @ w, params, state, eps=1e-12)[0]

    gradient = jax.jit(jax.grad(lambda w: cross_entropy(output(w) @ readout, LABELS)))
    factors = np.logspace(-2, 2, 9)
    norms = np.array([norm(gradient(a * start)) for a in factors])
    change = max(float(jnp.abs(output(a * start) - output(start)).max()) for a in factors)
    slope = np.abs(norms * factors / norms[4] - 1).max()
    claim(
        "the output does not change and the gradient is divided by a",
        change < 1e-4 and slope < 1e-3,
    )
    path = [start]
    for _ in range(steps):
        dw = gradient(path[-1])
        claim(
            "the gradient is orthogonal to W",
            abs((path[-1] * dw).sum()) < 1e-3 * norm(path[-1]) * norm(dw),
        )
        path.append(path[-1] - 0.3 * dw)
    lengths = np.array([norm(w) / norm(start) for w in path])
    claim("every step lengthens W", np.all(np.diff(lengths) > 0))
    figure, (left, right) = canvas(
        "Scaling the weights before batch norm changes no output, and divides the gradient"
    )
    left.loglog(factors, norms, "o", color=WITH, label="measured")
    left.loglog(factors, norms[4] / factors, color="black", lw=0.8, label="1 / a")
    label(
        left,
        "Weights a times as large: gradient 1/a",
        "factor a on the weights W",
        "norm of the gradient",
    )
    right.plot(lengths, color=THIRD, label="length of W")
    right.plot(lengths**-2.0, color=WITH, label="effective learning rate, lr / length²")
    label(
        right,
        "Each step lengthens W and so slows the next",
        "steps of SGD at learning rate 0.3",
        "relative to the start",
    )
    return figure, {
        "change": change,
        "slope": slope,
        "longer": lengths[-1] - 1,
        "rate": lengths[-1] ** -2,
        "steps": steps,
    }


def by_hand(steps):
    """How are scale and bias initialized, and how does one training step change them?

    To ones and zeros, so that the layer starts as pure normalization. Then dscale = sum(dy * xhat)
    and dbias = sum(dy): by hand in float64 and by jax.grad they differ by {error:.0e}, and the step
    p - lr * dp differs from optax.sgd's by {step:.0e}. After {steps} steps the scales lie between
    {low:.2f} and {high:.2f}.
    """
    x, readout = PIXELS @ random(1, 64, 16), random(2, 16, 10)
    params, state = jbn.init(16)
    claim(
        "scale starts at one, bias at zero",
        bool((params.scale == 1).all() and (params.bias == 0).all()),
    )

    def head(y):
        return cross_entropy(y @ readout, LABELS)

    gradient = jax.jit(jax.grad(lambda params: head(jbn.batch_norm_train(x, params, state)[0])))
    dy = np.asarray(jax.grad(head)(jbn.batch_norm_train(x, params, state)[0]), np.float64)
    centred = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(0)
    hand = jbn.Params(scale=(dy * centred / np.sqrt(centred.var(0) + 1e-5)).sum(0), bias=dy.sum(0))
    error = max(float(np.abs(a - b).max()) for a, b in zip(gradient(params), hand, strict=True))
    claim("dscale = sum(dy * xhat) and dbias = sum(dy)", error < 1e-6)
    updates, _ = optax.sgd(0.5).update(gradient(params), optax.sgd(0.5).init(params))
    step = max(float(np.abs(u + 0.5 * h).max()) for u, h in zip(updates, hand, strict=True))
    claim("one step by hand is optax's", step < 1e-6)
    path = [params]
    for _ in range(steps):
        path.append(jax.tree.map(lambda p, d: p - 0.5 * d, path[-1], gradient(path[-1])))
    figure, (left, right) = canvas(
        "Scale starts at 1, bias at 0; each moves by its own sum over the batch"
    )
    for name, color in (("scale", WITH), ("bias", WITHOUT)):
        left.plot(
            getattr(hand, name),
            getattr(gradient(params), name),
            "o",
            color=color,
            label=f"d{name}, 16 channels",
        )
        right.plot([getattr(p, name) for p in path], color=color, lw=0.8, label=[name, *["_"] * 15])
    left.axline((0, 0), slope=1, color="black", lw=0.8, label="equal")
    label(
        left,
        "Gradients at the first step",
        "by hand: Σ dy·x̂ for scale, Σ dy for bias",
        "jax.grad through the layer",
    )
    label(
        right,
        "The 16 channels in training",
        "steps of SGD at learning rate 0.5",
        "value of the parameter",
    )
    return figure, {
        "error": error,
        "step": step,
        "steps": steps,
        "low": path[-1].scale.min(),
        "high": path[-1].scale.max(),
    }


def running_averages(steps):
    """What are the moving averages for, and why does an output at batch size 1 differ?

    In training an output depends on the other examples: for one image it scatters by {small:.2f} at
        batch size 4 and
    {large:.2f} at 256; at 1 the variance is 0 and jbn refuses. So training folds each batch into
    moving averages, in which the start still weighs momentum^k after k steps: {fast:.0e} and
    {slow:.2f} at momentum 0.9 and 0.99 after {k}.
    Evaluation freezes them: it gives that image {alone:.3f}, alone or among {among}.
    """
    x, (params, state) = PIXELS @ random(1, 64, 4) + 2, jbn.init(4)
    draw = np.random.default_rng(0).choice
    batches = draw(x, (10 * steps, 32))
    means = batches.astype(np.float64).mean(1)[:, 0]
    fold = jax.jit(
        lambda s, batch, momentum: jbn.batch_norm_train(batch, params, s, momentum=momentum)[1]
    )
    figure, (left, right) = canvas(
        "Training normalizes by the batch at hand; evaluation by averages remembered from training"
    )
    left.plot(
        np.arange(1, 10 * steps + 1),
        means,
        ".",
        color="#c4c4c4",
        ms=4,
        label="mean of one batch of 32",
    )
    for momentum, color in ((0.99, WITH), (0.9, WITHOUT)):
        states = list(
            itertools.accumulate(
                batches, lambda s, batch, m=momentum: fold(s, batch, m), initial=state
            )
        )
        expected = functools.reduce(
            lambda old, new, m=momentum: m * old + (1 - m) * new, means, 0.0
        )
        claim(
            "new = momentum * old + (1 - momentum) * batch",
            abs(float(states[-1].mean[0]) - expected) < 1e-4,
        )
        left.plot(
            [s.mean[0] for s in states], color=color, label=f"running mean, momentum {momentum}"
        )
    label(
        left, "What is remembered: the mean of one feature", "training steps", "mean of the feature"
    )
    train = jax.jit(
        jax.vmap(
            lambda rest: jbn.batch_norm_train(jnp.concatenate([x[:1], rest]), params, state)[0][
                0, 0
            ]
        )
    )
    outputs = {n: train(draw(x, (40, n - 1))) for n in (2, 4, 16, 64, 256)}
    claim(
        "company matters less in larger batches",
        outputs[4].std() > 2 * outputs[64].std() > 2 * outputs[256].std(),
    )
    alone, among = (
        float(jbn.batch_norm_eval(rows, params, states[-1])[0, 0]) for rows in (x[:1], x)
    )
    claim("in evaluation company does not matter at all", np.isclose(alone, among, rtol=1e-6))
    claim(
        "training on one example is refused",
        refuses(lambda: jbn.batch_norm_train(x[:1], params, state)),
    )
    for n, values in outputs.items():
        right.plot(
            [n] * 40,
            values,
            ".",
            color=WITHOUT,
            label="training mode, 40 random batches" if n == 2 else "_",
        )
    right.axhline(alone, color=WITH, label="evaluation, any batch size from 1 on")
    right.set_xscale("log", base=2)
    right.set_xticks(list(outputs), list(outputs))
    label(
        right,
        "The same image in different company",
        "batch size",
        "normalized output for that image",
    )
    numbers = {
        "small": outputs[4].std(),
        "large": outputs[256].std(),
        "alone": alone,
        "among": len(x),
    }
    return figure, numbers | {
        "k": 10 * steps,
        "fast": 0.9 ** (10 * steps),
        "slow": 0.99 ** (10 * steps),
    }


def exploding(steps):
    """Does batch norm stop exploding gradients?

    The explosion that comes from the scale of the weights, yes: with weights 1.41 times He
        initialization's the plain net
    starts at gradients of {plain:.0e} and is NaN after one step at all three rates; with batch norm
    it stays finite at all three. But at the start batch norm itself multiplies gradients by
    {growth:.2f} per ReLU layer (theory, Yang et al. 2019: 1.21), {total:.0f} times over 48 layers.
    Training tames that (question 3): from {first:.0f} to {last:.1f} in {steps} steps at rate 0.3.
    """
    first, hidden, readout = (
        random(1, 64, 32) / 4,
        random(3, 49, 32, 32) * 2 / 32**0.5,
        random(2, 32, 10) / 6,
    )

    def loss(hidden, layer):
        h, _ = jax.lax.scan(
            lambda h, w: (jax.nn.relu(layer(h @ w)), None), layer(PIXELS[:128] @ first), hidden
        )
        return cross_entropy(h @ readout, LABELS[:128])

    gradient, rates = (
        jax.jit(jax.grad(loss), static_argnums=1),
        {0.003: THIRD, 0.03: WITHOUT, 0.3: WITH},
    )
    figure, axes = canvas(
        "50 ReLU layers: batch norm stops the explosion that large weights cause, and starts a milder one",
        sharey=True,
    )
    norms = {}
    for ax, layer, count, title in (
        (axes[0], plain, 1, "Without batch norm"),
        (axes[1], normalized, steps, "With batch norm"),
    ):
        for rate, color in {0: "black", **rates}.items():
            w = hidden
            for _ in range(count if rate else 0):
                w = w - rate * gradient(w, layer)
            norms[layer, rate] = np.linalg.norm(gradient(w, layer), axis=(1, 2))
            end = "" if np.isfinite(norms[layer, rate]).all() else ": not a number"
            name = (
                f"learning rate {rate:g}, after {count} step{'s'[: count > 1]}{end}"
                if rate
                else "before the first step"
            )
            ax.semilogy(np.arange(2, 51), norms[layer, rate], color=color, label=name)
        label(
            ax,
            title,
            "layer (50 is next to the loss)",
            "norm of the gradient of the layer's weights",
        )
    claim(
        "without: lost after one step at all rates",
        all(np.isnan(norms[plain, rate]).any() for rate in rates),
    )
    claim(
        "with: finite at all rates",
        all(np.isfinite(norms[normalized, rate]).all() for rate in rates),
    )
    start = norms[normalized, 0]
    growth = (start[0] / start[-1]) ** (1 / 48)
    claim(
        "with, at the start: sqrt(pi / (pi - 1)) per layer",
        abs(growth / np.sqrt(np.pi / (np.pi - 1)) - 1) < 0.05,
    )
    numbers = {
        "plain": norms[plain, 0].max(),
        "growth": growth,
        "total": start[0] / start[-1],
        "steps": steps,
    }
    return figure, numbers | {"first": start[0], "last": norms[normalized, 0.3][0]}


def higher_order(steps):
    """A gradient step assumes that the other layers stand still. How wrong is that, with and
    without batch norm?

    All layers move at once, and the higher-order terms make a step of 1 % of the weights' norm in a
    chain of 10 linear layers miss its predicted change of the loss by {plain10:.0%}; with batch
    norm by {norm10:.0%}. At 50 layers and 10 % the plain chain is off {plain50:.0f}-fold, batch
    norm {norm50:.1f}-fold: the effect is damped and bounded, not gone. (Medians of 8 random
    chains.)
    """
    x, targets = (
        (PIXELS[:256] - PIXELS[:256].mean(0)) @ random(1, 64, 32) / 4,
        3 * jax.nn.one_hot(LABELS[:256], 10),
    )
    sizes, depths, off = np.array([0.001, 0.003, 0.01, 0.03, 0.1]), (2, 10, 20, 50), {}

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.vmap, in_axes=(0, None))
    def miss(weights, layer):
        def loss(weights):
            return jnp.square(
                jax.lax.scan(lambda h, w: (layer(h @ w), None), x, weights)[0][:, :10] - targets
            ).mean()

        before, dw = jax.value_and_grad(loss)(weights)
        steps = sizes * norm(weights) / norm(dw)
        real = jax.lax.map(lambda step: loss(weights - step * dw), steps) - before
        return jnp.abs(real / (steps * norm(dw) ** 2) + 1)  # the promise is -step * norm(dw)^2

    figure, (left, right) = canvas(
        "What a step changes, against what the gradient promised, in a chain of linear layers"
    )
    for layer, color, name in (
        (plain, WITHOUT, "without batch norm"),
        (normalized, WITH, "with batch norm"),
    ):
        for depth in depths:
            off[layer, depth] = np.median(
                miss(random(depth, 8, depth, 32, 32) / 32**0.5, layer), axis=0
            )
        left.loglog(100 * sizes, off[layer, 50], "s--", color=color, label=f"50 layers, {name}")
        left.loglog(100 * sizes, off[layer, 10], "o-", color=color, label=f"10 layers, {name}")
        right.semilogy(
            depths,
            [off[layer, depth][2] for depth in depths],
            "o-",
            color=color,
            label=f"step of 1 %, {name}",
        )
    claim(
        "the prediction is better with batch norm",
        all((off[normalized, d] < off[plain, d]).all() for d in depths),
    )
    claim(
        "50 layers, step of 10 %: bounded only with batch norm",
        off[plain, 50][-1] > 2 > off[normalized, 50][-1],
    )
    for ax, title, x_label in (
        (left, "Larger step", "change of the weights, % of their norm"),
        (right, "Deeper", "number of layers"),
    ):
        ax.axhline(1, color="black", lw=0.8, label="error as large as the prediction")
        label(
            ax,
            f"{title}, worse prediction",
            x_label,
            "|real - predicted| / |predicted| change of loss",
        )
    return figure, {
        f"{name}{d}": off[f, d][i]
        for d, i in ((10, 2), (50, -1))
        for name, f in (("plain", plain), ("norm", normalized))
    }


def output_layer(steps):
    """Why not after the output layer? And why is the bias before batch norm redundant?

    The output must be free to say that a whole batch is alike. On all digits a linear classifier is
    right in {mixed:.0%} with or without batch norm on its logits; on batches of a single digit in
    {without:.0%} without and {with_it:.0%} with.
    A bias before batch norm is subtracted with the mean: the derivative of the loss by it is
        {zero:.0e} at most (without
    batch norm up to {slope:.1f}), so leave it out; batch norm's own bias does its work.
    """
    logits = PIXELS @ jnp.asarray(
        np.linalg.lstsq(PIXELS, jax.nn.one_hot(LABELS, 10), rcond=1e-5)[0]
    )
    m, (_, state) = jbn.moments(logits), jbn.init(10)
    params = jbn.Params(
        jnp.sqrt(m.m2 / m.count + 1e-5), m.mean
    )  # the identity on all the digits together

    def accuracy(rows, output):
        return float((output(logits[rows]).argmax(1) == LABELS[rows]).mean())

    batches = [
        np.arange(len(LABELS)),
        *(np.flatnonzero(digit == LABELS)[:170] for digit in range(10)),
    ]
    outputs = (plain, lambda rows: jbn.batch_norm_train(rows, params, state)[0])
    free, bound = ([accuracy(rows, output) for rows in batches] for output in outputs)
    claim("on all digits together normalized logits are as good", free[0] == bound[0])
    claim("on batches of one digit they fail", max(bound[1:]) < 0.5 < min(free[1:]))
    hidden, shift, readout = PIXELS @ random(1, 64, 16), random(3, 1, 16), random(2, 16, 10) / 4
    curve = lambda layer: jax.vmap(
        jax.value_and_grad(lambda b: cross_entropy(layer(hidden + b * shift) @ readout, LABELS))
    )
    biases = jnp.linspace(-4, 4, 41)
    (losses, slopes), (losses_bn, slopes_bn) = (
        jax.jit(curve(layer))(biases) for layer in (plain, normalized)
    )
    zero, slope = (float(jnp.abs(s).max()) for s in (slopes_bn, slopes))
    claim(
        "a bias before batch norm changes nothing and has no gradient",
        np.ptp(losses_bn) < 1e-5 and zero < 1e-5 < slope,
    )
    figure, (left, right) = canvas(
        "Batch norm removes the mean: bad for an answer, and a bias just before it does nothing"
    )
    for x, rates, loss, color, name in (
        (-0.2, free, losses, WITHOUT, "no batch norm"),
        (0.2, bound, losses_bn, WITH, "batch norm"),
    ):
        left.bar(
            np.arange(11) + x,
            np.multiply(100, rates),
            0.4,
            color=color,
            label=f"{name} on the output",
        )
        right.plot(biases, loss, color=color, label=f"{name} after the bias")
    left.set_xticks(range(11), ["all", *range(10)])
    left.set_ylim(0, 130)
    label(
        left,
        "A batch that holds only one digit (training mode)",
        "digits in the batch",
        "correct, % of the batch",
    )
    label(right, "A bias in front of batch norm", "size of the bias", "loss (cross-entropy, nats)")
    numbers = {"mixed": free[0], "without": np.mean(free[1:]), "with_it": np.mean(bound[1:])}
    return figure, numbers | {"zero": zero, "slope": slope}


def plain(x):
    return x


def normalized(x):
    return jbn.batch_norm_train(x, *jbn.init(x.shape[-1]))[0]


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm(w):
    return jnp.sqrt(jnp.square(w).sum())


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def claim(text, holds):
    """Every answer stands on these."""
    if not holds:
        raise AssertionError(f"not so: {text}")


def refuses(call):
    try:
        call()
    except ValueError:
        return True
    return False


def canvas(title, **kwargs):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes = figure.subplots(1, 2, **kwargs)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def label(ax, title, x, y):
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(labelleft=True)
    ax.legend(fontsize=9)


QUESTIONS = (
    undo,
    per_channel,
    weight_scale,
    by_hand,
    running_averages,
    exploding,
    higher_order,
    output_layer,
)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = range(1, len(QUESTIONS) + 1)
    parser.add_argument(
        "numbers",
        nargs="*",
        type=int,
        help=f"the questions to answer, of 1 to {every[-1]}; default: all",
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    parser.add_argument(
        "--steps", type=int, default=30, help="training steps where a question trains, at least 2"
    )
    arguments = parser.parse_args(argv)
    if not set(arguments.numbers) <= set(every) or arguments.steps < 2:
        parser.error(
            f"questions are numbered 1 to {every[-1]}, and --steps is at least 2; got {arguments}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in arguments.numbers or every:
        start = time.perf_counter()
        figure, numbers = QUESTIONS[number - 1](arguments.steps)
        question, answer = inspect.getdoc(QUESTIONS[number - 1]).split("\n\n")
        path = arguments.out / f"{number}_{QUESTIONS[number - 1].__name__}.png"
        figure.savefig(path, dpi=110)
        print(
            f"{number}. {question}\n{textwrap.indent(textwrap.fill(answer.format(**numbers), 110), '   ')}"
        )
        print(f"   {path} ({time.perf_counter() - start:.1f} s)\n", flush=True)


if __name__ == "__main__":
    main()
