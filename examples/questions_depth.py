"""Questions about deep networks: gradients that explode, steps that surprise, and why it works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from questions_common import (
    GREY,
    THIRD,
    TRAIN,
    WITH,
    WITHOUT,
    Answer,
    canvas,
    claim,
    create,
    cross_entropy,
    fit,
    images,
    label,
    labels,
    no_norm,
    norm,
    normalized,
    plain,
    random,
    smooth,
    train_mode,
)

import jbn


def exploding(steps):
    """Can it stop exploding gradients?

    It stops the explosion that comes from weights that are too large, since the size of the weights
    cancels. At the start it causes a milder one of its own, a fixed factor per layer, which
    training then tames.

    In a network of 50 ReLU layers whose weights are 1.41 times those of He initialization, the
    largest gradient of a layer has length {plain:.0e} at the start without batch norm. One step, at
    rate 0.003, 0.03 or 0.3, makes the loss NaN. With batch norm all gradients stay finite at all
    three rates. At the start they grow {growth:.3f}-fold per layer toward the input (theory: 1.211,
    Yang et al. 2019), {total:.0f}-fold from layer 50 to layer 2. After 30 steps at rate 0.3 the
    gradient of layer 2, {first:.0f} long at the start, is less than a hundredth of that.
    """
    first, readout = random(1, 64, 32) / 4, random(2, 32, 10) / 6
    hidden = random(3, 49, 32, 32) * 2 / 32**0.5

    def loss(hidden, layer):
        h = layer(images[:128] @ first)
        h, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(layer(h @ w)), None), h, hidden)
        return cross_entropy(h @ readout, labels[:128])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    rates = {0.003: THIRD, 0.03: WITHOUT, 0.3: WITH}
    figure, axes = canvas("50 layers: batch norm stops the explosion of large weights", sharey=True)
    norms = {}
    for ax, layer, count in ((axes[0], plain, 1), (axes[1], normalized, 30)):
        for rate, color in {0: "black", **rates}.items():
            w = hidden
            for _ in range(count if rate else 0):
                w = w - rate * gradient(w, layer)
            norms[layer, rate] = np.linalg.norm(gradient(w, layer), axis=(1, 2))
            name = f"rate {rate:g}, after {count} steps" if rate else "before the first step"
            if np.isfinite(norms[layer, rate]).all():
                ax.semilogy(range(2, 51), norms[layer, rate], color=color, label=name)
    text = "after one step, at rates 0.003, 0.03 and 0.3:\nthe loss is NaN, so no gradient is drawn"
    axes[0].text(26, 1e3, text, ha="center", fontsize=11, color=WITHOUT)
    for ax, title in zip(axes, ("Without batch norm", "With batch norm"), strict=True):
        label(ax, title, "layer (50 is next to the loss)", "length of the layer's gradient")
    first_step = gradient(hidden, plain)
    lost = [not np.isfinite(loss(hidden - rate * first_step, plain)) for rate in rates]
    claim("without: the loss is lost after one step at all rates", all(lost))
    kept = all(np.isfinite(norms[normalized, rate]).all() for rate in rates)
    claim("with: finite at all rates", kept)
    start = norms[normalized, 0]
    growth, theory = (start[0] / start[-1]) ** (1 / 48), np.sqrt(np.pi / (np.pi - 1))
    claim("with, at the start: sqrt(pi / (pi - 1)) per layer", abs(growth / theory - 1) < 0.05)
    # How small it is depends on the rounding of 30 steps: of 40 starts that differ by 1e-6 the
    # median length is 0.3, the largest 4.9.
    end = norms[normalized, 0.3]
    claim("with, after 30 steps at rate 0.3: a hundredth", end[0] < start[0] / 100)
    numbers = {"plain": norms[plain, 0].max(), "growth": growth, "total": start[0] / start[-1]}
    return Answer(figure, numbers | {"first": start[0]})


def exploding_in_short():
    # 8 times the weights that would keep the outputs as large as the inputs
    weights = np.random.default_rng(0).normal(size=(25, 64, 64)).astype(np.float32)

    def loss(weights, normalize):
        x = images[:128]
        for w in weights:
            x = x @ w
            x = jbn.batch_norm_train(x, *jbn.init(64))[0] if normalize else x
        return jnp.square(x).mean()

    assert not jnp.isfinite(jax.grad(loss)(weights, False)).all()  # infinity or NaN
    assert jnp.isfinite(jax.grad(loss)(weights, True)).all()


def chain(layer, x, targets):
    """The loss of a chain of linear layers, as a function of all their weights."""

    def loss(weights):
        y, _ = jax.lax.scan(lambda h, w: (layer(h @ w), None), x, weights)
        return jnp.square(y[:, :10] - targets).mean()

    return loss


def orders(loss, weights, size, highest=3):
    """The Taylor terms of what a step changes: orders 1 to `highest`, in units of the first."""
    dw = jax.grad(loss)(weights)
    direction = -dw * size * norm(weights) / norm(dw)
    along, terms, factorial = (lambda t: loss(weights + t * direction)), [], 1.0
    for order in range(1, highest + 1):
        along, factorial = jax.jacfwd(along), factorial * order
        terms.append(along(0.0) / factorial)
    return jnp.abs(jnp.stack(terms) / terms[0])


def missed(loss, weights, sizes):
    """How far the loss's real change is from the predicted one, in units of the prediction."""
    before, dw = jax.value_and_grad(loss)(weights)
    steps = sizes * norm(weights) / norm(dw)
    real = jax.lax.map(lambda step: loss(weights - step * dw), steps) - before
    return jnp.abs(real / (steps * norm(dw) ** 2) + 1)  # predicted: -step * norm(dw)^2


def higher_order(steps):
    """What are the higher-order effects of an update, and what does normalization do to them?

    The gradient says what happens if one layer moves and the others stand still. But all layers
    move at once, and each pair, each triple and so on of their changes adds a term of its own.
    Normalization resets the size of every layer's output, so sizes no longer multiply through the
    chain: what the gradient cannot foresee is, all in all, damped, not gone.

    For layers w1 and w2, (w1 + d1)(w2 + d2) = w1·w2 + d1·w2 + w1·d2 + d1·d2: the gradient contains
    the two middle terms, and d1·d2 is the second-order term. In a chain of 10 linear layers, after
    a step of 1% of the weights' length, the second-order term is {plain2:.0%} of the first-order
    one, the change that the gradient predicts; with batch norm it is {norm2:.0%}. Not every order
    shrinks: the third is {plain3:.0%} without and {norm3:.0%} with. All orders together: the real
    change of the loss differs from the predicted one by {plain10:.0%} of it without and by
    {norm10:.0%} with batch norm. In 50 layers, after a step of 10%, it differs by {plain50:.0f}
    times the predicted change without and by {norm50:.1f} times with batch norm. (1.0 times is what
    one finds if the loss does not change at all. Medians of 8 random chains.)
    """
    x = (images[:256] - images[:256].mean(0)) @ random(1, 64, 32) / 4
    targets = 3 * jax.nn.one_hot(labels[:256], 10)
    sizes, off, terms = np.array([0.001, 0.003, 0.01, 0.03, 0.1]), {}, {}
    figure, (left, right) = canvas("Batch norm damps what the gradient cannot foresee")
    for layer, color, name in (
        (plain, WITHOUT, "without batch norm"),
        (normalized, WITH, "with batch norm"),
    ):
        loss = chain(layer, x, targets)
        for depth, line in ((50, "s--"), (10, "o-")):
            weights = random(depth, 8, depth, 32, 32) / 32**0.5
            each = jax.jit(jax.vmap(functools.partial(missed, loss), in_axes=(0, None)))
            off[layer, depth] = np.median(each(weights, sizes), axis=0)
            text = f"{depth} layers, {name}"
            right.loglog(100 * sizes, off[layer, depth], line, color=color, label=text)
        each = jax.jit(jax.vmap(functools.partial(orders, loss), in_axes=(0, None)))
        terms[layer] = 100 * np.median(each(weights, 0.01), axis=0)  # of the 10 layers
        shift = 0.2 if layer is normalized else -0.2
        bars = left.bar(np.arange(1, 4) + shift, terms[layer], 0.4, color=color, label=name)
        left.bar_label(bars, fmt="%.3g", fontsize=8)
    left.set_xticks(range(1, 4), ["1: the prediction", "2: pairs of layers", "3: triples"])
    title = "10 layers, a step of 1 %: what each order adds"
    label(left, title, "order of the term", "size of the term, % of the prediction")
    right.axhline(1, color=GREY, lw=1, label="off by as much as was predicted")
    title = "All orders: how far the loss is from the prediction"
    label(right, title, "step, % of the weights' length", "error / predicted change of the loss")
    right.legend(fontsize=8)
    better = all((off[normalized, d] < off[plain, d]).all() for d in (10, 50))
    claim("the prediction is better with batch norm", better)
    claim(
        "50 layers, 10 %: bounded with batch norm", off[plain, 50][-1] > 2 > off[normalized, 50][-1]
    )
    claim("the second-order term is smaller", terms[normalized][1] < terms[plain][1] / 3)
    numbers = {}
    for name, layer in (("plain", plain), ("norm", normalized)):
        numbers |= {f"{name}{order}": terms[layer][order - 1] / 100 for order in (2, 3)}
        numbers |= {f"{name}10": off[layer, 10][2], f"{name}50": off[layer, 50][-1]}
    return Answer(figure, numbers)


def higher_order_in_short():
    w1, w2, d1, d2 = 3.0, 5.0, 0.1, 0.2  # two layers, one number each, and a step of both
    first_order = d1 * w2 + w1 * d2  # what the gradient knows
    assert np.isclose((w1 + d1) * (w2 + d2), w1 * w2 + first_order + d1 * d2)
    x = images[:, 20:21]
    y = [jbn.batch_norm_train(w * x, *jbn.init(1))[0] for w in (w1, w1 + d1)]
    assert jnp.allclose(*y, atol=1e-3)  # normalized, the first layer's size no longer multiplies


def noisy(x, params, state):
    """Batch norm, then a random shift and factor for each channel, other ones at each step."""
    y, state = train_mode(x, params, state)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
    shift, factor = (jax.random.normal(key, y.shape[-1:]) for key in keys)
    return y * jnp.exp(0.5 * factor) + shift, state


def unsettled(steps):
    """Why does it work? What is not settled?

    Three explanations are well known, and none has won: that it keeps each layer's inputs from
    shifting while the layers before it learn (Ioffe & Szegedy 2015); that it makes the loss
    smoother, so that gradients hold for longer steps (Santurkar et al. 2018; Bjorck et al. 2018);
    that it separates the length of the weights from their direction and so tunes the learning rate
    by itself (Kohler et al. 2019; Arora et al. 2019). The second and third are measured above, in
    the answers on higher-order effects and on BN(Wu) = BN((aW)u); the first is tested here.

    Random shifts and factors after each batch norm, new ones at every step, make the inputs of the
    second layer shift by {shift_noisy:.2f} of their standard deviation per step. With plain batch
    norm it is {shift_norm:.3f}, without batch norm {shift_none:.3f}. Yet after {steps} steps with
    sigmoids the training loss is {loss_noisy:.2f} with that noise, {loss_norm:.2f} with plain batch
    norm and {loss_none:.2f} without batch norm. The network whose inputs shift most trains better
    than the one without batch norm, so less shift cannot be the whole explanation.
    """
    layers = {
        "none": (no_norm, WITHOUT, "no batch norm"),
        "norm": (train_mode, WITH, "batch norm"),
        "noisy": (noisy, THIRD, "batch norm, then noise"),
    }
    figure, (left, right) = canvas("The inputs shift more, and it still trains better than without")
    numbers = {}
    for name, (layer, color, text) in layers.items():
        _, losses, path = fit(create(), layer, steps, activation=jax.nn.sigmoid)
        shifts = shift_of_second_layer(path, layer)
        left.semilogy(smooth(losses), color=color, label=text)
        right.semilogy(smooth(shifts), color=color, label=text)
        numbers |= {f"loss_{name}": losses[-10:].mean(), f"shift_{name}": np.median(shifts)}
    others = max(numbers["shift_norm"], numbers["shift_none"])
    claim("the noise shifts inputs more", numbers["shift_noisy"] > 3 * others)
    losses = [numbers[f"loss_{name}"] for name in ("norm", "noisy", "none")]
    claim("with noise it still trains better than without batch norm", losses == sorted(losses))
    label(left, "Training", "training step", "training loss (mean of 10 steps, nats)")
    title = "How far the second layer's inputs shift at each step"
    label(right, title, "training step", "shift of the mean, standard deviations")
    return Answer(figure, {}, {"steps": steps, **numbers})


def shift_of_second_layer(path, layer):
    """How far the mean of a channel moves at each step, in its standard deviations: the median."""

    @jax.jit
    @jax.vmap
    def moments(net):
        y, _ = layer(images[TRAIN] @ net.weights[0], net.norms[0], net.states[0])
        y = jax.nn.sigmoid(y) @ net.weights[1]
        return y.mean(0), y.std(0)

    mean, std = moments(path)
    return np.median(abs(np.diff(mean, axis=0)) / std[:-1], axis=1)


def unsettled_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    params, state = jbn.init(8)
    for k in range(3):  # batch norm, then another shift at every step: its outputs are not steady
        y, state = jbn.batch_norm_train(x, params, state)
        y = y + jax.random.normal(jax.random.key(k), (8,))
        assert jnp.abs(y.mean(0)).max() > 0.1
