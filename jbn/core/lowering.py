"""What is decided when a program is lowered, because only then its platform and devices are known.

One primitive for all such decisions.  `choose` sees the lowering context and picks a candidate, or
raises.  Everything that comes before lowering, derivatives and vmap, takes the reference instead:
it computes the same in plain JAX.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def at_lowering(
    choose: Callable[[Any], int],
    candidates: tuple[Callable, ...],
    reference: Callable,
    *arrays: Array,
    vmapped: Callable | None = None,
) -> list[Array]:
    """candidates[choose(module context)](*arrays).

    Args:
        choose: function of `LoweringRuleContext.module_context` to the index of a candidate.
        candidates: functions of the arrays to lists of arrays, all of the same types. The first is
            traced at once, so that
            JAX sees before lowering what it needs: one that needs to know the devices stands there.
        reference: the same function in plain JAX: what is differentiated, in either mode and any
            order.
        arrays: what the functions are called with.
        vmapped: function of the arrays with one more leading axis each; None for
            jax.vmap(reference).
    """
    first, *others = candidates
    options = {"choose": choose, "first": jax.make_jaxpr(first)(*arrays), "others": tuple(others)}
    return _decide.bind(
        *arrays, **options, reference=reference, vmapped=vmapped or jax.vmap(reference)
    )


_decide = Primitive("jbn_at_lowering")
_decide.multiple_results = True
_decide.def_impl(
    lambda *arrays, **params: jax.jit(lambda *arrays: _decide.bind(*arrays, **params))(*arrays)
)
_decide.def_abstract_eval(lambda *_, first, **__: first.out_avals)


def _jvp(primals, tangents, *, reference, **params):
    moving = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def along(*values):
        arrays = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
        return reference(*arrays.values())

    out = _decide.bind(*primals, reference=reference, **params)
    return out, jax.jvp(along, [primals[k] for k in moving], [tangents[k] for k in moving])[1]


def _batch(arrays, dims, *, vmapped, **_):
    size = next(
        array.shape[dim] for array, dim in zip(arrays, dims, strict=True) if dim is not None
    )
    moved = [
        jnp.broadcast_to(array, (size, *array.shape))
        if dim is None
        else jnp.moveaxis(array, dim, 0)
        for array, dim in zip(arrays, dims, strict=True)
    ]
    out = vmapped(*moved)
    return out, [0] * len(out)


def _lower(context, *arrays, choose, first, others, **_):
    chosen = (jaxpr_as_fun(first), *others)[choose(context.module_context)]
    return mlir.lower_fun(chosen, multiple_results=True)(context, *arrays)


ad.primitive_jvps[_decide] = _jvp
batching.primitive_batchers[_decide] = _batch
mlir.register_lowering(_decide, _lower)
