"""Which parameters an optimizer may touch: masks for optax that tell batch norms from the rest.

Three choices are separate for every layer: which statistics normalize (`use_running_average`),
whether the state updates (`update_stats` in the modules, keeping the old State in the functional
API), and whether scale and bias train (here).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jbn.core import validate
from jbn.types import Params


def norm_mask(params: Any, select: Callable[[tuple[str, ...]], bool] = lambda path: True) -> Any:
    """True for the scale and bias of normalization layers, False for everything else.

    Freeze them (after the optimizer, in a chain), or spare them weight decay:

        optax.masked(optax.set_to_zero(), norm_mask(params))
        optax.add_decayed_weights(1e-4, mask=lambda p: not_(norm_mask(p)))

    A layer is whatever holds a "scale", a "bias" or both and nothing else (with a "kernel" beside
    the bias it is no norm), or a `jbn.Params`. A norm of Flax with use_scale=False holds only a
    "bias", as nothing else in Flax does.

    Args:
        params: tree of parameters, of any containers that JAX knows: linen's, an nnx.State of
            nnx.Params or its pure dict, one that holds jbn.Params, or one whose keys are whole
            paths (nnx.to_flat_state, flax.traverse_util.flatten_dict).
        select: function of a layer's path; layers it declines are False.

    Returns:
        A tree of bools of the very structure of params.

    Raises:
        TypeError: params is no tree, or select no function.
    """
    validate.function(select, "select", "of a layer's path")
    if jax.tree_util.all_leaves([params]) and params is not None:
        raise TypeError(
            f"params is a {type(params).__name__} ({params!r:.60}), expected a tree of parameters, "
            "such as model.init's variables['params']"
        )
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(keys) for keys, _ in flat]
    if isinstance(params, nnx.statelib.FlatState):  # whose keys do not show in JAX's paths
        paths = [tuple(map(str, path)) for path, _ in params]
    layers: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        for depth in range(len(path)):
            # A layer that is called "bias" lies here too, as "bias/kernel": by its whole rest.
            layers.setdefault(path[:depth], set()).add("/".join(path[depth:]))
    functional = {
        _names(keys)
        for keys, node in jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda node: isinstance(node, Params)
        )[0]
        if isinstance(node, Params)
    }

    def is_norm(path):
        layer = path[:-1]
        named = bool(path) and layers[layer] <= {"scale", "bias"}
        return bool((layer in functional or named) and select(layer))

    return structure.unflatten([is_norm(path) for path in paths])


def not_(mask: Any) -> Any:
    """The complement of a mask.

    Raises:
        TypeError: the mask holds anything but bools.
    """
    return jax.tree.map(lambda chosen: not validate.flag(chosen, "mask"), mask)


def _names(keys) -> tuple[str, ...]:
    """The names along a path, without the attribute in which nnx's variables hold their array."""
    if keys and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]
    named = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in keys)
    whole = (name if isinstance(name, tuple) else (name,) for name in named)
    return tuple(map(str, itertools.chain(*whole)))
