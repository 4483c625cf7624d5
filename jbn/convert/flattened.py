"""Layers of a torch model that read or make an image flattened, or whole.

Torch has the channels of an image first, linen last, so their values change places.
"""

import math

import jax.numpy as jnp

from jbn.core import validate


def checked(flattened, layers):
    """The argument `flattened` of `from_torch_model`, its shapes as tuples of ints."""
    if flattened is None:
        return {}
    validate.mapping(flattened, "flattened", "a dict from a layer's prefix to a shape")
    known = [p for p, layer in layers.items() if may_read(layer) or "convolution" in layer.kind]
    if unknown := [prefix for prefix in flattened if prefix not in known]:
        raise ValueError(
            f"flattened names {unknown}, expected dense layers, norms and convolutions: {known}"
        )
    return {p: None if s is None else _checked_shape(p, s) for p, s in flattened.items()}


def _checked_shape(prefix, shape):
    what = f"flattened[{prefix!r}] is {shape!r:.60}, expected the shape (channels, height, width)"
    try:
        sizes = tuple(map(validate.index, shape))
    except TypeError:
        raise TypeError(f"{what}, a tuple of ints, or None") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{what}, of sizes of at least 1")
    return sizes


def may_read(layer):
    """Whether a layer of this kind can stand behind a Flatten."""
    return "norm" in layer.kind or layer.kind == "dense layer"


def features(layer):
    """The shape of what a norm or a dense layer reads."""
    if layer.kind == "dense layer":
        return layer.tensors["weight"].shape[1:]
    return layer.tensors["running_mean" if layer.kind == "batch norm" else "weight"].shape


def reads_image(layer, after):
    """Whether a layer is known to read an image that is not flattened; `after` follows it."""
    if layer.of_images or layer.kind == "dense layer" or after is None:
        return layer.of_images
    # A densenet's norm reads the channels of many convolutions, and a convolution reads them all.
    return "convolution" in after.kind and _channels_read(after) == features(layer)[0]


def _channels_read(layer):
    """The channels of the image that a convolution (in one group) or a norm reads."""
    if "convolution" not in layer.kind:
        return features(layer)[0]
    return layer.tensors["weight"].shape[1 if layer.kind == "convolution" else 0]


def channels_of(layer, shape, before):
    """The channels of the image that a layer makes, or None; those `before` if it may keep them."""
    if layer.kind == "dense layer":
        return None
    if "convolution" in layer.kind:
        return layer.tensors["weight"].shape[0 if layer.kind == "convolution" else 1]
    if layer.kind == "embedding":
        return before
    read = shape or features(layer)
    # A norm that is no batch norm may be over another axis than that of the channels.
    other = layer.kind != "batch norm" and (before is None or read[0] % before > 0)
    return before if other else read[0]


_BY_MODEL = "; the model itself, in place of its state_dict, tells what a BatchNorm2d reads"


def shape_read(prefix, layer, channels, flattened):
    """The shape (channels, ...) of the image that a layer reads flattened or whole, or None."""
    whole = features(layer)
    read = math.prod(whole)
    if prefix in flattened:
        shape = flattened[prefix]
        if shape is not None and (math.prod(shape) != read or whole not in (shape, (read,))):
            raise ValueError(
                f"flattened[{prefix!r}] is {shape}, {math.prod(shape)} values, expected the {read} "
                f"that the {layer.kind} reads, of shape {whole}"
            )
        if shape is not None and layer.kind == "group norm":
            raise ValueError(
                f"flattened names the group norm {prefix!r}, whose groups would be others in "
                "linen, where the channels stand last"
            )
        return shape
    mend = f"flattened={{{prefix!r}: %s}}, and if not, flattened={{{prefix!r}: None}}"
    if len(whole) > 1:
        raise ValueError(
            f"{prefix!r} is a {layer.kind} over {whole}: if the channels stand first in it, "
            f"pass its shape, {mend % (whole,)}"
        )
    if channels and read > channels and read % channels == 0:
        raise ValueError(
            f"{prefix!r} reads {read} features, the layer before makes {channels} channels: "
            f"if a Flatten stands between, pass its shape, {mend % f'({channels}, height, width)'}"
            f"{_BY_MODEL if layer.kind == 'batch norm' and layer.eps is None else ''}"
        )
    return None


def made_flat(layers, flattened):
    """The images that dense layers make flat, and that an Unflatten gives to the next layer.

    Returns:
        (the shape of each, by the prefix of the dense layer and of the norms behind it; the entries
        of `flattened` that name other layers than those that read such images)
    """
    made, rest = {}, dict(flattened)
    makers, size = [], None  # the last dense layer with the norms behind it; its features
    channels = None  # of the image before it
    for prefix, layer in layers.items():
        is_convolution = "convolution" in layer.kind
        if layer.kind == "dense layer":
            makers, size = [prefix], layer.tensors["weight"].shape[0]
        elif makers and "norm" in layer.kind and features(layer) == (size,):
            makers.append(prefix)
        elif is_convolution or layer.kind == "batch norm":
            # A norm of more features than the dense layer makes reads something else.
            if makers and (is_convolution or _channels_read(layer) < size):
                shape = _shape_made(prefix, layer, size, channels, rest)
                made |= {} if shape is None else dict.fromkeys(makers, shape)
                rest.pop(prefix, None)
            elif is_convolution and prefix in rest:
                raise ValueError(
                    f"flattened names {[prefix]}, a {layer.kind}, expected a dense layer before it "
                    "that makes the image it reads"
                )
            makers, channels = [], channels_of(layer, None, channels)
        else:
            makers = []
    return made, rest


def _shape_made(prefix, layer, size, channels, flattened):
    """The shape of the image that this layer reads, if a dense layer has made it flat, or None.

    size: the features of the dense layer. channels: of the image before it.
    """
    read = _channels_read(layer)
    if prefix in flattened:
        shape = flattened[prefix]
        if shape is not None and (math.prod(shape) != size or shape[0] % read):
            raise ValueError(
                f"flattened[{prefix!r}] is {shape}, expected the {size} values that the dense "
                f"layer before makes, as an image of channels that the {layer.kind} reads, {read}"
            )
        return shape
    if layer.unflattened is not None and math.prod(layer.unflattened) == size:
        return layer.unflattened
    # A gate, as of squeeze-and-excitation, makes as many features as the image has channels. A
    # plain convolution often stands behind a dense layer that it does not read.
    if layer.kind == "convolution" or size in (channels, read) or size % read:
        return None
    raise ValueError(
        f"{prefix!r} reads {read} channels, the dense layer before makes {size} features: if an "
        f"Unflatten stands between, pass the shape it gives, flattened={{{prefix!r}: ({read}, "
        f"height, width)}}, and if not, flattened={{{prefix!r}: None}}"
    )


def channels_last(vector, shape):
    """The values of an image (channels, ...) in linen's order, flat if they came flat."""
    moved = jnp.moveaxis(vector.reshape(shape), 0, -1)
    return moved if vector.ndim > 1 else moved.reshape(-1)
