"""The batch norms of a tree of variables, however it is kept: linen, nnx, plain (params, state), or a checkpoint of these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx, serialization

from jbn.types import Params, State

# Collections that hold statistics; the parameters of the same layer lie in "params" instead, or
# beside the statistics.
_STATISTICS = ("batch_stats", "state")


class Layer(NamedTuple):
    """One batch norm: arrays, or None for those that are not stored (flax trees hold no count)."""

    scale: Any
    bias: Any
    mean: Any
    var: Any
    count: Any


def find(variables: Any) -> dict[str, Layer]:
    """The layers of a tree, by path: wherever there are both a mean and a var.

    Args:
        variables: linen variables, an nnx module or state, or any nesting of mappings, sequences
            and named tuples that holds these or (params, state) of `jbn.init`.

    Returns:
        A dict from the path, joined by "/", to the layer.
    """
    leaves = _leaves(variables)
    layers = {}
    for path in leaves:
        at = path[:-1]
        if path[-1:] != ("mean",) or (*at, "var") not in leaves:
            continue
        learned = tuple("params" if key in _STATISTICS else key for key in at)
        scale, bias = (
            leaves.get((*learned, name), leaves.get((*at, name))) for name in ("scale", "bias")
        )
        name = "/".join(key for key in at if key not in _STATISTICS) or "layer"
        layers[name] = Layer(
            scale, bias, leaves[path], leaves[*at, "var"], leaves.get((*at, "count"))
        )
    return layers


def load(path: str | Path) -> Any:
    """The tree of a checkpoint: a file of flax.serialization (msgpack), or a folder of orbax.

    Arrays come back as NumPy's, so that the devices they were saved from need not be there.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is neither, or a folder of several trees.
        ModuleNotFoundError: a folder, and orbax is not installed.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there, expected an orbax folder or a flax msgpack file"
        )
    if path.is_file():
        try:
            return serialization.msgpack_restore(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a file of flax.serialization: {error}") from error
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a folder, which takes orbax to read: pip install 'jbn[examples]'"
        ) from error
    roots = sorted(found.parent for found in path.rglob("_METADATA"))
    if len(roots) != 1:
        raise ValueError(
            f"{path} holds {len(roots)} orbax trees, expected one: name the folder of a single step"
        )
    checkpointer = ocp.PyTreeCheckpointer()
    metadata: Any = checkpointer.metadata(roots[0]).item_metadata
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return checkpointer.restore(roots[0], restore_args=as_numpy)


def _leaves(tree):
    """Path -> array."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    leaves = {}

    def walk(node, path):
        children = _children(node)
        for key, child in children.items():
            walk(child, (*path, str(key)))
        if not children and hasattr(node, "shape") and hasattr(node, "dtype"):
            # Checkpoints of nnx states name the array of each variable "value".
            leaves[path[:-1] if path[-1:] == ("value",) else path] = node

    walk(tree, ())
    return leaves


def _children(node):
    """What a mapping or sequence holds, by key. In checkpoints named tuples are dicts, and tuples are lists or {"0": ...}."""
    if isinstance(node, list | tuple):
        node = dict(zip(getattr(node, "_fields", range(len(node))), node, strict=True))
    if not isinstance(node, Mapping):
        return {}
    fields = [set(_children(child)) for child in node.values()]
    is_pair = list(map(str, node)) == ["0", "1"] and fields == [
        set(Params._fields),
        set(State._fields),
    ]
    return dict(zip(("params", "state"), node.values(), strict=True)) if is_pair else node
