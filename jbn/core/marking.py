"""A whole norm as one equation of a traced program, for whoever reads or rewrites the program.

Only programs that are traced inside `marked` have such equations.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType

from jbn.core import op
from jbn.core.config import Config

# Whether this thread traces marks. JAX makes it part of the key of every jit's cache.
_MARKED = jax.make_user_context(False)


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """A context in which each norm is traced as one equation, see `norm_of`.

    Inside shard_map and pmap, and with an axis_name, norms are traced as ever.
    """
    with _MARKED(True):
        yield


def call(function: Callable, x: Array, *arguments: Any, config: Config) -> Any:
    """function(x, *arguments, config=config), as one equation inside `marked`.

    The last argument is the residual or None, and y is the first of the results.
    """
    arguments = (x, *arguments)
    in_shards = lambda: AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types
    if not _MARKED.value or config.axis_name is not None or in_shards():
        return function(*arguments, config=config)
    leaves, tree = jax.tree.flatten(arguments)
    norm = op.Inlined(function, tree, config, ())
    program, out = jax.make_jaxpr(norm, return_shape=True)(*leaves)
    norm = norm._replace(types=tuple(program.out_avals))
    results = op.primitive.bind(*leaves, call=norm, devices=op.needs_devices())
    return jax.tree.unflatten(jax.tree.structure(out), results)


def norm_of(equation: JaxprEqn) -> op.Inlined | None:
    """The norm that an equation of a program stands for, or None."""
    norm = equation.params.get("call") if equation.primitive is op.primitive else None
    return norm if isinstance(norm, op.Inlined) else None


def with_activation(norm: op.Inlined, activation: Callable, has_residual: bool) -> op.Inlined:
    """The norm that applies the activation too.

    With `has_residual` its equation reads a residual after its other operands.
    """
    tree = norm.tree
    if has_residual:
        arguments = jax.tree.unflatten(tree, range(tree.num_leaves))
        tree = jax.tree.structure((*arguments[:-1], tree.num_leaves))
    return norm._replace(tree=tree, config=norm.config._replace(activation=activation))
