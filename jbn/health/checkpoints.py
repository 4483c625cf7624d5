"""The batch norms of a tree of variables, however it is kept: linen, nnx, plain (params, state), or
a checkpoint of these. Only reading is done here; judging is done in findings.py.
"""

import re
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
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
        to what is wrong with them: a mean or var that is missing, or a value that is no array of
        numbers. Names of collections are left out of the path, unless two would be the same.
    """
    values = leaves(variables)
    paths = _Paths(variables, values)
    found, damaged = {}, {}
    for at in dict.fromkeys(path if v is _EMPTY else path[:-1] for path, v in values.items()):
        own = {key: values.get((*at, key), _MISSING) for key in Layer._fields}
        for key in ("scale", "bias"):
            if own[key] is _MISSING:
                own[key] = values.get((*paths.parameters(at), key), _MISSING)
        wrong = {key: text for key, v in own.items() if (text := _wrong(key, v))}
        if not wrong:
            found[at] = Layer(*(v if is_array(v, real=False) else None for v in own.values()))
        elif not {"mean", "var"} & set(wrong) or _is_norm(at, own, values, paths):
            damaged[at] = " and ".join(f"{key} {text}" for key, text in wrong.items())
    # The parameters of a norm that is listed by its statistics are no norm of their own.
    known = {paths.short(at) for at in (*found, *damaged) if not paths.holds(at, "params")}
    for at in [at for at in damaged if paths.holds(at, "params") and paths.short(at) in known]:
        del damaged[at]
    names = paths.names((*found, *damaged))
    return (
        {names[at]: layer for at, layer in found.items()},
        {names[at]: text for at, text in damaged.items()},
    )


def find_some(variables: Any) -> tuple[dict[str, Layer], dict[str, str]]:
    """`find`, where a tree without a batch norm is an error."""
    found, damaged = find(variables)
    if not found and not damaged:
        raise ValueError(
            "no batch norm in these variables, expected somewhere both a mean and a var: pass "
            "batch_stats too"
        )
    return found, damaged


def parameters(tree: Any) -> ChainMap[str, Any]:
    """What a tree holds, by path joined by "/", without and then with the names of collections."""
    values = leaves(tree)
    names = _Paths(tree, values).names(tuple(values))
    short = {names[path]: value for path, value in values.items()}
    return ChainMap(short, {"/".join(path): value for path, value in values.items()})


def shortener(tree: Any) -> Callable[[Sequence[Any]], str]:
    """A function from a path in the tree to the path joined by "/", without collections."""
    paths = _Paths(tree, leaves(tree))
    return lambda path: "/".join(paths.short(tuple(map(str, path))))


class _Paths:
    """The paths of a tree, of which some keys name collections and the others modules.

    Both may have the same name. A key names a collection if it is the outermost such key of its
    path or stands beside its counterpart ("params" beside "batch_stats" or "state"), and not if it
    lies below a collection of Flax. The tree of an nnx module holds no collection.
    """

    def __init__(self, tree, paths):
        self._is_module = isinstance(tree, nnx.Module | nnx.State)
        self._keys = {
            path[: i + 1] for path in paths for i, key in enumerate(path) if key in COLLECTIONS
        }

    def collections(self, path):
        """The positions of the keys that name collections."""
        found = []
        for i, key in enumerate(path):
            if self._is_module or key not in COLLECTIONS:
                continue
            others = _STATISTICS if key == "params" else ("params",)
            if not found or any((*path[:i], other) in self._keys for other in others):
                found.append(i)
            if (*path[:i], "batch_stats") in self._keys:
                break
        return found

    def holds(self, path, *names):
        """Whether the path leads through a collection of one of these names."""
        return any(path[i] in names for i in self.collections(path))

    def parameters(self, path):
        """From the path of a layer's statistics to that of its parameters."""
        at = [i for i in self.collections(path) if path[i] in _STATISTICS][-1:]
        return tuple("params" if i in at else key for i, key in enumerate(path))

    def short(self, path):
        left_out = self.collections(path)
        return tuple(key for i, key in enumerate(path) if i not in left_out)

    def names(self, paths):
        """Path -> name: of three, each longer, the first that no other path has."""
        texts = (
            lambda path: "/".join(self.short(path)) or "layer",
            lambda path: "/".join(path) or "layer",
            lambda path: "/".join(map(repr, path)),
        )
        names: dict[tuple[str, ...], str] = {}
        for text in texts:
            made = {path: text(path) for path in paths if path not in names}
            counts = Counter(made.values())
            taken = set(names.values())
            names |= {path: n for path, n in made.items() if counts[n] == 1 and n not in taken}
        return {path: names[path] for path in paths}


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


def is_array(value: Any, *, real: bool = True) -> bool:
    """Whether this is an array of numbers, real or complex ones."""
    kinds = (np.floating, np.integer) if real else (np.number,)
    return isinstance(value, np.ndarray | np.generic | jax.Array) and any(
        jax.numpy.issubdtype(value.dtype, kind) for kind in kinds
    )


def _wrong(key, value):
    """What is wrong with a value of a layer; "" for nothing."""
    required = key in ("mean", "var")
    if value is _MISSING or (not required and (value is None or value is _EMPTY)):
        return "is missing" if required else ""
    if is_array(value, real=key in ("var", "count")):
        return ""
    dtype = f" of {value.dtype}" if hasattr(value, "dtype") else ""
    kind = "dict" if value is _EMPTY else type(value).__name__
    return f"is no array of numbers but {kind}{dtype}"


def _is_norm(at, own, values, paths):
    """Whether what lies here is a damaged batch norm, and not something else that is no norm."""
    if paths.holds(at, *_STATISTICS):
        empty = len(at) > 1 and values.get(at) is _EMPTY and at[-1] not in _STATISTICS
        return empty or own["mean"] is not _MISSING or own["var"] is not _MISSING
    beside = any(is_array(own[name], real=False) for name in ("scale", "bias", "count"))
    if own["mean"] is not _MISSING or own["var"] is not _MISSING:
        return beside or (own["mean"] is not _MISSING and own["var"] is not _MISSING)
    if "params" not in at or not re.match(r"Batch(Re)?[Nn]orm", at[-1]) or not beside:
        return False
    # A copy of the parameters alone is no model; one with statistics of other layers beside it is.
    prefix = at[: at.index("params")]
    return any(path[: len(prefix) + 1] == (*prefix, "batch_stats") for path in values)
