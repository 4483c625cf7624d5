"""Questions about gamma and beta: how they start, how they are trained, where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from questions_common import (
    GREY,
    THIRD,
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
    norm,
    random,
    smooth,
    train_mode,
)

import jbn


def rescaling(steps):
    """Why the rescaling step at all? What does a network lose without gamma and beta?

    Without them every channel is forced to mean 0 and variance 1, whatever the task needs; with
    them the layer can represent all that it could before. How much that matters depends on what
    follows, so train both and look.

    The same network was trained for {steps} steps with gamma and beta, and with both held at their
    start, 1 and 0. With sigmoids the training loss ends at {sigmoid_trained:.3f} with them and
    {sigmoid_fixed:.3f} without; with ReLUs at {relu_trained:.3f} and {relu_fixed:.3f}. Sigmoids
    gain more. One reason: no weight can replace gamma there, as it sits between the normalization
    and the bend.
    """
    figure, axes = canvas("Training with gamma and beta reaches a lower loss", sharey=True)
    numbers = {}
    for ax, name, activation in zip(
        axes, ("sigmoid", "relu"), (jax.nn.sigmoid, jax.nn.relu), strict=True
    ):
        for fixed, color in ((False, WITH), (True, WITHOUT)):
            _, losses, _ = fit(create(), train_mode, steps, activation=activation, fixed=fixed)
            how = "fixed" if fixed else "trained"
            numbers[f"{name}_{how}"] = losses[-10:].mean()
            what = "held at 1 and 0" if fixed else "trained"
            ax.semilogy(smooth(losses), color=color, label=f"gamma and beta {what}")
        title = {"sigmoid": "Sigmoid after each batch norm", "relu": "ReLU after each batch norm"}
        label(ax, title[name], "training step", "training loss (mean of 10 steps, nats)")
    for name in ("sigmoid", "relu"):
        trained, fixed = (numbers[f"{name}_{how}"] for how in ("trained", "fixed"))
        claim(f"{name}: the loss is lower with gamma and beta trained", trained < fixed)
    return Answer(figure, {}, {"steps": steps, **numbers})


def rescaling_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    bare = jbn.init(8, use_scale=False, use_bias=False)
    y, _ = jbn.batch_norm_train(x, *bare)  # neither gamma nor beta
    assert jnp.allclose(y.mean(0), 0, atol=1e-4)
    assert jnp.allclose(y.std(0), 1, atol=1e-3)  # whatever the task needs


def original_moments(steps):
    """Do gamma and beta become the original standard deviation and mean in practice?

    No: they could, and then the layer would do nothing, but nothing pulls them there. Training
    moves them to whatever lowers the loss.

    After {steps} steps, the gammas of a network's 64 hidden channels lie between {low:.2f} and
    {high:.2f}, the standard deviations of their inputs between {std_low:.2f} and {std_high:.2f}. In
    the median channel gamma differs from the standard deviation by {gamma_off:.0%}, and beta from
    the mean by {beta_off:.1f} standard deviations.
    """
    net, _, _ = fit(create(), train_mode, steps)
    gamma, beta = (np.concatenate(p) for p in zip(*net.norms, strict=True))
    mean, std = (np.concatenate([getattr(s, n) for s in net.states]) for n in ("mean", "var"))
    std = np.sqrt(std)
    gamma_off, beta_off = np.median(abs(gamma / std - 1)), np.median(abs(beta - mean) / std)
    claim("gamma is not the standard deviation", gamma_off > 0.1)
    claim("beta is not the mean", beta_off > 0.1)
    figure, (left, right) = canvas("Trained gamma and beta are not the original moments")
    left.plot(std, gamma, "o", color=WITH, label="one channel")
    right.plot(mean, beta, "o", color=WITH, label="one channel")
    for ax in (left, right):
        ax.axline((1, 1), slope=1, color="black", lw=0.8, label="equal: the layer would do nothing")
    left.axhline(1, color=GREY, ls="--", label="start: gamma 1")
    right.axhline(0, color=GREY, ls="--", label="start: beta 0")
    left.set_ylim(0, max(2.5, gamma.max()))
    label(left, "Gamma", "standard deviation of the channel's input", "trained gamma")
    label(right, "Beta", "mean of the channel's input", "trained beta")
    trained = {"low": gamma.min(), "high": gamma.max(), "std_low": std.min()}
    trained |= {"std_high": std.max(), "gamma_off": gamma_off, "beta_off": beta_off}
    return Answer(figure, {}, {"steps": steps, **trained})


def original_moments_in_short():
    x = images @ np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
    params, state = jbn.init(1)

    def loss(params):  # asks for the sign of the input: nothing here wants x itself back
        return jnp.square(jbn.batch_norm_train(x, params, state)[0] - jnp.sign(x)).mean()

    for _ in range(100):
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, jax.grad(loss)(params))
    assert abs(params.scale[0] - x.std()) > 0.5  # trained gamma is not the standard deviation


def created(steps):
    """Where do I create gamma and beta, in which shape? Is there one pair for the whole network?

    Create them once, beside the weights, and hand them to the optimizer: one vector gamma and one
    vector beta for each batch-norm layer, with one number per channel of that layer. If the forward
    pass creates them, they are new at every step and never learn.

    For a layer of 32 channels `jbn.init(32)` gives gamma {gamma}, all ones, and beta {beta}, all
    zeros. Kept beside the weights, a gamma moved by up to {moved:.2f} in {steps} steps of training.
    Created in the forward pass, all of them are still exactly 1.
    """
    params, _ = jbn.init(32)
    claim("gamma starts at one, beta at zero", bool((params.scale == 1).all()))
    claim("beta starts at zero", bool((params.bias == 0).all()))

    def created_anew(x, _, state):
        return train_mode(x, jbn.init(32)[0], state)

    figure, (left, right) = canvas("Gamma and beta live beside the weights, one vector per layer")
    gammas = {}
    for layer, color, name in (
        (train_mode, WITH, "kept beside the weights"),
        (created_anew, WITHOUT, "created in the forward pass"),
    ):
        _, _, path = fit(create(), layer, steps)
        gammas[layer] = np.asarray(path.norms[0].scale)
        lines = right.plot(gammas[layer], color=color, lw=0.7)
        lines[0].set_label(name)
    moved, stuck = (float(abs(g[-1] - 1).max()) for g in gammas.values())
    claim("kept, gamma moves; created anew, it does not", moved > 0.01 and stuck == 0)
    label(right, "The 32 gammas of the first layer", "training step", "gamma", "upper left")
    rows = ("weights 64 x 32", "gamma 32, beta 32", "weights 32 x 32", "gamma 32, beta 32",
            "weights 32 x 10")  # fmt: skip
    for k, text in enumerate(rows):
        norm_layer = text.startswith("gamma")
        box = {"boxstyle": "round", "fc": WITH if norm_layer else "white", "ec": "0.3"}
        color = "white" if norm_layer else "black"
        left.text(0.05, 0.9 - 0.2 * k, text, color=color, bbox=box, fontsize=11, va="center")
        note = "batch norm; also keeps mean 32, variance 32" if norm_layer else "dense layer"
        left.text(0.42, 0.9 - 0.2 * k, note, fontsize=10, va="center")
        if k:
            arrow = {"arrowstyle": "->", "color": "0.4"}
            left.annotate("", (0.15, 0.955 - 0.2 * k), (0.15, 1.045 - 0.2 * k), arrowprops=arrow)
    left.set_title("What this network of two hidden layers holds", fontsize=11)
    left.axis("off")
    numbers = {"gamma": params.scale.shape, "beta": params.bias.shape}
    return Answer(figure, numbers, {"steps": steps, "moved": moved})


def created_in_short():
    weights = [np.random.default_rng(k).normal(size=(64, 64)) / 8 for k in range(3)]
    norms = [jbn.init(64)[0] for _ in weights]  # one pair per layer
    parameters = {"weights": weights, "norms": norms}  # what the optimizer gets
    opt_state = optax.adam(1e-3).init(parameters)
    assert [params.scale.shape for params in norms] == [(64,), (64,), (64,)]
    assert opt_state[0].mu["norms"][0].scale.shape == (64,)  # so Adam looks after gamma as well


def updated(steps):
    """How are gamma and beta initialized and updated?

    Gamma starts at 1 and beta at 0. Each step moves them against their gradients, which are sums
    over the whole batch and all positions: Σ dy · normalized for gamma, Σ dy for beta, where dy is
    the gradient with respect to the layer's output.

    For 1797 images of 8 x 8 positions and 16 channels, these sums by hand in float64 and `jax.grad`
    differ by {error:.0e}. A step p - rate · dp by hand differs from `optax.sgd`'s by {step:.0e}. A
    sum over the batch alone, at one position, is another number: it is off by {wrong:.0%} of the
    gradient.
    """
    kernel, readout = random(1, 3, 3, 1, 16) / 3, random(2, 16, 10) / 4
    x = jax.lax.conv_general_dilated(
        images.reshape(-1, 8, 8, 1), kernel, (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    params, state = jbn.init(16)

    def head(y):
        return cross_entropy(jax.nn.relu(y).mean((1, 2)) @ readout, labels)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: head(jbn.batch_norm_train(x, p, state)[0]))(params)

    dy = np.asarray(jax.grad(head)(jbn.batch_norm_train(x, params, state)[0]), np.float64)
    wide = np.asarray(x, np.float64)
    xhat = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    hand = jbn.Params(scale=(dy * xhat).sum((0, 1, 2)), bias=dy.sum((0, 1, 2)))
    one_position = jbn.Params(scale=(dy * xhat)[:, 4, 4].sum(0), bias=dy[:, 4, 4].sum(0))
    found = gradient(params)
    far = lambda a, b: max(float(np.abs(p - q).max()) for p, q in zip(a, b, strict=True))
    error, wrong = far(found, hand), far(one_position, hand) / far(hand, (0, 0))
    claim("dgamma = sum(dy * normalized) and dbeta = sum(dy)", error < 1e-6)
    claim("the sum over the batch alone is not the gradient", wrong > 0.5)
    updates, _ = optax.sgd(0.5).update(found, optax.sgd(0.5).init(params))
    step = far(updates, jax.tree.map(lambda h: -0.5 * h, hand))
    claim("one step by hand is optax's", step < 1e-6)
    path = [params]
    for _ in range(min(steps, 60)):
        path.append(jax.tree.map(lambda p, d: p - 0.5 * d, path[-1], gradient(path[-1])))
    figure, (left, right) = canvas("Each channel's gamma and beta move by their own sum")
    for name, greek, color in (("scale", "gamma", WITH), ("bias", "beta", WITHOUT)):
        by_hand, by_jax = getattr(hand, name), getattr(found, name)
        left.plot(by_hand, by_jax, "o", color=color, label=f"{greek}, 16 channels")
        left.plot(getattr(one_position, name), by_jax, "x", color=GREY, ms=4)
        right.plot([getattr(p, name) for p in path], color=color, lw=0.8)[0].set_label(greek)
    left.plot([], [], "x", color=GREY, label="summed over the batch at one position: wrong")
    left.axline((0, 0), slope=1, color="black", lw=0.8, label="equal")
    label(left, "Gradients at the first step", "the sum by hand", "jax.grad")
    label(right, "The 16 channels in training", "step of gradient descent, rate 0.5", "value")
    return Answer(figure, {"error": error, "step": step, "wrong": wrong})


def updated_in_short():
    x = images.reshape(-1, 8, 8, 1) * jnp.array([1.0, 2.0])  # 2 channels
    params, state = jbn.init(2)
    dy = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)
    y, pull_back = jax.vjp(lambda p: jbn.batch_norm_train(x, p, state)[0], params)
    (gradient,) = pull_back(dy)  # y is the normalized value, as gamma is 1 and beta 0
    assert jnp.allclose(gradient.scale, (dy * y).sum((0, 1, 2)), atol=1e-2)
    assert jnp.allclose(gradient.bias, dy.sum((0, 1, 2)), atol=1e-2)
    params = jax.tree.map(lambda p, d: p - 1e-3 * d, params, gradient)  # gradient descent
    assert (params.scale != 1).all()


def weight_scale(steps):
    """Why is BN(Wu) = BN((aW)u), and what does that buy?

    W are the weights of the layer before, u its inputs, and a is any positive number. The factor a
    multiplies the mean and the standard deviation alike, so it cancels: the size of the weights
    cannot blow up the output, and a larger weight only gets a smaller gradient. So the layer
    forgives a learning rate that is too high: the weights grow until the steps are small enough.

    From a = 0.01 to a = 100 the output changes by {change:.0e} at most, and the gradient is 1/a of
    what it was, to within {slope:.0e}. The gradient is always at right angles to W, so every step
    makes W longer: by {longer:.0%} in 30 steps at learning rate 0.3. A step turns W in proportion
    to rate / |W|², which fell to {rate:.0%} of what it was.
    """
    params, state = jbn.init(16)
    readout, start = random(2, 16, 10), random(1, 64, 16) / 8

    @jax.jit
    def output(w):
        return jbn.batch_norm_train(images @ w, params, state, eps=1e-12)[0]

    gradient = jax.jit(jax.grad(lambda w: cross_entropy(output(w) @ readout, labels)))
    factors = np.logspace(-2, 2, 9)
    norms = np.array([norm(gradient(a * start)) for a in factors])
    change = max(float(jnp.abs(output(a * start) - output(start)).max()) for a in factors)
    slope = np.abs(norms * factors / norms[4] - 1).max()
    claim("the output does not change", change < 1e-4)
    claim("the gradient is divided by a", slope < 1e-3)
    path = [start]
    for _ in range(30):
        dw = gradient(path[-1])
        cosine = abs((path[-1] * dw).sum()) / (norm(path[-1]) * norm(dw))
        claim("the gradient is orthogonal to W", cosine < 1e-3)
        path.append(path[-1] - 0.3 * dw)
    lengths = np.array([norm(w) / norm(start) for w in path])
    claim("every step lengthens W", np.all(np.diff(lengths) > 0))
    figure, (left, right) = canvas("Larger weights before batch norm: same output, smaller steps")
    left.loglog(factors, norms, "o", color=WITH, label="measured")
    left.loglog(factors, norms[4] / factors, color="black", lw=0.8, label="1 / a")
    title = "Weights a times as large: gradient 1/a"
    label(left, title, "factor a on the weights W", "length of the gradient")
    right.plot(lengths, color=THIRD, label="length of W")
    right.plot(lengths**-2.0, color=WITH, label="effective learning rate, rate / length²")
    label(right, "Each step lengthens W and so slows the next", "step", "relative to the start")
    numbers = {"change": change, "slope": slope, "longer": lengths[-1] - 1}
    return Answer(figure, numbers | {"rate": lengths[-1] ** -2})


def weight_scale_in_short():
    w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)

    def output(w):
        return jbn.batch_norm_train(images @ w, *jbn.init(8), eps=1e-12)[0]

    assert jnp.allclose(output(w), output(100 * w), atol=1e-3)
    gradient = jax.grad(lambda w: jax.nn.relu(output(w)).mean())
    assert jnp.allclose(gradient(w), 100 * gradient(100 * w), atol=1e-3)
