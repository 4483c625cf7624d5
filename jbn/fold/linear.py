"""Folding: a batch norm in inference mode becomes part of the linear layer before or after it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jbn.fold.pairs import Pair
from jbn.kernels.seam import accumulator
from jbn.types import Params, State


def fold_previous(
    kernel: Array,
    bias: Array | None,
    params: Params,
    state: State,
    *,
    out_axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Fold a batch norm into the linear layer before it.

        gain = scale / sqrt(var + eps)        kernel *= gain        bias = (bias - mean) * gain + bias of the norm

    Exact for dense layers and for convolutions of any padding, stride, dilation and number of
    groups, transposed or not.

    Args:
        kernel: any rank.
        bias: the shape of the features, or None.
        params, state: of the batch norm.
        out_axis: where the kernel holds the features: -1 for dense and HWIO, -2 for flax's
            ConvTranspose with transpose_kernel, `kernel_axes(dimension_numbers)[1]` in general;
            several for DenseGeneral.
        eps: of the batch norm.

    Returns:
        (kernel, bias) in the kernel's dtype; there always is a bias.

    Raises:
        ValueError: the kernel does not make these features.
    """
    axes = tuple(
        sorted(a % kernel.ndim for a in ((out_axis,) if isinstance(out_axis, int) else out_axis))
    )
    features = tuple(kernel.shape[a] for a in axes)
    if features != state.mean.shape:
        raise ValueError(
            f"kernel {kernel.shape} makes features {features} along {axes=}, the batch norm has {state.mean.shape}"
        )
    gain, shift = _affine(params, state, eps)
    shift = shift if bias is None else bias.astype(gain.dtype) * gain + shift
    wide = jnp.expand_dims(gain, tuple(a for a in range(kernel.ndim) if a not in axes))
    return (kernel.astype(gain.dtype) * wide).astype(kernel.dtype), shift.astype(kernel.dtype)


def fold_next(
    params: Params,
    state: State,
    kernel: Array,
    bias: Array | None,
    *,
    padding: Any,
    in_axis: int = -2,
    out_axis: int = -1,
    groups: int = 1,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Fold a batch norm into the linear layer after it; nothing, not even an activation, may stand
    between.

    Where the convolution pads, it pads with zeros *after* the norm, which no bias can imitate: only
    "VALID" is exact.

    Args:
        params, state: of the batch norm, features of rank 1.
        kernel, bias: of the layer after it.
        padding: of that layer: "VALID", or pairs of zeros; a dense layer has "VALID".
        in_axis, out_axis: where the kernel holds the features it reads and makes
            (`kernel_axes(dimension_numbers)`).
        groups: feature_group_count.
        eps: of the batch norm.

    Returns:
        (kernel, bias) in the kernel's dtype.

    Raises:
        ValueError: the layer pads, or the kernel does not read these features.
    """
    if not (
        padding == "VALID"
        or (not isinstance(padding, str) and not any(sum(pair) for pair in padding))
    ):
        raise ValueError(
            f"padding is {padding!r}, expected 'VALID': zeros added after the batch norm cannot be folded"
        )
    moved = jnp.moveaxis(kernel, (in_axis, out_axis), (-2, -1))  # [..., in / groups, out]
    *window, read, made = moved.shape
    if state.mean.shape != (read * groups,) or made % groups:
        raise ValueError(
            f"kernel {kernel.shape} with {groups=} reads {read * groups} features, the batch norm has {state.mean.shape}"
        )
    gain, shift = (
        v.reshape(groups, read).T[:, :, None] for v in _affine(params, state, eps)
    )  # [in / groups, groups, 1]
    grouped = moved.astype(gain.dtype).reshape(*window, read, groups, made // groups)
    lead = tuple(range(len(window)))
    added = (grouped * jnp.expand_dims(shift, lead)).sum((*lead, -3)).reshape(made)
    scaled = (grouped * jnp.expand_dims(gain, lead)).reshape(moved.shape)
    added = added if bias is None else bias.astype(gain.dtype) + added
    return jnp.moveaxis(scaled, (-2, -1), (in_axis, out_axis)).astype(kernel.dtype), added.astype(
        kernel.dtype
    )


def kernel_axes(
    dimension_numbers: Any, ndim: int, *, transpose_kernel: bool = False
) -> tuple[int, int]:
    """(axis the kernel reads, axis it makes features along).

    Args:
        dimension_numbers: as in `lax.conv_general_dilated`: ("NHWC", "HWIO", "NHWC"),
            ConvDimensionNumbers, or None.
        ndim: rank of the input.
        transpose_kernel: as in `lax.conv_transpose`.
    """
    shape = (1,) * ndim
    out, read, *_ = lax.conv_dimension_numbers(shape, shape, dimension_numbers).rhs_spec
    return (out, read) if transpose_kernel else (read, out)


def fold_variables(variables: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Fold every batch norm of a model into the layer before it.

    Args:
        variables: linen's {"params": ..., "batch_stats": ...}, or the pure dict of an nnx model.
        pairs: which norms, and into what; `find_pairs` finds them.

    Returns:
        Variables without these norms, in which each layer has a bias: for the same model built with
        `FoldedNorm` and use_bias=True. Everything else is untouched.

    Raises:
        ValueError: a path that is not there, a layer or norm named twice, or shapes that do not
            fit.

    Certify the result: `certify(before, after, inputs)`.
    """
    for named in ("layer", "norm"):
        paths = [getattr(pair, named) for pair in pairs]
        if len(set(paths)) < len(paths):
            raise ValueError(f"a {named} occurs in two pairs, expected each once: {paths}")
    linen = "batch_stats" in variables
    learned = dict(variables["params"] if linen else variables)
    remembered = dict(variables["batch_stats"] if linen else variables)
    for pair in pairs:
        norm, moments, layer = (
            _at(learned, pair.norm, {}),
            _at(remembered, pair.norm),
            _at(learned, pair.layer),
        )
        params = Params(norm.get("scale"), norm.get("bias"))
        state = State(moments["mean"], moments["var"], jnp.zeros((), jnp.int32))
        kernel, bias = fold_previous(
            layer["kernel"], layer.get("bias"), params, state, out_axis=pair.out_axis, eps=pair.eps
        )
        learned = _with(learned, pair.layer, {**layer, "kernel": kernel, "bias": bias})
        learned, remembered = _with(learned, pair.norm, None), _with(remembered, pair.norm, None)
    if not linen:
        return learned
    folded = {**variables, "params": learned, "batch_stats": remembered}
    return {name: tree for name, tree in folded.items() if tree or name != "batch_stats"}


class FoldedNorm:
    """What is left of a jbn BatchNorm once it is folded: the residual and the activation. Takes its
    place in linen and nnx.

    Args:
        activation: as of the batch norm. Its other options, positional or not, no longer mean
            anything.
    """

    def __init__(self, *_, activation: Callable[[Array], Array] | None = None, **__):
        self.activation = activation

    def __call__(self, x: Array, *_, residual: Array | None = None, **__) -> Array:
        """activation(x + residual)."""
        x = x if residual is None else x + residual.astype(x.dtype)
        return x if self.activation is None else self.activation(x)


def fold_nnx(model: nnx.Module, pairs: Sequence[Pair]) -> nnx.Module:
    """A copy of an nnx model in which each norm of the pairs is folded and a `FoldedNorm` stands in
    its place.

    Raises:
        ValueError: as `fold_variables`.
    """
    model = nnx.clone(model)
    folded = fold_variables(nnx.to_pure_dict(nnx.state(model)), pairs)
    for pair in pairs:
        layer, values = _child(model, pair.layer), _at(folded, pair.layer)
        layer.kernel[...] = values["kernel"]
        layer.bias, layer.use_bias = nnx.Param(values["bias"]), True
        parent, norm, key = _child(model, pair.norm[:-1]), _child(model, pair.norm), pair.norm[-1]
        left = FoldedNorm(activation=getattr(norm, "activation", None))
        if isinstance(key, int):
            parent[key] = left
        else:
            setattr(parent, str(key), left)
    return model


def _child(module: Any, path) -> Any:
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    return module


def _affine(params, state, eps):
    """y = x * gain + shift, in the accumulator's dtype."""
    acc = accumulator(state.mean.dtype)
    gain = lax.rsqrt(state.var.astype(acc) + eps)
    gain = gain if params.scale is None else gain * params.scale.astype(acc)
    shift = -state.mean.astype(acc) * gain
    return gain, shift if params.bias is None else params.bias.astype(acc) + shift


def _at(tree, path, default=None):
    for key in path:
        if key not in tree:
            if default is not None:
                return default
            raise ValueError(
                f"no {'/'.join(path)} in the variables, only {sorted(map(str, tree))} beside {key!r}"
            )
        tree = tree[key]
    return tree


def _with(tree, path, value):
    """A copy of the tree with the subtree at `path` replaced, or removed for None, with the dicts that leaves empty."""
    key, *rest = path
    below = _with(tree.get(key, {}), rest, value) if rest else value
    return {**{k: v for k, v in tree.items() if k != key}, **({key: below} if below else {})}
