"""Whole models of torch: the variables of a linen model, and which of the norms can be folded."""

import itertools
import math
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax.numpy as jnp

from jbn.convert import kinds
from jbn.convert.layers import from_torch, to_array, to_linen
from jbn.core import validate
from jbn.fold.pairs import Pair

Path = tuple[Hashable, ...]

# Names of a convolution and of the norm that alone reads it, within one module: of torchvision's
# and timm's resnets, regnets, densenets, mobilenets and efficientnets. "#" is a number.
_FOLLOWS = (
    ("conv#", "bn#", 0),
    ("conv#", "norm#", 0),  # densenets: their stem
    ("conv#", "norm#", 1),  # and their layers, where each norm stands before its convolution
    ("#", "#", 1),  # torchvision: a Sequential of convolution, norm and activation
    ("conv", "bn", None),  # timm's regnets
)


def resnet_path(prefix: str) -> Path:
    """Linen names for torchvision's ResNets.

    "layer1.0.downsample.0" is ("layer1_0", "downsample_0"), "conv1" is ("conv1",).
    """
    block = re.fullmatch(r"(layer\d+)\.(\d+)\.(.+)", prefix)
    if block is None:
        return (prefix.replace(".", "_"),) if prefix else ()
    stage, index, name = block.groups()
    return f"{stage}_{index}", name.replace(".", "_")


def module_path(prefix: str) -> Path:
    """Linen names for any torch module tree; on ResNets those of `resnet_path`.

    A number belongs to the name before it: "features.3.conv.0.1" is ("features_3", "conv_0_1").
    """
    joined = re.sub(r"\.(?=\d+(\.|$))", "_", prefix)
    return tuple(joined.split(".")) if joined else ()


def from_torch_model(
    state_dict: Any,
    path: Callable[[str], Path] = resnet_path,
    *,
    flattened: Mapping[str, tuple[int, ...] | None] | None = None,
) -> dict[str, Any]:
    """The linen variables of a torch model.

        convolution  weight [out, in / groups, *window] -> kernel [*window, in / groups, out]
        transposed   weight [in, out, *window]          -> kernel [*window, out, in], for linen's
                     ConvTranspose with transpose_kernel=True
        dense        weight [out, in]                   -> kernel [in, out]
        embedding    weight [number, features]          -> embedding, as it is
        batch norm   as `jbn.convert.from_torch`; Flax holds no num_batches_tracked
        layer norm, group norm, RMS norm                -> scale, bias

    Torch pads by numbers: give the linen layers padding=1, not "SAME", which pads otherwise where
    strides are 2. In eval the momentum does not matter; to train on, `jbn.convert.options` of one
    torch layer gives it (and the activation of timm's BatchNormAct2d).

    Args:
        state_dict: the model, whose layers are taken for what they are. Or its state_dict, in which
            a transposed convolution looks like a convolution (and has the kernel given above), and
            a matrix without bias may be a dense layer or an embedding, which is an error.
        path: linen path of a torch module from its prefix, such as "layer1.0.conv1".
        flattened: the shape (channels, height, width) that a Flatten before a dense layer reads,
            by the dense layer's prefix. Torch flattens channels first, linen last, so the rows of
            the kernel change places. None for a dense layer that reads no such thing.

    Returns:
        {"params": ..., "batch_stats": ...}, nested by `path`.

    Raises:
        ValueError: a module that is none of these, two modules with one path, sizes that do not fit
            each other, or a dense layer that seems to read a flattened image.
        TypeError: a layer of the model that is none of these.
    """
    layers = _of_model(state_dict) if hasattr(state_dict, "named_modules") else _of(state_dict)
    if not layers:
        raise ValueError(f"state_dict is empty ({state_dict!r:.60}), expected that of a model")
    validate.function(path, "path", "from a torch prefix to a linen path")
    if flattened is not None:
        validate.mapping(flattened, "flattened", "a dict from a dense layer's prefix to a shape")
    paths = {prefix: path(prefix) for prefix in layers}
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"two modules have one path, expected each its own: {paths}")
    flattened = dict(flattened or {})
    if unknown := sorted(
        set(flattened) - {p for p, (kind, _) in layers.items() if "dense" in kind}
    ):
        raise ValueError(f"flattened names {unknown}, expected dense layers of {list(layers)}")
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    channels = None  # of the last convolution or batch norm
    for prefix, (kind, tensors) in layers.items():
        if kind == "dense layer":
            shape = _flattened(prefix, tensors["weight"].shape[1], channels, flattened)
            converted, channels = _dense(prefix, tensors, shape), None
        else:
            converted = _converted(prefix, kind, tensors)
            if kind == "batch norm":  # a densenet's last one reads many convolutions
                channels = tensors["running_mean"].shape[0]
            elif "convolution" in kind:
                channels = tensors["weight"].shape[0 if kind == "convolution" else 1]
        for collection, values in converted.items():
            tree = variables[collection]
            for key in paths[prefix]:
                tree = tree.setdefault(key, {})
            tree.update(values)
    return variables


def torch_pairs(
    state_dict: Mapping[str, Any], path: Callable[[str], Path] = resnet_path, *, eps: float = 1e-5
) -> tuple[Pair, ...]:
    """The batch norms of a torch model that can be folded, by the names of its layers.

    For torchvision's resnets, regnets, densenets, mobilenets and efficientnets, and timm's where
    the modules have the same names: a norm is paired with the convolution that is registered right
    before it in the same module, under a name that these models give to such a pair. Other models
    may use these names for something else: certify the result, or use `jbn.fold.find_pairs`.

    Args:
        state_dict: of the model.
        path: as in `from_torch_model`.
        eps: of all its batch norms, as a state_dict does not hold it.

    Returns:
        Pairs for `jbn.fold.fold_variables`, with the variables that `from_torch_model` makes.
    """
    layers, pairs = _of(state_dict), []
    prefixes = list(layers)
    for layer, norm in itertools.pairwise(prefixes):
        (kind, tensors), (norm_kind, norm_tensors) = layers[layer], layers[norm]
        (parent, _, name), (norm_parent, _, norm_name) = layer.rpartition("."), norm.rpartition(".")
        fits = kind == "convolution" and norm_kind == "batch norm" and parent == norm_parent
        if not fits or not _follows(name, norm_name):
            continue
        if tensors["weight"].shape[:1] == norm_tensors["running_mean"].shape:
            pairs.append(Pair(path(layer), path(norm), -1, eps))
    return tuple(pairs)


def _follows(name, norm_name):
    numbers = [int(n or 0) for n in (re.sub(r"\D", "", name), re.sub(r"\D", "", norm_name))]
    shapes = tuple(re.sub(r"\d+", "#", n) for n in (name, norm_name))
    return any(
        shapes == (first, second) and (step is None or numbers[1] - numbers[0] == step)
        for first, second, step in _FOLLOWS
    )


def _of_model(model):
    """Prefix -> (kind, arrays by name), in the order of the modules of a torch model."""
    layers = {}
    for prefix, module in model.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        own |= {name for name, _ in module.named_buffers(recurse=False)}
        kind = kinds.torch_kind(module)
        if not own and kind is None:
            continue
        state = {n: v for n, v in module.state_dict().items() if n in own}
        if kind == "batch norm" and "running_mean" not in own:
            from_torch(module)  # raises
        if kind is None and state:
            raise TypeError(
                f"{prefix!r} is a {type(module).__module__}.{type(module).__name__} that holds "
                f"{sorted(state)}, expected a convolution, a dense layer, an embedding or a norm: "
                "convert it yourself"
            )
        if kind == "transposed convolution" and module.groups != 1:
            raise ValueError(
                f"{prefix!r} has groups={module.groups}, expected 1: Flax's ConvTranspose has none"
            )
        if state:
            layers[prefix] = kind, {name: to_array(value) for name, value in state.items()}
    return layers


def _of(state_dict):
    """As `_of_model`, with the kinds told by the names and ranks in a state_dict."""
    validate.mapping(state_dict, "state_dict", "that of a torch model, or the model itself")
    layers: dict[str, Any] = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        layers.setdefault(prefix, {})[name] = to_array(value)
    return {prefix: (_kind(prefix, tensors), tensors) for prefix, tensors in layers.items()}


def _kind(prefix, tensors):
    names = set(tensors)
    if "running_mean" in names:
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
        "other norms convert too"
    )


def _converted(prefix, kind, tensors):
    """The variables of one module that is no dense layer, by collection."""
    if kind == "batch norm":
        named = {f"{prefix}.{name}": value for name, value in tensors.items()}
        return to_linen(*from_torch(named, f"{prefix}."))
    if kind == "embedding":
        return {"params": {"embedding": tensors["weight"]}}
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if "convolution" not in kind:
        return {"params": {"scale": tensors["weight"], **bias}}
    made = tensors["weight"].shape[0 if kind == "convolution" else 1]
    _check_bias(prefix, bias, made)
    return {"params": {"kernel": jnp.moveaxis(tensors["weight"], (0, 1), (-1, -2)), **bias}}


def _dense(prefix, tensors, shape):
    kernel = tensors["weight"].T
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    _check_bias(prefix, bias, kernel.shape[1])
    if shape is not None:
        kernel = jnp.moveaxis(kernel.reshape(*shape, -1), 0, -2).reshape(kernel.shape)
    return {"params": {"kernel": kernel, **bias}}


def _check_bias(prefix, bias, made):
    if bias and bias["bias"].shape != (made,):
        raise ValueError(
            f"{prefix!r} has a bias of shape {bias['bias'].shape}, expected ({made},): one value "
            "for each feature that its weight makes"
        )


def _flattened(prefix, read, channels, flattened):
    """The shape (channels, ...) of the image that a dense layer reads flattened, or None."""
    if prefix in flattened:
        shape = flattened[prefix]
        if shape is not None and math.prod(shape) != read:
            raise ValueError(
                f"flattened[{prefix!r}] is {shape}, {math.prod(shape)} values, expected the {read} "
                "that the dense layer reads"
            )
        return shape
    if channels and read > channels and read % channels == 0:
        raise ValueError(
            f"{prefix!r} reads {read} features, the layer before makes {channels} channels: "
            f"if a Flatten stands between, pass its shape, flattened={{{prefix!r}: ({channels}, "
            f"height, width)}}, and if not, flattened={{{prefix!r}: None}}"
        )
    return None
