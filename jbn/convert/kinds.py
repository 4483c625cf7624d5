"""What a layer of another library is, told by its classes, not by the library or its attributes.

Only names are compared, so that no library is imported here. Subclasses count as what they extend.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_BATCH_NORMS = {
    ("torch", "_BatchNorm"): "torch",
    ("flax", "BatchNorm"): "flax",
    ("haiku", "BatchNorm"): "haiku",
    ("equinox", "BatchNorm"): "equinox",
    ("keras", "BatchNormalization"): "keras",
}
# Torch's modules that `jbn.convert.from_torch_model` knows. Classes of the same names in torch.ao,
# which are quantized, are none of them.
_TORCH_KINDS = {
    "_BatchNorm": "batch norm",
    "_ConvTransposeNd": "transposed convolution",
    "_ConvNd": "convolution",
    "Linear": "dense layer",
    "Embedding": "embedding",
    "LayerNorm": "layer norm",
    "GroupNorm": "group norm",
    "RMSNorm": "RMS norm",
}
_ACTIVATIONS: dict[str, Callable | None] = {
    "Identity": None,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "SiLU": jax.nn.silu,
    "Swish": jax.nn.silu,
    "Hardswish": jax.nn.hard_swish,
    "HardSwish": jax.nn.hard_swish,
    "Hardsigmoid": jax.nn.hard_sigmoid,
    "HardSigmoid": jax.nn.hard_sigmoid,
    "Mish": jax.nn.mish,
    "SELU": jax.nn.selu,
    "Sigmoid": jax.nn.sigmoid,
    "Tanh": jnp.tanh,
    "GELUTanh": jax.nn.gelu,
}


def library(layer: Any, expected: str | None = None) -> str:
    """The library of a batch norm: torch, flax, haiku, equinox or keras.

    Raises:
        TypeError: the layer is no batch norm, or not one of the library that is expected.
    """
    for cls in type(layer).__mro__:
        found = _BATCH_NORMS.get((cls.__module__.partition(".")[0], cls.__name__))
        if found is not None and expected in (None, found):
            return found
    raise TypeError(
        f"layer is a {type(layer).__module__}.{type(layer).__name__}, expected a batch norm of "
        f"{expected or 'torch.nn, flax, jbn, haiku, equinox or keras'}: the running statistics of "
        "other norms mean something else"
    )


def torch_kind(module: Any) -> str | None:
    """What a torch module is, or None."""
    return next((_TORCH_KINDS[n] for n in _torch_names(module) if n in _TORCH_KINDS), None)


def reads_images(module: Any) -> bool:
    """Whether a torch module is a batch norm that refuses all but images or volumes."""
    return not {"BatchNorm2d", "BatchNorm3d"}.isdisjoint(_torch_names(module))


def unflattened(module: Any) -> tuple[int, ...] | None:
    """The shape that a torch.nn.Unflatten gives to the features of each example, or None."""
    if "Unflatten" not in _torch_names(module) or module.dim != 1:
        return None
    return tuple(module.unflattened_size)


def _torch_names(module):
    return [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")]


def activation(module: Any) -> Callable | None:
    """The function of a torch or timm activation module, or None for the identity.

    Raises:
        TypeError: an activation that is not known here.
    """
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "none":
        return functools.partial(jax.nn.gelu, approximate=False)
    if name == "GELU":
        return jax.nn.gelu
    if name == "LeakyReLU":
        slope = module.negative_slope
        return jax.nn.leaky_relu if slope == 0.01 else functools.partial(_leaky_relu, slope=slope)
    if name == "ELU":
        return functools.partial(jax.nn.elu, alpha=module.alpha)
    if name not in _ACTIVATIONS:
        raise TypeError(
            f"the batch norm's activation is a {type(module).__module__}.{name}, expected one of "
            f"{', '.join(sorted((*_ACTIVATIONS, 'ELU', 'GELU', 'LeakyReLU')))}: apply it yourself "
            "after jbn.batch_norm_train"
        )
    return _ACTIVATIONS[name]


def _leaky_relu(x, slope):
    return jax.nn.leaky_relu(x, slope)


def untracked(name: str) -> str:
    """The message for a batch norm that keeps no running statistics."""
    return (
        f"{name} is a batch norm without running statistics (track_running_stats=False): it "
        "normalizes by the batch in evaluation too, expected running_mean and running_var"
    )
