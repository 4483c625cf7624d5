"""The batch norms of a tree of variables, however it is kept: linen, nnx, plain (params, state), or
a checkpoint of these. Only reading is done here; judging is done in findings.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx, serialization
from flax.core.meta import AxisMetadata

from jbn.types import Params, State

# Collections that hold statistics; the parameters of the same layer lie in "params" instead, or
# beside the statistics.
_STATISTICS = ("batch_stats", "state")
COLLECTIONS = ("params", *_STATISTICS)
_MISSING, _EMPTY = object(), object()


class Layer(NamedTuple):
    """One batch norm: arrays, or None for those that are not stored (flax trees hold no count)."""

    scale: Any
    bias: Any
    mean: Any
    var: Any
    count: Any


def find(variables: Any) -> tuple[dict[str, Layer], dict[str, str]]:
    """The batch norms of a tree, by path: wherever there are both a mean and a var.

    Args:
        variables: linen variables, an nnx module or state, or any nesting of mappings, sequences
            and named tuples that holds these or (params, state) of `jbn.init`.

    Returns:
        A dict from the path, joined by "/", to the layer, and one from the paths of damaged layers
        to what is wrong with them: a mean or var that is missing or is no array of real numbers.
    """
    values = leaves(variables)
    found, damaged = {}, {}
    for at in dict.fromkeys(path if v is _EMPTY else path[:-1] for path, v in values.items()):
        own = {name: values.get((*at, name), _MISSING) for name in Layer._fields}
        name = "/".join(key for key in at if key not in _STATISTICS) or "layer"
        wrong = {key: text for key in ("mean", "var") if (text := _wrong(own[key]))}
        if not wrong:
            learned = tuple("params" if key in _STATISTICS else key for key in at)
            others = (values.get((*learned, key), own[key]) for key in ("scale", "bias"))
            scale, bias, count = (v if is_array(v) else None for v in (*others, own["count"]))
            found[name] = Layer(scale, bias, own["mean"], own["var"], count)
        elif _is_norm(at, own, values):
            name = "/".join(key for key in at if key not in COLLECTIONS) or name
            damaged[name] = " and ".join(f"{key} {text}" for key, text in wrong.items())
    return found, {name: text for name, text in damaged.items() if name not in found}


def leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """What a tree holds, by path, in its order: arrays, and whatever else is no container.

    No recursion, as a damaged checkpoint may be nested deeper than Python's stack.
    """
    found: dict[tuple[str, ...], Any] = {}
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        node = _opened(node)
        children = _children(node)
        if children:
            items = [((*path, str(key)), child) for key, child in children.items()]
            stack.extend(reversed(items))
        else:
            # Checkpoints of nnx states name the array of each variable "value".
            leaf = _EMPTY if isinstance(node, Mapping) else node
            found[path[:-1] if path[-1:] == ("value",) else path] = leaf
    return found


def load(path: str | Path) -> dict[str, Any]:
    """The trees of a checkpoint, by label: the steps of an orbax CheckpointManager's folder in
    order, or a single tree, that of a folder of orbax or a file of flax.serialization (msgpack).

    Arrays come back as NumPy's, so that the devices they were saved from need not be there.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is neither, is damaged, or holds several trees that are not steps.
        ModuleNotFoundError: a folder, and orbax is not installed.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there, expected an orbax folder or a flax msgpack file"
        )
    if path.is_file():
        try:
            return {path.name: serialization.msgpack_restore(path.read_bytes())}
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is not a file of flax.serialization, or is damaged: {_text(error)}"
            ) from error
    return {
        label: _restored({item: path / folder for item, folder in items.items()})
        for label, items in _steps(path).items()
    }


# What msgpack, NumPy, orbax and tensorstore raise on bytes that are not what they should be.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _steps(path):
    """Label -> item -> folder of an orbax tree, relative to path; an item "" stands alone."""
    roots = [found.parent.relative_to(path) for found in path.rglob("_METADATA")]
    roots = sorted(root for root in roots if "orbax-checkpoint-tmp" not in str(root))
    groups: dict[str, dict[str, Path]] = {}
    for root in roots:
        step = root.parts[0] if root.parts and re.search(r"\d$", root.parts[0]) else ""
        groups.setdefault(step, {})[str(root.relative_to(step or "."))] = root
    if ("" in groups and len(groups) > 1) or not groups:
        raise ValueError(
            f"{path} holds {len(roots)} orbax trees, expected one, or the steps of a "
            "CheckpointManager: name the folder of a single step"
        )
    number = lambda step: int(re.findall(r"\d+", step)[-1]) if step else 0
    return {
        step or path.name: {"": next(iter(groups[step].values()))}
        if len(groups[step]) == 1
        else groups[step]
        for step in sorted(groups, key=number)
    }


def _restored(items):
    """The tree of one folder, or a dict of those of several."""
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a checkpoint that is a folder takes orbax to read: pip install 'jbn[examples]'"
        ) from error
    checkpointer, trees = ocp.PyTreeCheckpointer(), {}
    for item, folder in items.items():
        try:
            metadata: Any = checkpointer.metadata(folder).item_metadata
            if metadata is None:
                raise ValueError("its metadata or the list of its arrays cannot be read")
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
            )
            trees[item] = checkpointer.restore(folder, restore_args=as_numpy)
        except _DAMAGE as error:
            raise ValueError(f"{folder} is damaged: {_text(error)}") from error
    return trees.get("", trees)


def _text(error):
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _opened(node):
    """What a module, variable or box of metadata holds."""
    if isinstance(node, nnx.Module):
        node = nnx.state(node)
    if isinstance(node, nnx.State):
        node = nnx.to_pure_dict(node)
    if isinstance(node, nnx.Variable):
        node = node.get_value()
    return node.unbox() if isinstance(node, AxisMetadata) else node


def _children(node):
    """What a mapping or sequence holds, by key.

    In checkpoints named tuples are dicts, and tuples are lists or {"0": ...}.
    """
    if isinstance(node, list | tuple):
        node = dict(zip(getattr(node, "_fields", range(len(node))), node, strict=True))
    if not isinstance(node, Mapping):
        return {}
    if list(map(str, node)) == ["0", "1"]:
        fields = [
            set(v if isinstance(v, Mapping) else getattr(v, "_fields", ())) for v in node.values()
        ]
        if fields == [set(Params._fields), set(State._fields)]:
            return dict(zip(("params", "state"), node.values(), strict=True))
    return node


def is_array(value: Any) -> bool:
    """Whether this is an array of real numbers."""
    return isinstance(value, np.ndarray | np.generic | jax.Array) and (
        jax.numpy.issubdtype(value.dtype, np.floating)
        or jax.numpy.issubdtype(value.dtype, np.integer)
    )


def _wrong(value):
    """What is wrong with a mean or var; "" for nothing."""
    if value is _MISSING:
        return "is missing"
    if is_array(value):
        return ""
    dtype = f" of {value.dtype}" if hasattr(value, "dtype") else ""
    return f"is no array of numbers but {type(value).__name__}{dtype}"


def _is_norm(at, own, values):
    """Whether what lies here is a damaged batch norm, and not something else that is no norm."""
    if any(key in _STATISTICS for key in at):
        empty = len(at) > 1 and values.get(at) is _EMPTY and at[-1] not in _STATISTICS
        return empty or own["mean"] is not _MISSING or own["var"] is not _MISSING
    beside = any(is_array(own[name]) for name in ("scale", "bias", "count"))
    if own["mean"] is not _MISSING or own["var"] is not _MISSING:
        return beside or (own["mean"] is not _MISSING and own["var"] is not _MISSING)
    if "params" not in at or not re.match(r"Batch(Re)?[Nn]orm", at[-1]) or not beside:
        return False
    # A copy of the parameters alone is no model; one with statistics of other layers beside it is.
    prefix = at[: at.index("params")]
    return any(path[: len(prefix) + 1] == (*prefix, "batch_stats") for path in values)
