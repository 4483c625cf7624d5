"""A linear map with a hand-written transpose, for the reverse mode of `jax.custom_jvp` rules.

`jax.custom_vjp` would forbid forward mode and every nesting of it.  Here the tangent map is an
ordinary JAX function, so forward mode and higher orders are JAX's own, while reverse mode at first
order runs the given transpose.  Neither function is traced before it is needed: the types of what
they return are known.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir

from jbn.core.sharding import repeated


def linear(
    forward: Callable,
    transpose: Callable,
    static: Hashable,
    point: Any,
    tangents: Any,
    like: Any,
    contains: ClosedJaxpr | None = None,
) -> Any:
    """forward(static, point, tangents), linear in tangents; `transpose` is its reverse mode.

    Args:
        forward: module-level function of (static, point, tangents) to a pytree; differentiable by
            JAX.
        transpose: module-level function of (static, point, cotangents, wanted) to cotangents like
            `tangents`. `wanted` has the structure of `tangents`, with types in place of arrays.
            `transpose` may skip what is None there; its result is ignored.
        static: hashable first argument of both.
        point: pytree of arrays, where the map is taken.
        tangents: pytree of arrays; None for what is known to be zero.
        like: pytree of arrays of the types that `forward` returns.
        contains: a program for JAX to look into, as it cannot look into the functions: see
            `op.needs_devices`.
    """
    flat_point, point_tree = jax.tree.flatten(point)
    flat_tangents, in_tree = jax.tree.flatten(tangents)
    flat_like, out_tree = jax.tree.flatten(like)
    types = tuple(map(jax.typeof, flat_tangents)), tuple(map(jax.typeof, flat_like))
    op = _Map(forward, transpose, static, (point_tree, in_tree, out_tree), types)
    out = _linear.bind(*flat_point, *flat_tangents, op=op, contains=contains)
    return jax.tree.unflatten(out_tree, out)


class _Map(NamedTuple):
    """The map or its transpose; hashable, so that it can be a parameter of a primitive."""

    forward: Callable
    transpose: Callable
    static: Hashable
    trees: tuple  # of the point, the tangents and what `forward` returns
    types: tuple  # of the tangents and what `forward` returns
    is_transpose: bool = False
    # Under vmap a part of the point is mapped, all values are, over axis 0.
    vmaps: tuple = ()  # the innermost first: (in_axes of the point, other arguments of jax.vmap)
    mapped_types: tuple = ()  # as `types`, with the mapped axes

    @property
    def num_point(self) -> int:
        return self.trees[0].num_leaves

    @property
    def results(self) -> tuple:
        return (self.mapped_types or self.types)[0 if self.is_transpose else 1]

    def transposed(self):
        return self._replace(is_transpose=not self.is_transpose)

    def __call__(self, *operands):
        run, mapped = self._run, (0,) * (len(operands) - self.num_point)
        for in_axes, arguments in self.vmaps:
            run = jax.vmap(run, (*in_axes, *mapped), **dict(arguments))
        return run(*operands)

    def _run(self, *operands):
        point_tree, in_tree, out_tree = self.trees
        point = jax.tree.unflatten(point_tree, operands[: self.num_point])
        values = operands[self.num_point :]
        if not self.is_transpose:
            tangents = jax.tree.unflatten(in_tree, values)
            return jax.tree.leaves(self.forward(self.static, point, tangents))
        wanted = jax.tree.unflatten(in_tree, self.types[0])
        cotangents = jax.tree.unflatten(out_tree, values)
        found = self.transpose(self.static, point, cotangents, wanted)
        is_none = lambda leaf: leaf is None
        keep = lambda want, ct: ct if want is not None else None
        return jax.tree.leaves(jax.tree.map(keep, wanted, found, is_leaf=is_none))


_linear = Primitive("jbn_linear")
_linear.multiple_results = True
_linear.def_impl(lambda *operands, op, contains: _jitted(*operands, op=op))
_linear.def_abstract_eval(lambda *_, op, contains: list(op.results))
_jitted = jax.jit(lambda *operands, op: op(*operands), static_argnames="op")


def _jvp(primals, tangents, *, op, contains):
    """Linear in the values; in the point, JAX differentiates the function."""
    n = op.num_point
    apply = functools.partial(_linear.bind, op=op, contains=contains)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        terms.append(apply(*primals[:n], *map(ad.instantiate_zeros, tangents[n:])))
    if any(type(t) is not ad.Zero for t in tangents[:n]):
        at_values = lambda *point: op(*point, *primals[n:])
        moving = tuple(map(ad.instantiate_zeros, tangents[:n]))
        terms.append(jax.jvp(at_values, tuple(primals[:n]), moving)[1])
    out = apply(*primals)
    if not terms:
        return out, [jnp.zeros(o.shape, o.dtype) for o in out]
    return out, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _transpose(cotangents, *operands, op, contains):
    point, values = operands[: op.num_point], operands[op.num_point :]
    cotangents = map(ad.instantiate_zeros, cotangents)
    out = _linear.bind(*point, *cotangents, op=op.transposed(), contains=contains)
    is_linear = map(ad.is_undefined_primal, values)
    wanted = [ct if linear else None for ct, linear in zip(out, is_linear, strict=True)]
    return [None] * len(point) + wanted


def _batch(axis_data, operands, dims, *, op, contains):
    if all(dim is None for dim in dims):  # JAX calls this rule with unmapped operands too
        out = _linear.bind(*operands, op=op, contains=contains)
        return out, [None] * len(out)
    n, pairs = op.num_point, list(zip(operands, dims, strict=True))
    moved = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in pairs]
    mapped = next(y for (_, dim), y in zip(pairs, moved, strict=True) if dim is not None)
    moved[n:] = [
        repeated(x, mapped) if dim is None else y
        for (x, dim), y in zip(pairs[n:], moved[n:], strict=True)
    ]
    arguments = {"axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}
    if type(axis_data.name) is not object:  # a bare object() stands for an axis without a name
        arguments["axis_name"] = axis_data.name
    in_axes = tuple(None if dim is None else 0 for dim in dims[:n])
    batched = op._replace(vmaps=(*op.vmaps, (in_axes, tuple(arguments.items()))))
    values = tuple(map(jax.typeof, moved[n:]))
    results = tuple(jax.make_jaxpr(batched)(*moved).out_avals)
    types = (results, values) if op.is_transpose else (values, results)
    out = _linear.bind(*moved, op=batched._replace(mapped_types=types), contains=contains)
    return out, [0] * len(out)


def _lower(context, *operands, op, contains):
    return mlir.lower_fun(op, multiple_results=True)(context, *operands)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.fancy_primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, _lower)
