"""Whole models: a torch state_dict of convolutions, dense layers and batch norms as the variables of a linen model."""

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax.numpy as jnp

from jbn.convert.layers import from_torch, to_array, to_linen

Path = tuple[Hashable, ...]


def resnet_path(prefix: str) -> Path:
    """Linen names for torchvision's: "layer1.0.downsample.0" is ("layer1_0", "downsample_0"), "conv1" is ("conv1",)."""
    block = re.fullmatch(r"(layer\d+)\.(\d+)\.(.+)", prefix)
    if block is None:
        return (prefix.replace(".", "_"),)
    stage, index, name = block.groups()
    return f"{stage}_{index}", name.replace(".", "_")


def from_torch_model(
    state_dict: Mapping[str, Any], path: Callable[[str], Path] = resnet_path
) -> dict[str, Any]:
    """The linen variables of a torch model.

        convolution  weight [out, in / groups, *window] -> kernel [*window, in / groups, out]
        dense        weight [out, in]                   -> kernel [in, out]
        batch norm   as `jbn.convert.from_torch`; Flax holds no num_batches_tracked

    torch pads by numbers: give the linen layers padding=1, not "SAME", which pads otherwise where
        strides are 2.  In eval the
    momentum does not matter; to train on, `jbn.convert.options` of one torch layer gives it.

    Args:
        state_dict: of the model, such as one of torchvision's ResNets. Transposed convolutions look
            like convolutions in it, and would be taken for such.
        path: linen path of a torch module from its prefix, such as "layer1.0.conv1".

    Returns:
        {"params": ..., "batch_stats": ...}, nested by `path`.

    Raises:
        ValueError: a module that is none of these, or two modules with one path.
    """
    prefixes = dict.fromkeys(key.rpartition(".")[0] for key in state_dict)
    paths = {prefix: path(prefix) for prefix in prefixes}
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"two modules have one path, expected each its own: {paths}")
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for prefix, target in paths.items():
        for collection, values in _module(state_dict, prefix).items():
            tree = variables[collection]
            for key in target:
                tree = tree.setdefault(key, {})
            tree.update(values)
    return variables


def _module(state_dict, prefix):
    """One module's variables by collection."""
    keys = {key for key in state_dict if key.rpartition(".")[0] == prefix}
    names = {key.rpartition(".")[2] for key in keys}
    if "running_mean" in names:
        return to_linen(*from_torch(state_dict, f"{prefix}."))
    weight = to_array(state_dict[f"{prefix}.weight"]) if "weight" in names else jnp.zeros(())
    if weight.ndim < 2 or names - {"weight", "bias"}:
        raise ValueError(
            f"{prefix!r} holds {sorted(names)}, expected a convolution, a dense layer or a batch norm"
        )
    kernel = {"kernel": jnp.moveaxis(weight, (0, 1), (-1, -2))}
    return {
        "params": kernel
        | ({"bias": to_array(state_dict[f"{prefix}.bias"])} if "bias" in names else {})
    }
