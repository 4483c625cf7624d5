"""A linear map with a transpose of its own, for `jax.custom_jvp` rules whose reverse mode is
written by hand.

`jax.custom_vjp` would forbid forward mode and every nesting of it.  Here the tangent map is an
ordinary JAX function, so forward mode and higher orders are JAX's, while reverse mode at first
order runs the given transpose.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def linear(
    forward: Callable, transpose: Callable, static: Hashable, residuals: Any, tangents: Any
) -> Any:
    """forward(static, residuals, tangents), linear in tangents, differentiated in reverse by
    `transpose`.

    Args:
        forward: module-level function of (static, residuals, tangents) to a pytree; differentiable
            by JAX.
        transpose: module-level function of (static, residuals, cotangents, wanted) to cotangents
            like `tangents`; `wanted` is `tangents` with True for each array: where that has None,
            what the cotangent holds is dropped.
        static: hashable first argument of both.
        residuals: pytree of arrays, the point at which the map is taken.
        tangents: pytree of arrays; None for what is known to be zero.
    """
    flat_residuals, residual_tree = jax.tree.flatten(residuals)
    flat_tangents, in_tree = jax.tree.flatten(tangents)
    out_tree = jax.tree.structure(
        jax.eval_shape(functools.partial(forward, static), residuals, tangents)
    )
    op = _Map(forward, transpose, static, (residual_tree, in_tree, out_tree))
    return jax.tree.unflatten(out_tree, _bind(op, *flat_residuals, *flat_tangents))


class _Map(NamedTuple):
    """The map or its transpose; hashable, so that it can be a parameter of a primitive."""

    forward: Callable
    transpose: Callable
    static: Hashable
    trees: tuple  # of residuals, inputs, outputs
    is_transpose: bool = False

    @property
    def num_residuals(self):
        return self.trees[0].num_leaves

    def transposed(self):
        return self._replace(is_transpose=not self.is_transpose)

    def __call__(self, residuals, values):
        residual_tree, in_tree, out_tree = self.trees
        residuals = jax.tree.unflatten(residual_tree, residuals)
        if not self.is_transpose:
            return jax.tree.leaves(
                self.forward(self.static, residuals, jax.tree.unflatten(in_tree, values))
            )
        wanted = jax.tree.unflatten(in_tree, [True] * in_tree.num_leaves)
        cotangents = self.transpose(
            self.static, residuals, jax.tree.unflatten(out_tree, values), wanted
        )
        is_none = lambda leaf: leaf is None
        keep = lambda want, ct: ct if want else None
        return jax.tree.leaves(jax.tree.map(keep, wanted, cotangents, is_leaf=is_none))


class _Batched(NamedTuple):
    """A map under vmap: some residuals are mapped, all values are, over axis 0."""

    op: Any
    in_axes: tuple[int | None, ...]
    vmap_arguments: tuple  # of (name, value)

    @property
    def num_residuals(self):
        return self.op.num_residuals

    def transposed(self):
        return self._replace(op=self.op.transposed())

    def __call__(self, residuals, values):
        return jax.vmap(self.op, (self.in_axes, 0), 0, **dict(self.vmap_arguments))(
            residuals, values
        )


def _run(*operands, op):
    return list(op(operands[: op.num_residuals], operands[op.num_residuals :]))


def _bind(op, *operands):
    """The body travels along as a jaxpr, so that JAX sees what it needs for lowering (see `partition`)."""
    return _linear.bind(
        *operands, op=op, body=jax.make_jaxpr(functools.partial(_run, op=op))(*operands)
    )


_jitted = jax.jit(_run, static_argnames="op")
_linear = Primitive("jbn_linear")
_linear.multiple_results = True


@_linear.def_impl
def _(*operands, op, body):
    return _jitted(*operands, op=op)


@_linear.def_abstract_eval
def _(*_, op, body):
    return body.out_avals


def _jvp(primals, tangents, *, op, body):
    """Linear in the values; in the residuals, JAX differentiates the body."""
    n = op.num_residuals
    out = _bind(op, *primals)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        terms.append(_bind(op, *primals[:n], *map(ad.instantiate_zeros, tangents[n:])))
    if any(type(t) is not ad.Zero for t in tangents[:n]):
        at_values = lambda *residuals: op(residuals, primals[n:])
        terms.append(
            jax.jvp(at_values, tuple(primals[:n]), tuple(map(ad.instantiate_zeros, tangents[:n])))[
                1
            ]
        )
    return out, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)] if terms else [
        jnp.zeros_like(o) for o in out
    ]


def _transpose(cotangents, *operands, op, body):
    residuals, values = operands[: op.num_residuals], operands[op.num_residuals :]
    out = _bind(op.transposed(), *residuals, *map(ad.instantiate_zeros, cotangents))
    linear_in = map(ad.is_undefined_primal, values)
    return [None] * len(residuals) + [
        ct if undefined else None for ct, undefined in zip(out, linear_in, strict=True)
    ]


def _batch(axis_data, operands, dims, *, op, body):
    if all(dim is None for dim in dims):  # fancy batchers are called with unmapped operands too
        out = _bind(op, *operands)
        return out, [None] * len(out)
    n = op.num_residuals
    moved = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(operands, dims, strict=True)
    ]
    moved[n:] = [
        jnp.broadcast_to(x, (axis_data.size, *x.shape)) if dim is None else x
        for x, dim in zip(moved[n:], dims[n:], strict=True)
    ]
    named = {"axis_name": axis_data.name} if isinstance(axis_data.name, str) else {}
    arguments = {"axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name, **named}
    in_axes = tuple(None if dim is None else 0 for dim in dims[:n])
    out = _bind(_Batched(op, in_axes, tuple(arguments.items())), *moved)
    return out, [0] * len(out)


def _lower(context, *operands, op, body):
    return mlir.lower_fun(jaxpr_as_fun(body), multiple_results=True)(context, *operands)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.fancy_primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, _lower)
