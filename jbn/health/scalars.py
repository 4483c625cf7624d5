"""Scalars of every batch norm of a model, made inside jit, for a logger or `jbn.health.Monitor`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core import validate
from jbn.health import checkpoints
from jbn.health.channels import Batch, check_moments, magnitude, measure, moments_by_layer
from jbn.health.findings import Limits, check_limits
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
    `pairs` the weights; it never reads activations. A call took
    1.3 ms, 0.14 % of a ResNet-18 step on two CPU cores (224 x 224, batch 8), and 12 ms or 1.4 %
    with `previous`, `gradients` and `pairs`. The names after the layer's:

    Always:
        signal: the smallest standard deviation of a normalized value, 1 in a working layer.
        dead, one_sided: shares of the channels that are, as in `report`.
        nonfinite: how many values of the variables and moments are not finite.
        ratio: the largest |mean| / std.
        std, scale, bias: root mean squares over the channels; std is the running one.
        missing: 1, and nothing else, for a layer whose mean or var is missing, or which holds no
            arrays of numbers.
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
    nothing is left is NaN. Of stacked layers (nn.scan) it is the number of the worst one; of std,
    scale, bias and input_std it is the mean.

    Args:
        variables: as of `model_report`, such as linen variables, or an nnx module or state.
        moments: of the layers' inputs in one batch, by the layer's name, as from `input_moments`.
        previous: the variables before this step's update. The batch's statistics follow from the
            change of the running ones, without moments and without a pass over activations. A layer
            that is called k times in a step updates k times, which reads as a drift up to k times
            as large: pass its moments instead.
        momentum: of the layers, where `previous` is given; less than 1.
        gradients: tree of the gradients, with the paths of the parameters.
        pairs: the weights before each norm: a dict such as {"BatchNorm_0": "Conv_0/kernel"}, or the
            pairs of `jbn.fold.find_pairs`.
        eps: of the layers.
        limits: which channels count as dead or one-sided.

    Returns:
        A flat dict from "layer/name" to a float scalar.

    Raises:
        ValueError: no batch norm in the tree or none of them in previous, moments or pairs of a
            layer that is not there, moments or previous statistics of another shape, a weight or
            gradient that is not there, gradients without pairs, momentum 1 with previous.
        TypeError: moments, pairs or limits of another type.
    """
    validate.epsilon(eps)
    validate.update(momentum)
    check_limits(limits)
    found, damaged = checkpoints.find_some(variables)
    moments = moments_by_layer(moments, found)
    for name, given in moments.items():
        check_moments(given, jnp.shape(found[name].mean), name)
    before = {} if previous is None else _before(previous, found, momentum)
    weights = _weights(pairs, variables, found)
    if unknown := [name for name in weights if name not in found]:
        raise ValueError(f"pairs of {unknown}, expected names among the layers: {list(found)}")
    if gradients is not None and not weights:
        raise ValueError(
            "gradients came without pairs, expected the weights before each norm: pass "
            "pairs={'BatchNorm_0': 'Conv_0/kernel'}, or what jbn.fold.find_pairs returns"
        )
    result = {f"{name}/missing": jnp.ones((), jnp.float32) for name in damaged}
    known = [name for name in found if name in moments or name in before]
    for names in (known, [name for name in found if name not in known]):
        if names:
            result |= _layers(names, found, moments, before, momentum, eps, limits)
    if not weights:
        return result
    trees = [
        None if tree is None else checkpoints.parameters(tree)
        for tree in (variables, gradients, previous)
    ]
    for name, path in weights.items():
        lead = jnp.shape(found[name].mean)[:-1]
        numbers = _weight(path, lead, *trees)
        result |= {f"{name}/{key}": value for key, value in numbers.items()}
    return result


def _before(previous, found, momentum):
    """The layers before the update."""
    if momentum is None or validate.scalar(momentum, "momentum") == 1:
        raise ValueError(
            f"momentum is {momentum} with previous, expected less than 1: such a layer takes "
            "nothing of a batch, so pass moments instead"
        )
    before = checkpoints.find(previous)[0]
    if found and not set(found) & set(before):
        raise ValueError(
            f"previous holds none of the layers {list(found)}, expected all variables before the "
            "update: pass batch_stats too"
        )
    for name in set(found) & set(before):
        for key in ("mean", "var"):
            old, new = (jnp.shape(getattr(tree[name], key)) for tree in (before, found))
            if old != new:
                raise ValueError(
                    f"{key} of {name} has shape {old} in previous, expected {new}: pass the "
                    "variables of the same model"
                )
    return before


def _layers(names, found, moments, before, momentum, eps, limits):
    """The numbers of layers that need no weights; of all or of none of them the batch is known.

    All layers lie in one table, a row each and stacked layers several, padded to the widest: 20
    layers compile as fast as one.
    """
    layers = {name: found[name] for name in names}
    shapes = {name: jnp.shape(layer.mean) or (1,) for name, layer in layers.items()}
    dtype = jnp.result_type(jnp.float32, *(layer.var for layer in layers.values()))
    width = max(shape[-1] for shape in shapes.values())
    kinds = [v for n in names for v in (*layers[n][:3], *moments.get(n, ())) if v is not None]
    any_complex = any(map(jnp.iscomplexobj, kinds))
    wide = np.result_type(dtype, np.complex64) if any_complex else dtype

    def table(values, fill=0.0, dtype=dtype):
        rows = []
        for name, value in values.items():
            size = shapes[name][-1]
            row = jnp.full(shapes[name], fill, dtype) if value is None else value
            row = jnp.asarray(row, dtype).reshape(-1, size)
            rows.append(jnp.pad(row, ((0, 0), (0, width - size)), constant_values=fill))
        return jnp.concatenate(rows)

    field = lambda key, fill=0.0, of=layers: table(
        {name: getattr(of[name], key) for name in names}, fill, dtype if key == "var" else wide
    )
    real = table({name: jnp.ones(shape, dtype) for name, shape in shapes.items()}) > 0
    scale, bias = field("scale", 1.0), field("bias")
    mean, var = field("mean"), field("var", 1.0)
    vectors, running, batch, one_sided = [scale, bias, mean, var], Batch(mean, var), None, None
    given: Any = [name in moments for name in names]
    if set(names) & (set(moments) | set(before)):
        batches = {}
        for name in names:
            if name in moments:
                count, mean, m2 = map(jnp.asarray, moments[name])
                batches[name] = Batch(mean, (m2 / count).astype(dtype))
            else:
                old, new = (_running(tree[name], dtype, wide) for tree in (before, found))
                batches[name] = _batch(old, new, momentum)
        batch = Batch(field("mean", 0.0, batches), field("var", 1.0, batches))
        sources = {n: layers[n] if n in moments else before[n] for n in names}
        running = Batch(field("mean", 0.0, sources), field("var", 1.0, sources))
        vectors += batch
        rows = [int(np.prod(shape[:-1])) for shape in shapes.values()]
        given = np.repeat(given, rows)[:, None]
    m = measure(scale, bias, running, batch, eps, jnp)
    one_sided = m.one_sided
    if batch is not None:
        # In training the batch is normalized by its own statistics, so its mean becomes the bias.
        one_sided = jnp.where(given, one_sided, magnitude(bias, jnp) / jnp.abs(scale))
    finite = real & jnp.stack([jnp.isfinite(v) for v in vectors]).all(0)
    dead = finite & (m.signal <= limits.constant)
    alive = finite & ~dead
    largest = jnp.where(finite, jnp.abs(scale), 0).max(-1, keepdims=True)
    judged = alive & (jnp.abs(scale) > limits.scale * largest)
    rms = lambda squares: jnp.sqrt(jnp.mean(squares, -1, where=finite))
    share = lambda chosen: chosen.sum(-1).astype(dtype) / finite.sum(-1).astype(dtype)
    numbers = {
        "signal": -_largest(-m.signal, finite),
        "dead": share(dead),
        "one_sided": share(judged & (jnp.abs(one_sided) > limits.one_sided)),
        "nonfinite": sum((~jnp.isfinite(v)).sum(-1) for v in vectors),
        "ratio": _largest(m.ratio, alive),
        "std": rms(var),
        "scale": rms(jnp.square(jnp.abs(scale))),
        "bias": rms(jnp.square(jnp.abs(bias))),
    }
    if batch is not None:
        wider = jnp.exp(jnp.abs(jnp.log(jnp.maximum(m.spread, jnp.finfo(dtype).tiny))))
        numbers |= {"drift": _largest(jnp.abs(m.drift), alive), "spread": _largest(wider, alive)}
        numbers["input_std"] = rms(batch.var)
    return _by_layer(numbers, layers, shapes)


def _by_layer(numbers, layers, shapes):
    """From a number per row to "layer/name"; of stacked layers the worst row, or the mean."""
    join = {"signal": jnp.nanmin, "nonfinite": jnp.sum}
    join |= dict.fromkeys(("std", "scale", "bias", "input_std"), jnp.nanmean)
    result, start = {}, 0
    for name, layer in layers.items():
        stop = start + int(np.prod(shapes[name][:-1]))
        for key, column in numbers.items():
            if key in ("scale", "bias") and getattr(layer, key) is None:
                continue
            value = column[start:stop]
            value = value[0] if stop - start == 1 else join.get(key, jnp.nanmax)(value)
            result[f"{name}/{key}"] = value.astype(jnp.float32)
        start = stop
    return result


def _running(layer, dtype, wide):
    return Batch(jnp.asarray(layer.mean, wide), jnp.asarray(layer.var, dtype))


def _batch(old, new, momentum):
    """The batch for which new = momentum * old + (1 - momentum) * batch.

    The rounding of new, two float32 steps, becomes 2 / (1 - momentum) of them in the batch's
    variance. What is smaller is told as 0, so that a batch which does not vary is found.
    """
    back = lambda old, new: old + (new - old) / (1 - momentum)
    var = back(old.var, new.var)
    noise = 2 * jnp.finfo(old.var.dtype).eps * old.var / (1 - momentum)
    return Batch(back(old.mean, new.mean), jnp.where(var <= noise, 0, var))


def _largest(values, where):
    """By row, the largest of the channels in `where`; NaN if there are none."""
    largest = jnp.max(values, -1, where=where, initial=-jnp.inf)
    return jnp.where(where.any(-1), largest, jnp.nan)


def _weights(pairs, variables, found):
    """Norm -> path of the weights before it."""
    if isinstance(pairs, Mapping):
        weights = dict(pairs)
    else:
        if not isinstance(pairs, Sequence) or not all(hasattr(pair, "norm") for pair in pairs):
            raise TypeError(
                f"pairs is {pairs!r:.60}, expected a dict such as "
                "{'BatchNorm_0': 'Conv_0/kernel'}, or what jbn.fold.find_pairs returns"
            )
        if not pairs:
            return {}
        short, known = checkpoints.shortener(variables), checkpoints.parameters(variables)
        full = lambda path: "/".join(map(str, path))
        # Where two would have the same short name, both have their full one.
        name = lambda path, names: short(path) if short(path) in names else full(path)
        weights = {name(p.norm, found): name((*p.layer, "kernel"), known) for p in pairs}
    if bad := [path for path in weights.values() if not isinstance(path, str)]:
        raise TypeError(f"pairs holds {bad[0]!r}, expected paths such as 'Conv_0/kernel'")
    return weights


def _weight(path, lead, variables, gradients, previous):
    """The numbers of the weights before a norm; `lead` are the axes that stack layers."""

    def norm(tree, what):
        if path not in tree:
            names = sorted(tree.maps[0])
            raise ValueError(f"no {path!r} in the {what}, expected one of {names}")
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
