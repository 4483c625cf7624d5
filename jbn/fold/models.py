"""Folding a whole model: each batch norm of a list of pairs becomes part of the layer before it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jbn.core import flax_common, validate
from jbn.fold.linear import fold_previous
from jbn.fold.pairs import Pair, is_inside, is_linen
from jbn.types import Params, State


def fold_variables(variables: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Fold every batch norm of a model into the layer before it.

    Args:
        variables: linen's {"params": ..., "batch_stats": ...}, or the pure dict of an nnx model.
        pairs: which norms, and into what; `find_pairs` finds them.

    Returns:
        Variables without these norms, in which each layer has a bias: for the same model built with
        `FoldedNorm` and use_bias=True. Everything else is untouched.

    Raises:
        ValueError: a path that is not there or holds something else, a layer or norm named twice, a
            layer inside its norm, or shapes that do not fit.
        TypeError: pairs that are no `Pair`, variables that are no mapping, or boxed arrays
            (`flax.linen.unbox` takes them out).

    Certify the result: `certify(before, after, inputs)`.
    """
    validate.mapping(variables, "variables", "linen's variables or the pure dict of an nnx model")
    pairs = _pairs(pairs)
    if not is_linen(variables):
        return _folded(dict(variables), dict(variables), pairs)[0]
    learned, remembered = _folded(variables["params"], variables["batch_stats"], pairs)
    folded = {**variables, "params": learned, "batch_stats": remembered}
    return {name: tree for name, tree in folded.items() if tree or name != "batch_stats"}


def fold_nnx(model: nnx.Module, pairs: Sequence[Pair]) -> nnx.Module:
    """A copy of an nnx model in which each norm of the pairs is folded and a `FoldedNorm` stands in
    its place, wherever the model holds it.

    Raises:
        ValueError: as `fold_variables`.
        TypeError: as `fold_variables`, or model is no nnx.Module.
    """
    flax_common.expect_nnx(model, "fold_variables")
    pairs = _pairs(pairs)
    model = nnx.clone(model)
    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    for path in (path for pair in pairs for path in (pair.layer, pair.norm)):
        if path not in modules:
            raise ValueError(f"no module {_text(path)} in the model: {list(modules)}")
    values = nnx.to_pure_dict(nnx.state(model))
    folded, _ = _folded(values, values, pairs)
    for pair in pairs:
        layer, norm, values = modules[pair.layer], modules[pair.norm], _at(folded, pair.layer)
        layer.kernel.set_value(values["kernel"])
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(values["bias"]), True
        else:
            layer.bias.set_value(values["bias"])
        left = FoldedNorm(activation=getattr(norm, "activation", None))
        # The norm itself becomes what is left of it, so that every holder of it has that.
        object.__setattr__(norm, "__class__", FoldedNorm)
        vars(norm).clear()
        vars(norm).update(vars(left))
    return model


class FoldedNorm(nnx.Module):
    """What is left of a jbn BatchNorm once it is folded: the residual and the activation.

    Takes the norm's place in nnx models, as a module like any other, and in linen models.

    Args:
        activation: as of the batch norm; may be a module with parameters. Its other options,
            positional or not, no longer mean anything.
    """

    def __init__(self, *_: Any, activation: Callable[[Array], Array] | None = None, **__: Any):
        self.activation = activation

    def __call__(self, x: Array, *_: Any, residual: Array | None = None, **__: Any) -> Array:
        """activation(x + residual), in the dtype of x."""
        x = x if residual is None else x + residual.astype(x.dtype)
        return x if self.activation is None else self.activation(x)


def _folded(learned, remembered, pairs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees with each pair folded; they may be the same."""
    for pair in pairs:
        norm, moments, layer = (
            _at(learned, pair.norm, {}),
            _at(remembered, pair.norm),
            _at(learned, pair.layer),
        )
        _expect(pair.norm, moments, ("mean", "var"), "a batch norm")
        _expect(pair.layer, layer, ("kernel",), "a convolution or dense layer")
        params = Params(norm.get("scale"), norm.get("bias"))
        state = State(moments["mean"], moments["var"], jnp.zeros((), jnp.int32))
        kernel, bias = fold_previous(
            layer["kernel"], layer.get("bias"), params, state, out_axis=pair.out_axis, eps=pair.eps
        )
        learned = _with(learned, pair.layer, {**layer, "kernel": kernel, "bias": bias})
        learned, remembered = _with(learned, pair.norm, None), _with(remembered, pair.norm, None)
    return learned, remembered


def _pairs(pairs) -> tuple[Pair, ...]:
    single = isinstance(pairs, Pair | str) or not isinstance(pairs, Iterable)
    listed: tuple[Any, ...] = (pairs,) if single else tuple(pairs)
    for pair in listed:
        if single or not isinstance(pair, Pair):
            raise TypeError(
                f"pairs holds a {type(pair).__name__} ({pair!r:.60}), expected a list of "
                "jbn.fold.Pair, such as find_pairs returns"
            )
        for path in (pair.layer, pair.norm):
            if not isinstance(path, tuple):
                raise TypeError(
                    f"a pair names {path!r:.60}, expected a tuple of keys, such as "
                    '("Block_0", "Conv_0")'
                )
        if is_inside(pair.layer, pair.norm):
            raise ValueError(
                f"layer {_text(pair.layer)} lies in norm {_text(pair.norm)}, expected one "
                "outside it: the fold removes the norm with all that it holds"
            )
    for named in ("layer", "norm"):
        paths = [getattr(pair, named) for pair in listed]
        if len(set(paths)) < len(paths):
            raise ValueError(f"a {named} occurs in two pairs, expected each once: {paths}")
    return listed


def _expect(path, held, names, what):
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"{_text(path)} holds {sorted(map(str, held))}, expected {' and '.join(names)}: {what}"
        )


def _at(tree, path, default=None):
    """The dict of values at a path."""
    for depth, key in enumerate(path):
        if key not in tree:
            if default is not None:
                return default
            raise ValueError(
                f"no {_text(path)} in the variables, only {sorted(map(str, tree))} where {key!r} "
                "was expected"
            )
        tree = tree[key]
        if not isinstance(tree, Mapping):
            raise ValueError(
                f"{_text(path[: depth + 1])} is a {type(tree).__name__}, expected a module's dict "
                f"of arrays, as a pair names {_text(path)}"
            )
    return tree


def _with(tree, path, value) -> Any:
    """A copy of the tree with the subtree at `path` replaced, or removed where the value is None.

    Dicts that this leaves empty are removed too.
    """
    if not path:
        return value
    key, *rest = path
    below = _with(tree.get(key, {}), rest, value)
    return {**{k: v for k, v in tree.items() if k != key}, **({key: below} if below else {})}


def _text(path) -> str:
    return "/".join(map(str, path)) or "the model itself"
