"""Which batch norms of a model can be folded, read off the model's own computation.

A name or the order of the layers would only suggest it. The traced program shows it: the output of
a convolution or dense layer goes into the batch norm and nowhere else, with at most its bias added
between, both are used once, and the norm's features are those that the layer makes. Kernel, bias
and output may be cast from one floating dtype to another and change their shape, nothing else.
"""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn.core import validate
from jbn.fold.program import Path, Value, evaluate, is_constant, trace, varying

_CASTS = ("convert_element_type", "copy", "optimization_barrier")
_RESHAPES = ("reshape", "squeeze", "broadcast_in_dim")
_ROOTS = ("rsqrt", "sqrt", "pow")
_VECTORS = ("mean", "var", "scale", "bias")


class Pair(NamedTuple):
    """A batch norm and the linear layer whose output it alone reads.

    Attributes:
        layer: path of the convolution or dense layer, such as ("Block_0", "Conv_0"); it holds
            "kernel" and perhaps "bias".
        norm: path of the batch norm.
        out_axis: axis of the kernel that makes the features of the norm; several for a DenseGeneral
            before a norm of several feature axes.
        eps: of the batch norm.
    """

    layer: Path
    norm: Path
    out_axis: int | tuple[int, ...] = -1
    eps: float = 1e-5


def find_pairs(
    apply: Callable, variables: Any, *args: Any, eps: float | None = None
) -> tuple[Pair, ...]:
    """The foldable batch norms of a model, each with the layer before it, in the order they run.

    Args:
        apply: function of (variables, *args) in inference mode, such as `lambda v, x:
            model.apply(v, x, train=False)`, or for nnx, with graph, state = nnx.split(model),
            `lambda v, x: nnx.merge(graph, v)(x)`.
        variables: linen's variables, or an nnx.State (or its pure dict) whose model is in eval
            mode.
        args: inputs; their shapes are enough (jax.ShapeDtypeStruct).
        eps: of norms whose epsilon does not stand in the program as what is added to the variance
            under a square root; without it they are left out. All others are read there.

    Returns:
        Pairs for `fold_variables`; norms that read anything else are left out.

    Raises:
        ValueError: eps is given and the program says otherwise.
        TypeError: apply is no function, variables hold no arrays, an input is no array, or eps is
            no number.
    """
    validate.function(apply, "apply", "of (variables, *args)")
    if eps is not None:
        validate.scalar(eps, "eps")
    if not jax.tree.leaves(variables):
        raise TypeError(
            f"variables is a {type(variables).__name__} without arrays ({variables!r:.60}), "
            "expected linen's variables or an nnx.State"
        )
    for leaf in jax.tree.leaves(args):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"an input is a {type(leaf).__name__} ({leaf!r:.60}), expected arrays: give other "
                "arguments inside apply, such as lambda v, x: model.apply(v, x, mode='eval')"
            )
    closed = jax.make_jaxpr(apply)(variables, *args)
    linen = is_linen(variables)
    paths = [_path(keys, linen) for keys, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    equations, uses = trace(closed, paths)
    pairs = []
    for norm in dict.fromkeys(path[:-1] for path in paths if path[-1] == "mean"):
        reader = _only_reader(equations, norm)
        if reader is None:
            continue
        data, axes = _normalized(reader, norm)
        found = _layer(data, axes, uses, paths) if axes else None
        norm_eps = _epsilon(equations, norm, eps)
        if found and norm_eps is not None and not is_inside(found[0], norm):
            pairs.append((equations.index(reader), Pair(found[0], norm, found[1], norm_eps)))
    pairs = [pair for _, pair in sorted(pairs, key=operator.itemgetter(0))]
    folded = Counter(pair.layer for pair in pairs)
    return tuple(pair for pair in pairs if folded[pair.layer] == 1)


def is_linen(variables: Any) -> bool:
    """Whether these are linen's collections; an nnx model may have attributes of these names."""
    collections = isinstance(variables, Mapping) and not isinstance(variables, nnx.State)
    return collections and "params" in variables and "batch_stats" in variables


def is_inside(path: Path, outer: Path) -> bool:
    """Whether a path is `outer` or lies below it."""
    return path[: len(outer)] == outer


def _only_reader(equations, norm) -> Value | None:
    """The operation in which the norm's mean meets data, if the norm is called once.

    Then data meets its vectors in one operation (jbn's), or in one after the other, (x - mean) *
    gain + bias, each of which reads the result of the one before.
    """
    vectors = {(*norm, name) for name in _VECTORS}
    readers = [
        value
        for value in equations
        if any(o.data for o in value.operands)
        and any(vectors & o.variables for o in value.operands if not o.data)
    ]
    for before, after in itertools.pairwise(readers):
        data = _single(o for o in after.operands if o.data)
        while data is not None and data.name in _CASTS and data.is_floating:
            data = data.operands[0]
        if data is not before:
            return None
    met = lambda name: [
        value
        for value in readers
        if any((*norm, name) in o.variables for o in value.operands if not o.data)
    ]
    return readers[0] if met("var") and met("mean") == readers[:1] else None


def _single(values):
    """The value, if there is exactly one."""
    values = list(values)
    return values[0] if len(values) == 1 else None


def _normalized(reader, norm):
    """What the norm reads, and the axes of it along which the mean lies; None if it is no norm."""
    data = [o for o in reader.operands if o.data]
    x = data[0]  # a fused norm may read a residual after x
    if reader.shape != x.shape or (reader.name == "sub" and reader.operands[0] is not x):
        return x, None
    if reader.name != "sub" and (len(reader.operands) < 3 or reader.runs_program):
        return x, None
    path = (*norm, "mean")
    if reader.name == "sub":
        axes = varying(reader.operands[1], path, x.shape)
        return x, axes
    mean = _single(o for o in reader.operands if path in o.variables and not o.data)
    fitting = [a for a, n in enumerate(x.shape) if mean is not None and (n,) == mean.shape]
    return x, tuple(fitting) if len(fitting) == 1 else varying(reader, path, x.shape)


def _epsilon(equations, norm, given) -> float | None:
    """What is added to the variance before the square root; `given` where that is no constant."""
    variance, found = {(*norm, "var")}, set()
    for value in equations:
        if value.name in _ROOTS and value.operands[0].variables == variance:
            if value.operands[0].data or not is_constant(value.operands[0], variance):
                return given
            zero = lambda leaf: jnp.zeros(leaf.shape, leaf.aval.dtype)
            added = np.unique(np.asarray(evaluate(value.operands[0], zero, {})))
            found |= {float(str(number)) for number in added}  # 0.001, not 0.0010000000474974513
    if len(found) != 1:
        return given
    (eps,) = found
    if given is not None and not np.isclose(eps, given, rtol=1e-3, atol=0):
        raise ValueError(
            f"eps is {given}, but the program adds {eps} to the variance of "
            f"{'/'.join(map(str, norm))}: leave eps out, it is read from the program"
        )
    return eps


def _is_foldable(value, uses) -> bool:
    """Whether a value between two layers can vanish: it is read once, and its cast only rounds."""
    return uses[value] == 1 and value.is_floating


def _layer(value, axes, uses, paths):
    """(path, out_axis) of the linear layer that alone makes this value's features along `axes`."""
    bias: Path | None = None
    while value.equation is not None and _is_foldable(value, uses) and axes is not None:
        data = [o for o in value.operands if o.data]
        if value.name in ("conv_general_dilated", "dot_general"):
            found = _linear(value, axes, uses)
            # A fold also takes a bias that the program adds elsewhere or not at all.
            expected = found and (*found[0], "bias")
            return found if bias == (expected if expected in paths else None) else None
        if len(data) != 1:
            return None
        if value.name == "add" and bias is None:
            (fixed,) = (o for o in value.operands if not o.data)
            bias = _added_bias(fixed, value, axes, uses)
            if bias is None:
                return None
        else:
            axes = _axes_before(value, axes)
        value = data[0]
    return None


def _added_bias(fixed, value, axes, uses) -> Path | None:
    """Path of the variable that is added, unchanged, along these axes of a value, and nowhere else.

    Only casts and changes of shape may stand before the addition, which keep the order.
    """
    chain = [fixed]
    while chain[-1].equation is not None:
        if not _keeps_order(chain[-1]):
            return None
        chain.append(chain[-1].operands[0])
    variable = chain[-1]
    features = tuple(value.shape[a] for a in axes)
    if len(variable.variables) != 1 or variable.shape != features:
        return None
    if not all(_is_foldable(v, uses) for v in chain):
        return None
    (path,) = variable.variables
    along = varying(fixed, path, value.shape)
    return path if along == axes or math.prod(fixed.shape) == 1 else None


def _keeps_order(value) -> bool:
    """Whether the operation only casts or reshapes one value, or repeats it along new axes."""
    transposes = value.name == "reshape" and value.equation.params["dimensions"] is not None
    known = value.name in (*_CASTS, *_RESHAPES)
    return known and len(value.operands) == 1 and not transposes


def _axes_before(value, axes):
    """Where these axes of a value lie in its operand; None if it is no mere change of shape."""
    old, params = value.operands[0].shape, value.equation.params
    if value.name in _CASTS and len(value.operands) == 1:
        return axes
    if value.name == "transpose":
        return tuple(params["permutation"][a] for a in axes)
    if not _keeps_order(value) or math.prod(old) != math.prod(value.shape):
        return None
    features = value.shape[axes[0] : axes[-1] + 1]
    before = math.prod(value.shape[: axes[0]])
    for start in range(len(old)):
        end = start + len(features)
        if math.prod(old[:start]) == before and old[start:end] == features:
            return tuple(range(start, end))
    return None


def _linear(value, axes, uses):
    """(path, out_axis) of the kernel, if the operation makes features along these axes with it."""
    kernel_index = 0 if value.operands[1].data else 1
    kernel = value.operands[kernel_index]
    if kernel.data or len(kernel.variables) != 1 or not value.operands[1 - kernel_index].data:
        return None
    made_along, made = _features(value, kernel_index)
    if made != axes:
        return None
    while kernel.equation is not None and _is_foldable(kernel, uses):
        if kernel.name == "transpose":
            permutation = kernel.equation.params["permutation"]
            made_along = tuple(permutation[a] for a in made_along)
        elif kernel.name == "rev":
            if set(made_along) & set(kernel.equation.params["dimensions"]):
                return None
        elif kernel.name not in _CASTS:
            return None
        kernel = kernel.operands[0]
    if not _is_foldable(kernel, uses):
        return None
    (path,) = kernel.variables
    if path[-1] != "kernel" or list(made_along) != sorted(made_along):
        return None
    counted = tuple(a - len(kernel.shape) for a in made_along)
    return path[:-1], counted[0] if len(counted) == 1 else counted


def _features(value, kernel_index):
    """(axes of the kernel that make features, axes of the output that hold them), () if mixed."""
    params = value.equation.params
    if value.name == "conv_general_dilated":
        if params["batch_group_count"] != 1 or kernel_index != 1:
            return (), ()
        numbers = params["dimension_numbers"]
        return (numbers.rhs_spec[0],), (numbers.out_spec[1],)
    contracted, batch = (axes[kernel_index] for axes in params["dimension_numbers"])
    rank = len(value.operands[kernel_index].shape)
    free = tuple(a for a in range(rank) if a not in (*contracted, *batch))
    if batch or not free:
        return (), ()
    start = 0 if kernel_index == 0 else len(value.shape) - len(free)
    return free, tuple(range(start, start + len(free)))


def _path(keys, linen) -> Path:
    """Names and indices from the root, without linen's collection and nnx's ".value"."""
    names = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in keys]
    names = names[1:] if linen and names[0] in ("params", "batch_stats") else names
    return tuple(names[:-1] if names[-1] == "value" else names)
