"""A whole norm as one equation of a traced program, for whoever reads or rewrites the program.

Only programs that are traced inside `marked` have such equations.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType

from jbn.core import op
from jbn.core.config import Config

# Whether this thread traces marks. JAX makes it part of the key of every jit's cache.
_MARKED = jax.make_user_context(False)


class Norm(NamedTuple):
    """What the equation of a norm computes."""

    function: Callable  # module-level; of the arguments and config
    config: Config

    def __call__(self, *arguments):
        return self.function(*arguments, config=self.config)


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
    return op.in_one(Norm(function, config), *arguments)


def norm_of(equation: JaxprEqn) -> op.Whole | None:
    """The norm that an equation of a program stands for, whose `steps` are a Norm, or None."""
    norm = equation.params.get("call") if equation.primitive is op.primitive else None
    return norm if isinstance(getattr(norm, "steps", None), Norm) else None


def with_activation(norm: op.Whole, activation: Callable, has_residual: bool) -> op.Whole:
    """The norm that applies the activation too.

    With `has_residual` its equation reads a residual after its other operands.
    """
    steps: Any = norm.steps
    tree = norm.tree
    if has_residual:
        arguments = jax.tree.unflatten(tree, range(tree.num_leaves))
        tree = jax.tree.structure((*arguments[:-1], tree.num_leaves))
    config = steps.config._replace(activation=activation)
    return norm._replace(steps=steps._replace(config=config), tree=tree)
