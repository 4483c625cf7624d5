"""Which parameters an optimizer may touch: masks for optax that tell batch norms from the rest.

Three choices are separate for every layer: which statistics normalize (`use_running_average`),
    whether the state updates
(`update_stats` in the modules, keeping the old State in the functional API), and whether scale and
bias train (here).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jbn.types import Params


def norm_mask(params: Any, select: Callable[[tuple[str, ...]], bool] = lambda path: True) -> Any:
    """True for the scale and bias of normalization layers, False for everything else.

        optax.masked(optax.set_to_zero(), norm_mask(params))                     freezes them (after the optimizer, in a chain)
        optax.add_decayed_weights(1e-4, mask=lambda p: not_(norm_mask(p)))        spares them weight decay

    A layer is one that holds a "scale" (a "kernel" and "bias" is none), or a `jbn.Params`. A norm
    of flax with use_scale=False holds only a "bias", as nothing else in Flax does, and counts too.

    Args:
        params: tree of parameters: linen's, the pure dict of nnx.Params, or one that holds
            jbn.Params.
        select: function of a layer's path; layers it declines are False.

    Returns:
        A tree of bools like params.
    """

    def mark(tree, path):
        if isinstance(tree, Params):
            return jax.tree.map(lambda _: select(path), tree)
        if isinstance(tree, Mapping):
            if (
                tree
                and set(tree) <= {"scale", "bias"}
                and not any(isinstance(v, Mapping) for v in tree.values())
            ):
                return {name: select(path) for name in tree}
            return {key: mark(below, (*path, str(key))) for key, below in tree.items()}
        if isinstance(tree, (list, tuple)):
            marked = [mark(below, (*path, str(index))) for index, below in enumerate(tree)]
            return type(tree)(*marked) if hasattr(tree, "_fields") else type(tree)(marked)
        return jax.tree.map(lambda _: False, tree)

    return mark(params, ())


def not_(mask: Any) -> Any:
    """The complement of a mask."""
    return jax.tree.map(lambda chosen: not chosen, mask)
