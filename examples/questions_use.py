"""Questions about using the layer: inference, and which layers it belongs after."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from questions_common import (
    GREY,
    TRAIN,
    WITH,
    WITHOUT,
    Answer,
    accuracy,
    canvas,
    claim,
    create,
    cross_entropy,
    eval_mode,
    fit,
    forward,
    images,
    label,
    labels,
    normalized,
    plain,
    random,
    train_mode,
)

import jbn


def running_averages(steps):
    """What are the moving averages for, and what is frozen at inference?

    In training an output depends on the other images of the batch; at inference it must not, so the
    layer then uses averages of the means and variances that it saw in training. At inference
    everything is frozen: these averages, gamma and beta.

    In training mode the normalized value of one digit has a standard deviation of {small:.2f} over
    random batches of 4, and of {large:.2f} over batches of 256; a batch of 1 has no variance, and
    jbn refuses it. The averages start at mean 0 and variance 1. Momentum is the weight of the old
    average, so after {k} batches that start still weighs momentum^{k}: {fast:.0e} at momentum 0.9,
    {slow:.2f} at 0.99. In evaluation mode that digit's output is {alone:.3f}, alone or among
    {among}.
    """
    x, (params, state), count = images @ random(1, 64, 4) + 2, jbn.init(4), 300
    draw = np.random.default_rng(0).choice
    batches = draw(x, (count, 32))
    means = batches.astype(np.float64).mean(1)[:, 0]
    update = jax.jit(lambda s, rows, m: jbn.batch_norm_train(rows, params, s, momentum=m)[1])
    figure, (left, right) = canvas("Training looks at the batch; inference at remembered averages")
    left.plot(range(1, count + 1), means, ".", color="#c4c4c4", ms=4, label="one batch of 32")
    for momentum, color in ((0.99, WITH), (0.9, WITHOUT)):
        step = lambda s, rows, m=momentum: update(s, rows, m)
        states = list(itertools.accumulate(batches, step, initial=state))
        average = lambda old, new, m=momentum: m * old + (1 - m) * new
        expected = functools.reduce(average, means, 0.0)
        off = abs(float(states[-1].mean[0]) - expected)
        claim("new = momentum * old + (1 - momentum) * batch", off < 1e-4)
        name = f"moving average, momentum {momentum}"
        left.plot([s.mean[0] for s in states], color=color, label=name)
    label(left, "What is remembered: the mean of one channel", "training step", "mean")
    one = jax.jit(
        jax.vmap(lambda rest: normalized(jnp.concatenate([x[:1], rest]))[0, 0])  # the first digit
    )
    outputs = {n: np.asarray(one(draw(x, (40, n - 1)))) for n in (2, 4, 16, 64, 256)}
    spread = [outputs[n].std() for n in (4, 64, 256)]
    claim("other images matter less in larger batches", spread[0] > 2 * spread[1] > 2 * spread[2])
    evaluate = lambda rows: float(jbn.batch_norm_eval(rows, params, states[-1])[0, 0])
    alone, among = evaluate(x[:1]), evaluate(x)
    claim("in evaluation they do not matter at all", np.isclose(alone, among, rtol=1e-6))
    claim(
        "training on one image is refused",
        refuses(lambda: jbn.batch_norm_train(x[:1], params, state)),
    )
    for n, values in outputs.items():
        name = "training mode, 40 random batches" if n == 2 else None
        right.plot([n] * 40, values, ".", color=WITHOUT, label=name)
    right.axhline(alone, color=WITH, label="evaluation mode, any batch size from 1 on")
    right.set_xscale("log", base=2)
    right.set_xticks(list(outputs), list(outputs))
    label(right, "One digit among different others", "batch size", "output for that digit")
    numbers = {"small": spread[0], "large": spread[2], "alone": alone, "among": len(x)}
    start = {"k": count, "fast": 0.9**count, "slow": 0.99**count}
    return Answer(figure, numbers | start)


def running_averages_in_short():
    params, state = jbn.init(64)
    for batch in images[:1600].reshape(100, 16, 64):  # training: the state goes in and comes out
        y, state = jbn.batch_norm_train(batch, params, state, momentum=0.9)
    among = jbn.batch_norm_eval(images, params, state)  # inference: the state only goes in
    alone = jbn.batch_norm_eval(images[:1], params, state)
    assert jnp.allclose(among[:1], alone, atol=1e-5)
    assert not jnp.allclose(y[:1], jbn.batch_norm_eval(batch[:1], params, state), atol=0.1)


def refuses(call):
    try:
        call()
    except ValueError:
        return True
    return False


def second_pass(steps):
    """Do I go through the training set again for inference?

    No: the moving averages were collected while training, and they are ready. One more pass pays
    when the weights are no longer those of the last steps, for example after averaging weights;
    then `jbn.recalibrate` computes new statistics.

    After {steps} steps at a learning rate of 1, so high that the weights never settle, the network
    is right on {running:.1%} of the test digits with its moving averages, and on {exact:.1%} with
    statistics taken from the whole training set. Now average the weights over the second half of
    training. With the old statistics the averaged weights are right on {old:.1%}; with new ones,
    computed in one pass, on {new:.1%}.
    """
    net, _, path = fit(create(), train_mode, steps, rate=1.0)
    test_x, test_y = images[TRAIN.stop :], labels[TRAIN.stop :]
    right_in = lambda n: accuracy(forward(n, test_x, eval_mode)[0], test_y)
    collect = lambda x, params, state: jbn.batch_norm_train(x, params, state, momentum=0)
    made_anew = lambda n: forward(n, images[TRAIN], collect)[1]
    average = jax.tree.map(lambda leaves: leaves[len(leaves) // 2 :].mean(0), path)
    average = average._replace(states=net.states)
    rates = [right_in(n) for n in (net, made_anew(net), average, made_anew(average))]
    if steps >= 200:  # before that the averages still hold some of their start
        claim("the averages are as good for the last weights", abs(rates[0] - rates[1]) < 0.05)
    claim("averaged weights need new statistics", rates[3] > rates[2])
    figure, (left, right) = canvas("One more pass is for changed weights only")
    names = ["moving averages\nof training", "one more pass over\nthe training set"]
    titles = ("The weights of the last step", "Weights averaged over half the training")
    for ax, title, pair in zip((left, right), titles, (rates[:2], rates[2:]), strict=True):
        bars = ax.bar(names, [100 * r for r in pair], color=(GREY, WITH), width=0.5)
        ax.bar_label(bars, fmt="%.1f %%")
        ax.set_ylim(0, 110)
        label(ax, title, "statistics used at inference", "test digits that are right, %", None)
    numbers = dict(zip(("running", "exact", "old", "new"), rates, strict=True))
    return Answer(figure, {}, {"steps": steps, **numbers})


def second_pass_in_short():
    from jbn.recalibrate import recalibrate

    w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)  # the new weights
    params, state = jbn.init(8)  # statistics that do not belong to them
    collect = lambda states, batch: {"norm": jbn.moments(batch @ w)}
    new = recalibrate(collect, {"norm": state}, [images[:900], images[900:]])["norm"]
    assert jnp.allclose(new.mean, (images @ w).mean(0), atol=1e-4)
    y = jbn.batch_norm_eval(images @ w, params, new)
    assert jnp.allclose(y.std(0), 1, atol=1e-3)


def output_layer(steps):
    """In hidden layers, or before the output as well? And what of the bias before it?

    In hidden layers: the output must be free to say that all images of a batch are alike, and batch
    norm removes what they have in common. A bias just before batch norm is removed with the mean,
    so leave it out; beta does its work.

    On all digits together a linear classifier is right on {mixed:.0%}, with or without batch norm
    on its outputs. On batches whose images all show the same number it is right on {without:.0%}
    without and on {with_it:.0%} with. The gradient of the loss with respect to a bias before batch
    norm is {zero:.0e} at most; without batch norm it is up to {slope:.1f}.
    """
    one_hot = jax.nn.one_hot(labels, 10)
    logits = images @ jnp.asarray(np.linalg.lstsq(images, one_hot, rcond=1e-5)[0])
    m, (_, state) = jbn.moments(logits), jbn.init(10)
    identity = jbn.Params(jnp.sqrt(m.m2 / m.count + 1e-5), m.mean)  # on all digits together
    digits = [np.flatnonzero(digit == labels)[:170] for digit in range(10)]
    batches = [np.arange(len(labels)), *digits]
    bound_output = lambda rows: jbn.batch_norm_train(rows, identity, state)[0]
    free, bound = (
        [accuracy(output(logits[rows]), labels[rows]) for rows in batches]
        for output in (plain, bound_output)
    )
    claim("on all digits together normalized logits are as good", free[0] == bound[0])
    claim("on batches of one digit they fail", max(bound[1:]) < 0.5 < min(free[1:]))
    hidden, shift, readout = images @ random(1, 64, 16), random(3, 1, 16), random(2, 16, 10) / 4

    def curve(layer, biases):
        loss = lambda b: cross_entropy(layer(hidden + b * shift) @ readout, labels)
        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(biases)

    biases = jnp.linspace(-4, 4, 41)
    (losses, slopes), (losses_bn, slopes_bn) = curve(plain, biases), curve(normalized, biases)
    zero, slope = (float(jnp.abs(s).max()) for s in (slopes_bn, slopes))
    claim("a bias before batch norm changes no loss", np.ptp(losses_bn) < 1e-5)
    claim("and has no gradient", zero < 1e-5 < slope)
    figure, (left, right) = canvas("Batch norm takes the mean away: wrong for an answer")
    for x, rates, loss, color, name in (
        (-0.2, free, losses, WITHOUT, "no batch norm"),
        (0.2, bound, losses_bn, WITH, "batch norm"),
    ):
        heights = 100 * np.array(rates)
        left.bar(np.arange(11) + x, heights, 0.4, color=color, label=f"{name} on the output")
        right.plot(biases, loss, color=color, label=f"{name} after the bias")
    left.set_xticks(range(11), ["all", *range(10)])
    left.set_ylim(0, 100)
    title = "Batches of images of one number (training mode)"
    label(left, title, "number that all images show", "correct, % of the batch", None)
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    label(right, "A bias before batch norm changes nothing", "size of the bias", "loss (nats)")
    numbers = {"mixed": free[0], "without": np.mean(free[1:]), "with_it": np.mean(bound[1:])}
    return Answer(figure, numbers | {"zero": zero, "slope": slope})


def output_layer_in_short():
    params, state = jbn.init(64)
    y, _ = jbn.batch_norm_train(images, params, state)
    shifted, _ = jbn.batch_norm_train(images + 3.0, params, state)  # a bias of 3 before it
    assert jnp.allclose(y, shifted, atol=1e-3)
    zeros = images[labels == 0]  # images of one number have bright pixels in common
    y, _ = jbn.batch_norm_train(zeros, params, state)
    assert zeros.mean(0).max() > 0.5
    assert jnp.abs(y.mean(0)).max() < 1e-3  # what they have in common is gone
