"""Folding: a batch norm in inference mode becomes part of the linear layer before or after it."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import Array, lax
from jax.core import Tracer

from jbn.core import validate
from jbn.kernels.seam import accumulator
from jbn.types import Params, State

# A convolution that pads with these reads values that the norm made, wherever it reads.
_WRAPPING = ("CIRCULAR", "REFLECT")
_ZEROS = ("SAME", "SAME_LOWER", "CAUSAL")


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

        gain = scale / sqrt(var + eps)
        kernel *= gain
        bias = (bias - mean) * gain + bias of the norm

    Exact for dense layers and for convolutions of any padding, stride, dilation and number of
    groups, transposed or not.

    Args:
        kernel: floating or complex, any rank.
        bias: the shape of the features, or None.
        params, state: of the batch norm.
        out_axis: where the kernel holds the features: -1 for dense and HWIO, -2 for flax's
            ConvTranspose with transpose_kernel, `kernel_axes(dimension_numbers)[1]` in general;
            several for DenseGeneral.
        eps: of the batch norm, >= 0.

    Returns:
        (kernel, bias) in the kernel's dtype; there always is a bias.

    Raises:
        ValueError: the kernel does not make these features, the bias or the params do not have
            their shape, an axis out of range, eps < 0, or a variance that is negative or NaN.
        TypeError: an array that is not floating, or no Params and State.
    """
    _check(kernel, bias, params, state, eps)
    axes = validate.axis(out_axis, kernel.ndim)
    features = tuple(kernel.shape[a] for a in axes)
    if features != state.mean.shape:
        raise ValueError(
            f"kernel {kernel.shape} makes features {features} along {axes=}, expected those of the "
            f"batch norm, {state.mean.shape}"
        )
    if bias is not None and bias.shape != features:
        raise ValueError(
            f"bias has shape {bias.shape}, expected {features}: the features that the kernel makes"
        )
    with jax.numpy_dtype_promotion("standard"):  # to the widest, and back at the end
        gain, added = _affine(params, state, eps)
        added = added if bias is None else bias * gain + added
        gain = jnp.expand_dims(gain, tuple(a for a in range(kernel.ndim) if a not in axes))
        return _cast(kernel * gain, kernel), _cast(added, kernel)


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
    strides: int | Sequence[int] = 1,
    input_dilation: int | Sequence[int] = 1,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Fold a batch norm into the linear layer after it; nothing, not even an activation, may stand
    between.

        kernel *= gain
        bias += sum over window and input features of kernel * (bias of the norm - mean * gain)

    That is exact where every position of the output reads a whole window of what the norm made:
    no zeros that are added *after* the norm, which no bias can imitate, neither around its output
    (padding) nor between its values (input_dilation, the strides of a transposed convolution).

    Args:
        params, state: of the batch norm, features of rank 1.
        kernel, bias: of the layer after it.
        padding: of that layer, in any form that Flax takes. "VALID", zeros and negative numbers
            (which crop) are exact, "CIRCULAR" and "REFLECT" too, and "SAME" where the window has
            size 1; a dense layer has "VALID".
        in_axis, out_axis: where the kernel holds the features it reads and makes
            (`kernel_axes(dimension_numbers)`).
        groups: feature_group_count.
        eps: of the batch norm, >= 0.
        strides: of the layer; any, unless it is transposed.
        input_dilation: of the layer.
        transposed: whether the layer is a transposed convolution.

    Returns:
        (kernel, bias) in the kernel's dtype.

    Raises:
        ValueError: the layer reads zeros that the norm did not make, the kernel does not read these
            features, in_axis or out_axis names several axes, or what `fold_previous` raises.
        TypeError: as `fold_previous`, or a padding of another kind.
    """
    _check(kernel, bias, params, state, eps)
    read_axis = _one_axis(in_axis, "in_axis", kernel)
    made_axis = _one_axis(out_axis, "out_axis", kernel)
    if read_axis == made_axis:
        raise ValueError(f"{in_axis=} and {out_axis=} are the same axis of kernel {kernel.shape}")
    moved = jnp.moveaxis(kernel, (read_axis, made_axis), (-2, -1))  # [..., in / groups, out]
    *window, read, made = moved.shape
    groups = validate.positive(groups, "groups")
    transposed = validate.flag(transposed, "transposed")
    for name, value in (("strides", strides), ("input_dilation", input_dilation)):
        for number in value if isinstance(value, Sequence) else (value,):
            validate.positive(number, name)
    _refuse_zeros(padding, window, strides, input_dilation, transposed)
    if state.mean.shape != (read * groups,) or made % groups:
        raise ValueError(
            f"kernel {kernel.shape} with {groups=} reads {read * groups} features, expected those "
            f"of the batch norm, {state.mean.shape}"
        )
    if bias is not None and bias.shape != (made,):
        raise ValueError(
            f"bias has shape {bias.shape}, expected ({made},): the features that the kernel makes"
        )
    lead = tuple(range(len(window)))
    with jax.numpy_dtype_promotion("standard"):  # to the widest, and back at the end
        gain, shift = (  # [..., in / groups, groups, 1]
            jnp.expand_dims(v.reshape(groups, read).T[:, :, None], lead)
            for v in _affine(params, state, eps)
        )
        grouped = moved.reshape(*window, read, groups, made // groups)
        added = (grouped * shift).sum((*lead, -3)).reshape(made)
        scaled = jnp.moveaxis(
            (grouped * gain).reshape(moved.shape), (-2, -1), (read_axis, made_axis)
        )
        added = added if bias is None else bias + added
        return _cast(scaled, kernel), _cast(added, kernel)


def kernel_axes(
    dimension_numbers: Any, ndim: int, *, transpose_kernel: bool = False
) -> tuple[int, int]:
    """(axis the kernel reads, axis it makes features along).

    Args:
        dimension_numbers: as in `lax.conv_general_dilated`: ("NHWC", "HWIO", "NHWC"),
            ConvDimensionNumbers, or None.
        ndim: rank of the input.
        transpose_kernel: as in `lax.conv_transpose`.

    Raises:
        TypeError, ValueError: no such dimension numbers, or a rank below 2.
    """
    if validate.positive(ndim, "ndim") < 2:
        raise ValueError(f"ndim is {ndim}, expected at least 2: a batch axis and features")
    if isinstance(dimension_numbers, str):
        raise TypeError(
            f"dimension_numbers is {dimension_numbers!r}, expected three layouts, such as "
            '("NHWC", "HWIO", "NHWC"), or None'
        )
    shape = (1,) * ndim
    out, read, *_ = lax.conv_dimension_numbers(shape, shape, dimension_numbers).rhs_spec
    return (out, read) if transpose_kernel else (read, out)


def _one_axis(axis, name, kernel) -> int:
    one, *others = validate.axis(axis, kernel.ndim)
    if others:
        raise ValueError(
            f"{name} is {axis}, expected one axis of kernel {kernel.shape}: reshape a kernel of "
            "several so that it has one"
        )
    return one


def _check(kernel, bias, params, state, eps):
    """What both directions ask of their arguments."""
    for value, expected in ((params, Params), (state, State)):
        if not isinstance(value, expected):
            raise TypeError(
                f"got a {type(value).__name__} ({value!r:.60}), expected a jbn.{expected.__name__} "
                "of the batch norm"
            )
    named: dict[str, Any] = {"kernel": kernel, "bias": bias, "mean": state.mean, "var": state.var}
    named |= {f"params.{name}": value for name, value in params._asdict().items()}
    for name, array in named.items():
        if name in ("bias", "params.scale", "params.bias") and array is None:
            continue
        if not hasattr(array, "shape") or not jnp.issubdtype(array.dtype, jnp.inexact):
            kind = getattr(array, "dtype", type(array).__name__)
            boxed = isinstance(array, meta.AxisMetadata)
            mend = ": unbox the variables, flax.linen.unbox(variables)" if boxed else ""
            raise TypeError(f"{name} is of {kind}, expected a floating or complex array{mend}")
        if name not in ("kernel", "bias") and array.shape != state.mean.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, expected that of mean, {state.mean.shape}"
            )
    number = validate.scalar(eps, "eps")
    if number is not None and not 0 <= number < np.inf:
        raise ValueError(f"eps is {eps}, expected a finite number >= 0: the batch norm's epsilon")
    _check_values("mean", state.mean, np.isfinite, "finite numbers")
    allowed = lambda var: np.isfinite(var) & (var.real >= 0) & ((number != 0) | (var.real > 0))
    expected = "finite numbers, not negative" + (", and not 0, as eps is 0" if number == 0 else "")
    _check_values("var", state.var, allowed, expected)


def _check_values(name, array, good, expected):
    if isinstance(array, Tracer):
        return
    values = np.asarray(array).ravel()
    wrong = np.flatnonzero(~good(values))
    if wrong.size:
        raise ValueError(
            f"{name} is {values[wrong[0]]} for feature {wrong[0]} ({wrong.size} such features), "
            f"expected {expected}: look at the model with jbn.health"
        )


def _refuse_zeros(padding, window, strides, input_dilation, transposed):
    """Raise where the layer reads zeros that stand outside or between the values of the norm."""
    many = lambda value: any(n != 1 for n in np.ravel(value))
    if many(input_dilation):
        raise ValueError(
            f"input_dilation is {input_dilation}, expected 1: the zeros it puts between the values "
            "of the batch norm cannot be folded"
        )
    if transposed and (many(strides) or many(window)):
        raise ValueError(
            f"a transposed convolution of window {tuple(window)} and strides {strides} reads zeros "
            "around and between the values of the batch norm, expected 1 for both: fold the norm "
            "into the layer before it, or leave it"
        )
    if _pads(padding) and many(window):
        raise ValueError(
            f"padding is {padding!r}, expected 'VALID': zeros added after the batch norm cannot be "
            "folded"
        )
    if _pads(padding) and not isinstance(padding, str):
        raise ValueError(
            f"padding is {padding!r}, expected no positive number: zeros added after the batch "
            "norm cannot be folded"
        )


def _pads(padding) -> bool:
    """Whether a convolution with this padding may add zeros."""
    if isinstance(padding, str):
        name = padding.upper()
        if name not in ("VALID", *_WRAPPING, *_ZEROS):
            raise ValueError(
                f"padding is {padding!r}, expected one of VALID, {', '.join(_WRAPPING + _ZEROS)}, "
                "or numbers"
            )
        return name in _ZEROS
    if isinstance(padding, Sequence) or np.ndim(padding):
        return any(_pads(part) for part in padding)
    if hasattr(padding, "__index__"):
        return operator.index(padding) > 0
    raise TypeError(
        f"padding is {padding!r}, expected a string, an int, or a sequence of ints or of pairs"
    )


def _affine(params, state, eps):
    """y = x * gain + shift, in the accumulator's dtype."""
    acc = accumulator(state.var.real.dtype)
    gain = lax.rsqrt(state.var.real.astype(acc) + jnp.asarray(eps, acc))
    gain = gain if params.scale is None else gain * params.scale
    shift = -state.mean * gain
    return gain, shift if params.bias is None else params.bias + shift


def _cast(value, kernel):
    """In the kernel's dtype, unless that would lose an imaginary part."""
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(kernel):
        raise TypeError(
            f"kernel has dtype {kernel.dtype}, expected a complex one: the batch norm is complex"
        )
    return value.astype(kernel.dtype)
