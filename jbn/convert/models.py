"""Whole models of torch: the variables of a linen model, and which of the norms can be folded."""

import itertools
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jbn.convert import flattened as flat
from jbn.convert import torch_layers
from jbn.convert.layers import from_torch, to_linen
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
_OF_PATH = "from a torch prefix to a linen path"


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
            a transposed convolution looks like a convolution (and has the kernel given above), a
            matrix without bias may be a dense layer or an embedding, which is an error.
        path: linen path of a torch module from its prefix, such as "layer1.0.conv1".
        flattened: the shape (channels, height, width) that a layer reads flattened, or whole, by
            the prefix of each such layer: a dense layer or a norm behind a Flatten, or a norm over
            several axes. Torch has the channels first, linen last, so the rows of the kernel, or
            the values of scale, bias, mean and var, change places. None for a layer that reads no
            such thing. Likewise by the prefix of a convolution (or BatchNorm2d) behind a reshape
            of what a dense layer makes: the columns of that layer's kernel change places. A
            torch.nn.Unflatten of the model is seen, and a transposed convolution that may stand
            behind such a reshape is an error; name a plain convolution yourself.

    Returns:
        {"params": ..., "batch_stats": ...}, nested by `path`.

    Raises:
        ValueError: a module that is none of these, two modules with one path, sizes that do not fit
            each other, or a layer that seems to read or make a flattened image, which `flattened`
            settles.
        TypeError: a layer of the model that is none of these.
    """
    validate.function(path, "path", _OF_PATH)
    layers = torch_layers.read(state_dict)
    paths = {prefix: _checked_path(path, prefix) for prefix in layers}
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"two modules have one path, expected each its own: {paths}")
    made, flattened = flat.made_flat(layers, flat.checked(flattened, layers))
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    channels = None  # of the image that the next layer may read flattened
    concatenates = False  # whether some norm has read the channels of several convolutions
    following = [*layers.values(), None][1:]
    for (prefix, layer), after in zip(layers.items(), following, strict=True):
        shape = None
        if flat.may_read(layer):
            image = flat.reads_image(layer, after) or (concatenates and layer.kind == "batch norm")
            concatenates |= image and channels not in (None, *flat.features(layer))
            shape = flat.shape_read(prefix, layer, None if image else channels, flattened)
        for collection, values in _converted(prefix, layer, shape, made.get(prefix)).items():
            _put(variables[collection], paths[prefix], values)
        channels = flat.channels_of(layer, shape, channels)
    return variables


def torch_pairs(
    state_dict: Any, path: Callable[[str], Path] = resnet_path, *, eps: float | None = None
) -> tuple[Pair, ...]:
    """The batch norms of a torch model that can be folded, by the names of its layers.

    For torchvision's resnets, regnets, densenets, mobilenets and efficientnets, and timm's where
    the modules have the same names: a norm is paired with the convolution that is registered right
    before it in the same module, under a name that these models give to such a pair. Other models
    may use these names for something else: certify the result, or use `jbn.fold.find_pairs`.

    Args:
        state_dict: of the model, or the model itself.
        path: as in `from_torch_model`.
        eps: of all its batch norms. None for that of each norm of the model, and for torch's 1e-5
            with a state_dict, which does not hold it.

    Returns:
        Pairs for `jbn.fold.fold_variables`, with the variables that `from_torch_model` makes.
    """
    validate.function(path, "path", _OF_PATH)
    pairs = []
    for (prefix, layer), (norm_prefix, norm) in itertools.pairwise(
        torch_layers.read(state_dict).items()
    ):
        parent, _, name = prefix.rpartition(".")
        norm_parent, _, norm_name = norm_prefix.rpartition(".")
        fits = layer.kind == "convolution" and norm.kind == "batch norm" and parent == norm_parent
        if not fits or not _follows(name, norm_name):
            continue
        if layer.tensors["weight"].shape[:1] == norm.tensors["running_mean"].shape:
            own = 1e-5 if norm.eps is None else norm.eps
            paths = _checked_path(path, prefix), _checked_path(path, norm_prefix)
            pairs.append(Pair(*paths, -1, own if eps is None else eps))
    return tuple(pairs)


def _follows(name, norm_name):
    numbers = [int(n or 0) for n in (re.sub(r"\D", "", name), re.sub(r"\D", "", norm_name))]
    shapes = tuple(re.sub(r"\d+", "#", n) for n in (name, norm_name))
    return any(
        shapes == (first, second) and (step is None or numbers[1] - numbers[0] == step)
        for first, second, step in _FOLLOWS
    )


def _checked_path(path, prefix):
    found = path(prefix)
    if not isinstance(found, tuple) or not all(isinstance(key, Hashable) for key in found):
        raise TypeError(
            f"path({prefix!r}) is {found!r:.60}, expected a tuple of names, such as "
            '("layer1_0", "conv1")'
        )
    return found


def _put(tree, path, values):
    """Put the arrays of one module into the tree, at its path."""
    for key in path:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"the path {path} leads through {key!r}, an array of another module")
    if taken := sorted(set(tree) & set(values)):
        raise ValueError(f"the path {path} has {taken}, which are another module's there, too")
    tree.update(values)


def _converted(prefix, layer, shape, made):
    """The variables of one module, by collection.

    shape, made: of the image that it reads or makes flat, or None: see `flat`.
    """
    kind, tensors = layer.kind, layer.tensors
    if kind == "dense layer":
        return _dense(prefix, tensors, shape, made)
    shape = shape or made
    if shape is not None:  # a norm
        tensors = {n: flat.channels_last(v, shape) if v.ndim else v for n, v in tensors.items()}
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


def _dense(prefix, tensors, shape, made):
    kernel = tensors["weight"].T
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    _check_bias(prefix, bias, kernel.shape[1])
    if shape is not None:
        kernel = jax.vmap(lambda column: flat.channels_last(column, shape), 1, 1)(kernel)
    if made is not None:
        kernel = jax.vmap(lambda row: flat.channels_last(row, made))(kernel)
        bias = {name: flat.channels_last(value, made) for name, value in bias.items()}
    return {"params": {"kernel": kernel, **bias}}


def _check_bias(prefix, bias, made):
    if bias and bias["bias"].shape != (made,):
        raise ValueError(
            f"{prefix!r} has a bias of shape {bias['bias'].shape}, expected ({made},): one value "
            "for each feature that its weight makes"
        )
