"""The layers of a torch model, from the model itself or from its state_dict.

What becomes of them in linen is not told here.
"""

from typing import Any, NamedTuple

from jax import Array

from jbn.convert import kinds
from jbn.convert.layers import BATCH_NORM_NAMES, from_torch, to_array
from jbn.core import validate


class Layer(NamedTuple):
    """One module that holds arrays.

    Attributes:
        kind: one of those that `jbn.convert.kinds.torch_kind` gives.
        tensors: by their names in the module.
        eps: of a norm; None where a state_dict does not tell.
        of_images: whether it is a norm that reads nothing but images, such as a BatchNorm2d.
        unflattened: the shape that a torch.nn.Unflatten right before it gives to each example.
    """

    kind: str
    tensors: dict[str, Array]
    eps: float | None = None
    of_images: bool = False
    unflattened: tuple[int, ...] | None = None


def read(source: Any) -> dict[str, Layer]:
    """The layers of a torch model or of its state_dict, by prefix, in their order there."""
    layers = _of_model(source) if hasattr(source, "named_modules") else _of_state_dict(source)
    if not layers:
        raise ValueError(f"state_dict is empty ({source!r:.60}), expected that of a model")
    return layers


def _of_model(model):
    layers, unflattened = {}, None
    for prefix, module in model.named_modules():
        unflattened = kinds.unflattened(module) or unflattened
        kind, children = kinds.torch_kind(module), dict(module.named_children())
        state = {
            name: value
            for name, value in module.state_dict().items()
            if name.partition(".")[0] not in children
        }
        if kind == "batch norm" and "running_mean" not in state:
            from_torch(module)  # raises
        if not state:
            continue
        if kind is None:
            raise TypeError(
                f"{prefix!r} is a {type(module).__module__}.{type(module).__name__} that holds "
                f"{sorted(state)}, expected a convolution, a dense layer, an embedding or a norm"
                f"{_mend(state) or ': convert it yourself'}"
            )
        _expect_names(prefix, kind, state)
        if kind == "transposed convolution" and module.groups != 1:
            raise ValueError(
                f"{prefix!r} has groups={module.groups}, expected 1: Flax's ConvTranspose has none"
            )
        layers[prefix] = Layer(
            kind,
            {name: to_array(value) for name, value in state.items()},
            getattr(module, "eps", None),
            kinds.reads_images(module),
            unflattened,
        )
        unflattened = None
    return layers


def _of_state_dict(state_dict):
    """As `_of_model`, with the kinds told by the names and ranks."""
    validate.mapping(state_dict, "state_dict", "that of a torch model, or the model itself")
    layers: dict[str, Any] = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        layers.setdefault(prefix, {})[name] = to_array(value)
    return {prefix: Layer(_kind(prefix, tensors), tensors) for prefix, tensors in layers.items()}


def _kind(prefix, tensors):
    names = set(tensors)
    if "running_mean" in names:
        _expect_names(prefix, "batch norm", names)
        return "batch norm"
    rank = tensors["weight"].ndim if "weight" in names else 0
    if names <= {"weight", "bias"} and rank > 2:
        out, made = tensors["weight"].shape[:2]  # of a convolution; the other way if transposed
        transposed = "bias" in names and tensors["bias"].shape == (made,) != (out,)
        return "transposed convolution" if transposed else "convolution"
    if names == {"weight", "bias"} and rank == 2:
        return "dense layer"
    if names == {"weight"} and rank == 2:
        raise ValueError(
            f"{prefix!r} holds a matrix without bias, which may be a dense layer or an embedding: "
            "pass the model itself in place of its state_dict"
        )
    raise ValueError(
        f"{prefix!r} holds {sorted(names)}, expected a convolution, a dense layer or a batch norm "
        "with running statistics; with the model itself in place of its state_dict, embeddings and "
        f"other norms convert too{_mend(names)}"
    )


def _expect_names(prefix, kind, names):
    expected = BATCH_NORM_NAMES if kind == "batch norm" else ("weight", "bias")
    if set(names) - set(expected) or (kind != "batch norm" and "weight" not in names):
        raise ValueError(
            f"{prefix!r} is a {kind} that holds {sorted(names)}, expected no other names than "
            f"{', '.join(expected)}{_mend(names)}"
        )


# A name that a reparametrized layer holds, and the way back to a plain weight.
_PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
_UNDONE = {
    "original": _PARAMETRIZED,
    "original0": _PARAMETRIZED,
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_u": "torch.nn.utils.remove_spectral_norm(layer)",
}


def _mend(names):
    undo = _PARAMETRIZED if set(names) == {"bias"} else None
    undo = next((call for name, call in _UNDONE.items() if name in names), undo)
    return "" if undo is None else f": first call {undo}, which leaves a plain weight"
