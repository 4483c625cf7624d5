"""Which batch norms of a model can be folded, read off the model's own computation.

A name or the order of the layers would only suggest it.  The traced program shows it: the output of
a convolution or dense layer goes into the batch norm and nowhere else, with at most its bias added
between, and both are used once.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Path = tuple[Hashable, ...]  # keys of dicts, indices of lists
# The names under which primitives that only wrap a program hold it.
_WRAPPERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CASTS = ("convert_element_type", "copy", "optimization_barrier")


class Pair(NamedTuple):
    """A batch norm and the linear layer whose output it alone reads.

    Attributes:
        layer: path of the convolution or dense layer, such as ("Block_0", "Conv_0"); it holds
            "kernel" and perhaps "bias".
        norm: path of the batch norm.
        out_axis: axis of the kernel that makes the features of the norm.
        eps: of the batch norm.
    """

    layer: Path
    norm: Path
    out_axis: int = -1
    eps: float = 1e-5


@dataclasses.dataclass(eq=False)
class _Value:
    """One value of the program: what made it, and what it depends on."""

    variables: frozenset[Path]  # paths of the variables it is made of
    data: bool  # whether it also depends on the inputs
    shape: tuple[int, ...]
    equation: JaxprEqn | None = None
    operands: tuple["_Value", ...] = ()


def find_pairs(apply: Callable, variables: Any, *args: Any, eps: float = 1e-5) -> tuple[Pair, ...]:
    """The foldable batch norms of a model, each with the layer before it, in the order they run.

    Args:
        apply: function of (variables, *args) in inference mode, such as `lambda v, x:
            model.apply(v, x, train=False)`, or for nnx, with graph, state = nnx.split(model),
            `lambda v, x: nnx.merge(graph, v)(x)`.
        variables: linen's variables, or an nnx.State (or its pure dict) whose model is in eval
            mode.
        args: inputs; their shapes are enough (jax.ShapeDtypeStruct).
        eps: of the batch norms, as it stands in the program only as a number.

    Returns:
        Pairs for `fold_variables`; norms that read anything else are left out.
    """
    closed = jax.make_jaxpr(apply)(variables, *args)
    paths = [_path(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    uses, equations = Counter(), []
    values = [
        _Value(frozenset({path}), False, _shape(v))
        for path, v in zip(paths, closed.jaxpr.invars, strict=False)
    ]
    values += [_Value(frozenset(), True, _shape(v)) for v in closed.jaxpr.invars[len(paths) :]]
    for out in _walk(closed.jaxpr, closed.consts, values, uses, equations):
        uses[out] += 1
    pairs = []
    for norm, readers in _readers(equations).items():
        layers = {
            pair
            for value in _operands(readers)
            if (pair := _pair(value, norm, uses, eps)) is not None
        }
        if len(readers) == 1 and len(layers) == 1:
            pairs += layers
    folded = Counter(pair.layer for pair in pairs)
    return tuple(pair for pair in pairs if folded[pair.layer] == 1)


def _walk(
    jaxpr: Jaxpr, consts: Iterable, values: Iterable[_Value], uses: Counter, equations: list
) -> list[_Value]:
    """Follow a program, wrapped programs included; the values of its outputs."""
    env = dict(zip(jaxpr.invars, values, strict=True))
    env.update(
        (var, _Value(frozenset(), False, _shape(var)))
        for var, _ in zip(jaxpr.constvars, consts, strict=True)
    )
    read = lambda v: _Value(frozenset(), False, _shape(v)) if isinstance(v, Literal) else env[v]
    for equation in jaxpr.eqns:
        operands = tuple(map(read, equation.invars))
        inner = _wrapped(equation)
        if inner is not None:
            env.update(
                zip(
                    equation.outvars,
                    _walk(inner.jaxpr, inner.consts, operands, uses, equations),
                    strict=True,
                )
            )
            continue
        uses.update(operands)
        variables = frozenset().union(*(value.variables for value in operands))
        made = [
            _Value(variables, any(o.data for o in operands), _shape(v), equation, operands)
            for v in equation.outvars
        ]
        env.update(zip(equation.outvars, made, strict=True))
        equations.append(made[0])
    return [read(v) for v in jaxpr.outvars]


def _wrapped(equation) -> ClosedJaxpr | None:
    """The program of a call, if the equation is one; a loop over the program is not."""
    if str(equation.primitive) in ("scan", "while"):
        return None
    for name in _WRAPPERS:
        inner = equation.params.get(name)
        inner = ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner
        if isinstance(inner, ClosedJaxpr) and len(inner.jaxpr.invars) == len(equation.invars):
            return inner
    return None


def _readers(equations) -> dict[Path, list[_Value]]:
    """Path of each batch norm: the operations in which its mean meets data."""
    readers: dict[Path, list[_Value]] = {}
    for value in equations:
        fixed = frozenset().union(*(o.variables for o in value.operands if not o.data))
        if any(o.data for o in value.operands):
            for path in fixed:
                if path[-1] == "mean":
                    readers.setdefault(path[:-1], []).append(value)
    return readers


def _operands(readers):
    return [operand for reader in readers for operand in reader.operands if operand.data]


def _pair(value, norm, uses, eps) -> Pair | None:
    """The pair, if this input of the norm comes from a linear layer that nothing else reads."""
    bias: Path | None = None
    while value.equation is not None and uses[value] == 1:
        name, operands = str(value.equation.primitive), value.operands
        data = [o for o in operands if o.data]
        if name in _CASTS and len(data) == 1:
            value = data[0]
        elif name == "add" and bias is None and len(data) == 1:
            fixed = frozenset().union(*(o.variables for o in operands if not o.data))
            if len(fixed) != 1:
                return None
            (bias,), value = fixed, data[0]
        elif name in ("conv_general_dilated", "dot_general"):
            return _linear(value, norm, bias, uses, eps)
        else:
            return None
    return None


def _linear(value, norm, bias, uses, eps):
    made_along = _out_axis(value.equation)
    kernel = value.operands[1]
    if made_along is None or kernel.data or len(kernel.variables) != 1:
        return None
    axis = made_along
    while kernel.equation is not None:
        name, params = str(kernel.equation.primitive), kernel.equation.params
        if name == "transpose":
            axis = params["permutation"][axis]
        elif name not in (*_CASTS, "rev"):
            return None
        kernel = kernel.operands[0]
    (path,) = kernel.variables
    if (
        path[-1] != "kernel"
        or uses[kernel] != 1
        or (bias is not None and bias != (*path[:-1], "bias"))
    ):
        return None
    return Pair(path[:-1], norm, axis - len(kernel.shape), eps)


def _out_axis(equation):
    """Axis of the second operand along which the linear operation makes features; None if there is no single one."""
    if str(equation.primitive) == "conv_general_dilated":
        return (
            equation.params["dimension_numbers"].rhs_spec[0]
            if equation.params["batch_group_count"] == 1
            else None
        )
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    free = [a for a in range(len(equation.invars[1].aval.shape)) if a not in (*contracted, *batch)]
    return free[0] if len(free) == 1 else None


def _path(keys) -> Path:
    """Names and indices from the root, without linen's collection and nnx's ".value"."""
    names = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in keys]
    names = names[1:] if names[0] in ("params", "batch_stats") else names
    return tuple(names[:-1] if names[-1] == "value" else names)


def _shape(var):
    return tuple(getattr(var.aval, "shape", ()))
