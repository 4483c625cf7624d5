"""Scalars of every batch norm of a model, made inside jit, for a logger or `jbn.health.Monitor`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jbn.core import validate
from jbn.health import checkpoints
from jbn.health.channels import Batch, measure
from jbn.health.findings import Limits
from jbn.types import Moments

_LIMITS = Limits()


def metrics(
    variables: Any,
    moments: Mapping[str, Moments] | None = None,
    *,
    previous: Any = None,
    momentum: float = 0.99,
    gradients: Any = None,
    pairs: Mapping[str, str] | Sequence[Any] = (),
    eps: float = 1e-5,
    limits: Limits = _LIMITS,
) -> dict[str, Array]:
    """Scalars of every batch norm, by "layer/name": for TensorBoard, wandb, CLU, a CSV or Monitor.

    Call it in the jitted training step. It reads vectors of the size of the features, and with
    `pairs` the weights; it never reads activations. The names after the layer's:

    Always:
        signal: the smallest standard deviation of a normalized value, 1 in a working layer.
        dead, one_sided: shares of the channels that are, as in `report`.
        nonfinite: how many values of the variables and moments are not finite.
        ratio: the largest |mean| / std.
        std, scale, bias: root mean squares over the channels; std is the running one.
        missing: 1, and nothing else, for a layer whose mean or var is missing.
    Where the batch is known, by `moments` or `previous`, signal and dead are those of the batch:
        drift: the largest distance of the batch's mean from the running one, in running standard
            deviations.
        spread: the largest factor between the batch's and the running standard deviation, either
            way.
        input_std: the batch's standard deviation, root mean square over the channels.
    With `pairs`:
        weight: |W|, the norm of the weights before the layer.
        effective_lr: |gradient| / |W|^2, with `gradients`.
        update: |W - previous W| / |previous W|, with `previous`.

    Channels that are not finite are left out of every number but nonfinite; a number of which
    nothing is left is NaN. Of stacked layers (nn.scan) each number is that of the worst one.

    Args:
        variables: as of `model_report`, such as linen variables, or an nnx module or state.
        moments: of the layers' inputs in one batch, by the layer's name, as from `input_moments`.
        previous: the variables before this step's update. The batch's statistics follow from the
            change of the running ones, without moments and without a pass over activations.
        momentum: of the layers, where `previous` is given.
        gradients: tree of the gradients, with the paths of the parameters.
        pairs: the weights before each norm: a dict such as {"BatchNorm_0": "Conv_0/kernel"}, or the
            pairs of `jbn.fold.find_pairs`.
        eps: of the layers.
        limits: which channels count as dead or one-sided.

    Returns:
        A flat dict from "layer/name" to a float scalar.

    Raises:
        ValueError: no batch norm in the tree, moments or pairs of a layer that is not there,
            moments of another shape, a weight or gradient that is not there, gradients without
            pairs.
    """
    validate.epsilon(eps)
    validate.update(momentum)
    found, damaged = checkpoints.find(variables)
    if not found and not damaged:
        raise ValueError(
            "no batch norm in these variables, expected somewhere both a mean and a var: pass "
            "batch_stats too"
        )
    moments = moments or {}
    before = {} if previous is None else checkpoints.find(previous)[0]
    weights = _weights(pairs)
    for what, names in (("moments", moments), ("pairs", weights)):
        if unknown := sorted(set(names) - set(found)):
            raise ValueError(f"{what} of {unknown}, expected names among the layers: {list(found)}")
    if gradients is not None and not weights:
        raise ValueError(
            "gradients came without pairs, expected the weights before each norm: pass "
            "pairs={'BatchNorm_0': 'Conv_0/kernel'}, or what jbn.fold.find_pairs returns"
        )
    result = {f"{name}/missing": jnp.ones((), jnp.float32) for name in damaged}
    for name, layer in found.items():
        numbers = _layer(name, layer, moments.get(name), before.get(name), momentum, eps, limits)
        result |= {f"{name}/{key}": value for key, value in numbers.items()}
    trees = [_parameters(tree) for tree in (variables, gradients, previous)]
    for name, path in weights.items():
        lead = jnp.shape(found[name].mean)[:-1]
        numbers = _weight(path, lead, *trees)
        result |= {f"{name}/{key}": value for key, value in numbers.items()}
    return result


def _layer(name, layer, moments, before, momentum, eps, limits):
    """The numbers of one layer that need no weights."""
    widen = lambda v: (
        None if v is None else jnp.asarray(v, jnp.promote_types(jnp.result_type(v), jnp.float32))
    )
    scale, bias, mean, var = map(widen, layer[:4])
    vectors = [v for v in (scale, bias, mean, var) if v is not None]
    running, batch = Batch(mean, var), None
    if moments is not None:
        count, batch_mean, m2 = map(widen, moments)
        if batch_mean.shape != mean.shape:
            raise ValueError(
                f"moments of {name} have shape {batch_mean.shape}, expected {mean.shape}: those of "
                "the layer's input"
            )
        batch = Batch(batch_mean, m2 / count)
        vectors += batch
    elif before is not None:
        running = Batch(widen(before.mean), widen(before.var))
        batch = _batch(running, Batch(mean, var), momentum)
    m = measure(scale, bias, running, batch, eps, jnp)
    finite = jnp.stack([jnp.isfinite(v) for v in (*vectors, *(batch or ()))]).all(0)
    dead = finite & (m.signal <= limits.constant)
    alive = finite & ~dead
    judged, one_sided = alive, m.one_sided
    if scale is not None:
        largest = jnp.where(finite, jnp.abs(scale), 0).max(-1, keepdims=True)
        judged = alive & (jnp.abs(scale) > limits.scale * largest)
    if moments is None and batch is not None:
        # In training the batch is normalized by its own statistics, so its mean becomes the bias.
        one_sided = 0 * var if bias is None else bias / (1 if scale is None else jnp.abs(scale))
    numbers = {
        "signal": _worst(m.signal, finite, jnp.min),
        "dead": _share(dead, finite),
        "one_sided": _share(judged & (jnp.abs(one_sided) > limits.one_sided), finite),
        "nonfinite": jnp.sum(jnp.stack([~jnp.isfinite(v) for v in vectors])),
        "ratio": _worst(m.ratio, alive, jnp.max),
        "std": jnp.sqrt(_worst(var, finite, jnp.mean)),
    }
    for key, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            numbers[key] = jnp.sqrt(_worst(jnp.square(value), finite, jnp.mean))
    if batch is not None:
        tiny = jnp.finfo(m.spread.dtype).tiny
        wider = jnp.exp(jnp.abs(jnp.log(jnp.maximum(m.spread, tiny))))
        numbers |= {"drift": _worst(jnp.abs(m.drift), alive, jnp.max)}
        numbers |= {"spread": _worst(wider, alive, jnp.max)}
        numbers |= {"input_std": jnp.sqrt(_worst(batch.var, finite, jnp.mean))}
    return {key: value.astype(jnp.float32) for key, value in numbers.items()}


def _batch(old, new, momentum):
    """The batch for which new = momentum * old + (1 - momentum) * batch.

    The rounding of new, two float32 steps, becomes 2 / (1 - momentum) of them in the batch's
    variance. What is smaller is told as 0, so that a batch which does not vary is found.
    """
    back = lambda old, new: old + (new - old) / (1 - momentum)
    var = back(old.var, new.var)
    noise = 2 * jnp.finfo(old.var.dtype).eps * old.var / (1 - momentum)
    return Batch(back(old.mean, new.mean), jnp.where(var <= noise, 0, var))


def _worst(values, where, reduce):
    """The reduction over the channels in `where`; NaN if there are none."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if reduce is jnp.mean:
        return reduce(values, where=where)
    initial = -jnp.inf if reduce is jnp.max else jnp.inf
    return jnp.where(where.any(), reduce(values, where=where, initial=initial), jnp.nan)


def _share(chosen, where):
    """The share of the channels; of several stacked layers the largest one."""
    shares = chosen.sum(-1) / where.sum(-1)
    return _worst(shares, where.any(-1), jnp.max)


def _weights(pairs):
    """Norm -> path of the weights before it."""
    if isinstance(pairs, Mapping):
        return dict(pairs)
    join = lambda path: "/".join(
        key for key in map(str, path) if key not in checkpoints.COLLECTIONS
    )
    return {join(pair.norm): f"{join(pair.layer)}/kernel" for pair in pairs}


def _parameters(tree):
    """Path, without the names of collections -> array; None for no tree."""
    if tree is None:
        return None
    leaves = checkpoints.leaves(tree)
    return {
        "/".join(key for key in path if key not in checkpoints.COLLECTIONS): value
        for path, value in leaves.items()
    }


def _weight(path, lead, variables, gradients, previous):
    """The numbers of the weights before a norm; `lead` are the axes that stack layers."""

    def norm(tree, what):
        if path not in tree:
            raise ValueError(f"no {path!r} in the {what}, expected one of {sorted(tree)}")
        return tree[path]

    def size(value):
        value = jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))
        stacked = len(lead) if value.shape[: len(lead)] == lead else 0
        return jnp.sqrt(jnp.square(jnp.abs(value)).sum(range(stacked, value.ndim)))

    weight = norm(variables, "variables")
    numbers = {"weight": size(weight).max()}
    if gradients is not None:
        ratio = size(norm(gradients, "gradients")) / jnp.square(size(weight))
        numbers["effective_lr"] = ratio.max()
    if previous is not None:
        old = norm(previous, "previous variables")
        numbers["update"] = (size(weight - old) / size(old)).max()
    return {key: value.astype(jnp.float32) for key, value in numbers.items()}
