"""A whole norm as one equation of a traced program, for whoever reads or rewrites the program.

Only programs that are traced inside `marked` have such equations. An equation means what the call
that it stands for means: jvp, vmap and lowering go to that call.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jbn.core import op
from jbn.core.config import Config

# Whether this thread traces marks. JAX makes it part of the key of every jit's cache.
_MARKED = jax.make_user_context(False)


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """A context in which each norm is traced as one equation of the primitive `norm`.

    Inside shard_map and pmap, and with an axis_name, norms are traced as ever.
    """
    with _MARKED(True):
        yield


def call(function: Callable, x: Array, *arguments: Any, config: Config) -> Any:
    """function(x, *arguments, config=config), as one equation inside `marked`.

    The last argument is the residual or None, and y is the first of the results.
    """
    arguments = (x, *arguments)
    is_manual = AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types
    if not _MARKED.value or is_manual or config.axis_name is not None:
        return function(*arguments, config=config)
    leaves, tree = jax.tree.flatten(arguments)
    params = {"function": function, "tree": tree, "config": config}
    program, out = jax.make_jaxpr(_run(**params), return_shape=True)(*leaves)
    results = norm.bind(
        *leaves, **params, types=tuple(program.out_avals), devices=op.needs_devices()
    )
    return jax.tree.unflatten(jax.tree.structure(out), results)


def with_activation(
    params: dict[str, Any], activation: Callable, has_residual: bool
) -> dict[str, Any]:
    """The parameters of an equation of `norm` that applies the activation too.

    With `has_residual` the equation reads a residual after its other operands.
    """
    tree, config = params["tree"], params["config"]
    if has_residual:
        count = tree.num_leaves
        arguments = jax.tree.unflatten(tree, range(count))
        tree = jax.tree.structure((*arguments[:-1], count))
    return params | {"tree": tree, "config": config._replace(activation=activation)}


def _run(function, tree, config):
    """The call as a function of its leaves, whose results are a tree."""
    return lambda *leaves: function(*jax.tree.unflatten(tree, leaves), config=config)


def _flat(*, function, tree, config, types, devices):
    """The call as a function of its leaves, whose results are a list."""
    del types, devices
    run = _run(function, tree, config)
    return lambda *leaves: jax.tree.leaves(run(*leaves))


def _jvp(primals, tangents, **params):
    moving = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def along(*values):
        leaves = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
        return _flat(**params)(*leaves.values())

    return jax.jvp(along, [primals[k] for k in moving], [tangents[k] for k in moving])


def _batch(leaves, dims, **params):
    out = jax.vmap(_flat(**params), dims)(*leaves)
    return out, [0] * len(out)


def _lower(context, *leaves, **params):
    return mlir.lower_fun(_flat(**params), multiple_results=True)(context, *leaves)


norm = Primitive("jbn_norm")
norm.multiple_results = True
norm.def_impl(lambda *leaves, **params: _flat(**params)(*leaves))
norm.def_abstract_eval(lambda *avals, types, **params: list(types))
ad.primitive_jvps[norm] = _jvp
batching.primitive_batchers[norm] = _batch
mlir.register_lowering(norm, _lower)
