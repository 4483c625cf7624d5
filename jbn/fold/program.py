"""A traced program as values: what made each of them, and which variables it is made of."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Set
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Path = tuple[Hashable, ...]  # keys of dicts, indices of lists
# The names under which primitives that only wrap a program hold it.
_WRAPPERS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")


@dataclasses.dataclass(eq=False)
class Value:
    """One value of the program: what made it, and what it depends on."""

    variables: frozenset[Path]  # paths of the variables it is made of
    data: bool  # whether it also depends on the inputs
    aval: Any
    equation: JaxprEqn | None = None
    operands: tuple["Value", ...] = ()
    constant: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def name(self) -> str:
        """Of the primitive that made it."""
        return "" if self.equation is None else str(self.equation.primitive)

    @property
    def is_floating(self) -> bool:
        """Whether the dtype is floating or complex, of 16 bits or more.

        A cast to any other, such as an integer or float8, changes the values by more than rounding.
        """
        dtype = getattr(self.aval, "dtype", np.dtype(bool))
        return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 2

    @property
    def runs_program(self) -> bool:
        """Whether a program of its own made it: a loop or a branch, not one operation."""
        return self.equation is not None and any(
            isinstance(part, Jaxpr | ClosedJaxpr)
            for value in self.equation.params.values()
            for part in (value if isinstance(value, tuple | list) else (value,))
        )


def trace(closed: ClosedJaxpr, paths: list[Path]) -> tuple[list[Value], Counter]:
    """The values that the operations of a program make, in their order, and how often each value of
    the program is used; of an operation of several results the first stands for all.

    Args:
        closed: the program.
        paths: of the variables, its first inputs; the others are data.
    """
    equations, uses = [], Counter()
    inputs = closed.jaxpr.invars
    values = [
        Value(frozenset({path}), False, v.aval) for path, v in zip(paths, inputs, strict=False)
    ]
    values += [Value(frozenset(), True, v.aval) for v in inputs[len(paths) :]]
    uses.update(_walk(closed.jaxpr, closed.consts, values, uses, equations))
    return equations, uses


def _walk(
    jaxpr: Jaxpr, consts: Iterable, values: Iterable[Value], uses: Counter, equations: list
) -> list[Value]:
    """Follow a program, wrapped programs included; the values of its outputs."""
    env = dict(zip(jaxpr.invars, values, strict=True))
    fixed = lambda var, constant: Value(frozenset(), False, var.aval, constant=constant)
    env.update(
        (var, fixed(var, constant)) for var, constant in zip(jaxpr.constvars, consts, strict=True)
    )
    read = lambda v: fixed(v, v.val) if isinstance(v, Literal) else env[v]
    for equation in jaxpr.eqns:
        operands = tuple(map(read, equation.invars))
        inner, passed = _wrapped(equation, operands)
        if inner is not None:
            outs = _walk(inner.jaxpr, inner.consts, passed, uses, equations)
            env.update(zip(equation.outvars, outs, strict=True))
            continue
        uses.update(operands)
        variables = frozenset().union(*(value.variables for value in operands))
        data = any(o.data for o in operands)
        made = [Value(variables, data, v.aval, equation, operands) for v in equation.outvars]
        env.update(zip(equation.outvars, made, strict=True))
        equations.append(made[0])
    return [read(v) for v in jaxpr.outvars]


def _wrapped(equation, operands):
    """The program of a call with its operands, if the equation is one; a loop over it is none."""
    if str(equation.primitive) in ("scan", "while"):
        return None, ()
    if equation.params.get("branches_platforms"):  # any platform's program will do
        return equation.params["branches"][-1], operands[1:]
    for name in _WRAPPERS:
        inner = equation.params.get(name)
        inner = ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner
        if isinstance(inner, ClosedJaxpr) and len(inner.jaxpr.invars) == len(operands):
            return inner, operands
    return None, ()


def is_constant(value: Value, variables: Set[Path]) -> bool:
    """Whether the value is made of these variables and constants alone."""
    if value.equation is None:
        return value.constant is not None or value.variables == variables
    return all(is_constant(o, variables) for o in value.operands)


def varying(value: Value, path: Path, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Axes of a value along which it differs if the variable at `path` differs in every element.

    Found by running the few operations that lead from the variable to the value.
    """

    def known(leaf):
        if leaf.variables == {path} and not leaf.data:
            numbers = np.arange(1, 1 + math.prod(leaf.shape), dtype=np.float32)
            return -jnp.asarray(numbers.reshape(leaf.shape), leaf.aval.dtype)
        return jnp.full(leaf.shape, 0 if leaf.data else 1, leaf.aval.dtype)

    result = np.asarray(_run(value, known, {}))
    if result.ndim != len(shape):
        return None
    first = lambda a: np.take(result, [0], axis=a)
    axes = tuple(a for a in range(result.ndim) if np.any(result != first(a)))
    # A single feature lies along any axis of size 1.
    return axes or tuple(a for a, n in enumerate(shape) if n == 1)[-1:] or None


def evaluate(value: Value, known: Callable[[Value], Any], cache: dict[Value, Any]) -> Any:
    """The value, where `known` gives those of variables and of all that depends on inputs."""
    if value not in cache:
        if value.constant is not None:
            cache[value] = value.constant
        elif value.data or value.equation is None:
            cache[value] = known(value)
        else:
            cache[value] = _run(value, known, cache)
    return cache[value]


def _run(value, known, cache):
    """The value, by running what made it from values that `known` gives for all else."""
    operands = [evaluate(o, known, cache) for o in value.operands]
    if value.equation is None:
        return known(value)
    result = value.equation.primitive.bind(*operands, **value.equation.params)
    return result[0] if value.equation.primitive.multiple_results else result
