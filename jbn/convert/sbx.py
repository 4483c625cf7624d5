"""Models of sbx (Stable Baselines Jax), to and from models with jbn's linen BatchRenorm."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn.core import validate

_OWN = {"mean", "var", "r_max", "d_max", "steps"}  # of sbx's layer in batch_stats
_COUNTING = {"mean", "var", "steps"}  # of jbn's layer, if it counts


def from_sbx(variables: Mapping[str, Any], *, r_max: float = 3, d_max: float = 5) -> dict[str, Any]:
    """The variables of the same model with jbn's layer, wherever sbx's BatchRenorm stands in them.

    sbx keeps the limits in batch_stats beside the statistics; jbn's layer has them as attributes.
    For both to train alike, sbx's defaults are to be given to jbn's layer:

        jbn.linen.BatchRenorm(momentum=0.99, epsilon=1e-3, warmup_steps=100_000)

    Until `warmup_steps` both compute the same. After them sbx leaves epsilon out of the standard
    deviation that d is multiplied by, and does not divide epsilon by r^2 with the variance; jbn
    follows Ioffe (2017). By how much they then differ depends on the network and its statistics: in
    sbx's critics and actors outputs differed by 0.0001 to 0.07, and gradients by 0.001 to 0.5,
    relative. With epsilon in both places sbx's formula gives jbn's numbers. One fault of it ends
    with the conversion: where a feature is constant over the batch, sbx's gradient with respect to
    it is NaN.

    Args:
        variables: {"params": ..., "batch_stats": ...} of a whole model or of one layer; layers
            under nn.vmap, such as an ensemble of critics, too.
        r_max, d_max: the limits of jbn's layers.

    Returns:
        The same tree, with steps int32 and without the limits.

    Raises:
        ValueError: a layer has other limits, or there is no layer of sbx's.
    """
    validate.mapping(variables, "variables", "those of a model of sbx")
    if not _holds(variables, _OWN):
        raise ValueError(
            f"variables hold {list(variables)} and no layer of {sorted(_OWN)}, expected those of a "
            "model with sbx's BatchRenorm, batch_stats included"
        )
    return _mapped(variables, _OWN, lambda layer, path: _without_limits(layer, path, r_max, d_max))


def to_sbx(variables: Mapping[str, Any], *, r_max: float = 3, d_max: float = 5) -> dict[str, Any]:
    """The variables for sbx, of a model with jbn's BatchRenorm that counts its steps.

    Args:
        variables: {"params": ..., "batch_stats": ...} of a whole model or of one layer.
        r_max, d_max: the limits to store.

    Raises:
        ValueError: no layer counts its steps.
    """
    validate.mapping(variables, "variables", "those of a model with jbn's BatchRenorm")
    if not _holds(variables, _COUNTING):
        raise ValueError(
            f"variables hold {list(variables)} and no layer of {sorted(_COUNTING)}, expected those "
            "of a model with jbn.linen.BatchRenorm, which has steps in batch_stats with "
            "warmup_steps only, such as sbx's 100_000"
        )
    limits = {"r_max": r_max, "d_max": d_max}

    def with_limits(layer, path):
        steps = jnp.asarray(layer["steps"])
        return {**layer, **{key: jnp.full(steps.shape, value) for key, value in limits.items()}}

    return _mapped(variables, _COUNTING, with_limits)


def _holds(tree, names):
    """Whether a mapping somewhere in the tree has exactly `names`."""
    if not isinstance(tree, Mapping):
        return False
    return set(tree) == names or any(_holds(value, names) for value in tree.values())


def _mapped(tree, names, change, path=()):
    """The tree with `change` made of each mapping that has exactly `names`."""
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == names:
        return change(dict(tree), path)
    return {key: _mapped(value, names, change, (*path, key)) for key, value in tree.items()}


def _without_limits(layer, path, r_max, d_max):
    for name, expected in (("r_max", r_max), ("d_max", d_max)):
        value = np.asarray(layer.pop(name))
        if np.any(value != expected):
            raise ValueError(
                f"{'/'.join(map(str, path))} has {name} {value}, expected {expected}: give "
                f"from_sbx, and jbn's layers, this {name}"
            )
    return {**layer, "steps": jnp.asarray(np.asarray(layer["steps"]), jnp.int32)}
