"""Folding: a batch norm in inference mode becomes part of the linear layer before or after it."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jax import Array, lax
from jax.core import Tracer

from jbn.core import flax_common, validate
from jbn.fold.pairs import Pair, is_inside, is_linen
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


def fold_variables(variables: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Fold every batch norm of a model into the layer before it.

    Args:
        variables: linen's {"params": ..., "batch_stats": ...}, or the pure dict of an nnx model.
        pairs: which norms, and into what; `find_pairs` finds them.

    Returns:
        Variables without these norms, in which each layer has a bias: for the same model built with
        `FoldedNorm` and use_bias=True. Everything else is untouched.

    Raises:
        ValueError: a path that is not there or holds something else, a layer or norm named twice, a
            layer inside its norm, or shapes that do not fit.
        TypeError: pairs that are no `Pair`, variables that are no mapping, or boxed arrays
            (`flax.linen.unbox` takes them out).

    Certify the result: `certify(before, after, inputs)`.
    """
    validate.mapping(variables, "variables", "linen's variables or the pure dict of an nnx model")
    pairs = _pairs(pairs)
    if not is_linen(variables):
        return _folded(dict(variables), dict(variables), pairs)[0]
    learned, remembered = _folded(variables["params"], variables["batch_stats"], pairs)
    folded = {**variables, "params": learned, "batch_stats": remembered}
    return {name: tree for name, tree in folded.items() if tree or name != "batch_stats"}


def _folded(learned, remembered, pairs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees with each pair folded; they may be the same."""
    for pair in pairs:
        norm, moments, layer = (
            _at(learned, pair.norm, {}),
            _at(remembered, pair.norm),
            _at(learned, pair.layer),
        )
        _expect(pair.norm, moments, ("mean", "var"), "a batch norm")
        _expect(pair.layer, layer, ("kernel",), "a convolution or dense layer")
        params = Params(norm.get("scale"), norm.get("bias"))
        state = State(moments["mean"], moments["var"], jnp.zeros((), jnp.int32))
        kernel, bias = fold_previous(
            layer["kernel"], layer.get("bias"), params, state, out_axis=pair.out_axis, eps=pair.eps
        )
        learned = _with(learned, pair.layer, {**layer, "kernel": kernel, "bias": bias})
        learned, remembered = _with(learned, pair.norm, None), _with(remembered, pair.norm, None)
    return learned, remembered


def _pairs(pairs) -> tuple[Pair, ...]:
    single = isinstance(pairs, Pair | str) or not isinstance(pairs, Iterable)
    listed: tuple[Any, ...] = (pairs,) if single else tuple(pairs)
    for pair in listed:
        if single or not isinstance(pair, Pair):
            raise TypeError(
                f"pairs holds a {type(pair).__name__} ({pair!r:.60}), expected a list of "
                "jbn.fold.Pair, such as find_pairs returns"
            )
        for path in (pair.layer, pair.norm):
            if not isinstance(path, tuple):
                raise TypeError(
                    f"a pair names {path!r:.60}, expected a tuple of keys, such as "
                    '("Block_0", "Conv_0")'
                )
        if is_inside(pair.layer, pair.norm):
            raise ValueError(
                f"layer {_text(pair.layer)} lies in norm {_text(pair.norm)}, expected one "
                "outside it: the fold removes the norm with all that it holds"
            )
    for named in ("layer", "norm"):
        paths = [getattr(pair, named) for pair in listed]
        if len(set(paths)) < len(paths):
            raise ValueError(f"a {named} occurs in two pairs, expected each once: {paths}")
    return listed


def _expect(path, held, names, what):
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"{_text(path)} holds {sorted(map(str, held))}, expected {' and '.join(names)}: {what}"
        )


class FoldedNorm(nnx.Module):
    """What is left of a jbn BatchNorm once it is folded: the residual and the activation.

    Takes the norm's place in nnx models, as a module like any other, and in linen models.

    Args:
        activation: as of the batch norm; may be a module with parameters. Its other options,
            positional or not, no longer mean anything.
    """

    def __init__(self, *_: Any, activation: Callable[[Array], Array] | None = None, **__: Any):
        self.activation = activation

    def __call__(self, x: Array, *_: Any, residual: Array | None = None, **__: Any) -> Array:
        """activation(x + residual), in the dtype of x."""
        x = x if residual is None else x + residual.astype(x.dtype)
        return x if self.activation is None else self.activation(x)


def fold_nnx(model: nnx.Module, pairs: Sequence[Pair]) -> nnx.Module:
    """A copy of an nnx model in which each norm of the pairs is folded and a `FoldedNorm` stands in
    its place, wherever the model holds it.

    Raises:
        ValueError: as `fold_variables`.
        TypeError: as `fold_variables`, or model is no nnx.Module.
    """
    flax_common.expect_nnx(model, "fold_variables")
    pairs = _pairs(pairs)
    model = nnx.clone(model)
    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    for path in (path for pair in pairs for path in (pair.layer, pair.norm)):
        if path not in modules:
            raise ValueError(f"no module {_text(path)} in the model: {list(modules)}")
    values = nnx.to_pure_dict(nnx.state(model))
    folded, _ = _folded(values, values, pairs)
    for pair in pairs:
        layer, norm, values = modules[pair.layer], modules[pair.norm], _at(folded, pair.layer)
        layer.kernel.set_value(values["kernel"])
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(values["bias"]), True
        else:
            layer.bias.set_value(values["bias"])
        left = FoldedNorm(activation=getattr(norm, "activation", None))
        # The norm itself becomes what is left of it, so that every holder of it has that.
        object.__setattr__(norm, "__class__", FoldedNorm)
        vars(norm).clear()
        vars(norm).update(vars(left))
    return model


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


def _at(tree, path, default=None):
    """The dict of values at a path."""
    for depth, key in enumerate(path):
        if key not in tree:
            if default is not None:
                return default
            raise ValueError(
                f"no {_text(path)} in the variables, only {sorted(map(str, tree))} where {key!r} "
                "was expected"
            )
        tree = tree[key]
        if not isinstance(tree, Mapping):
            raise ValueError(
                f"{_text(path[: depth + 1])} is a {type(tree).__name__}, expected a module's dict "
                f"of arrays, as a pair names {_text(path)}"
            )
    return tree


def _text(path) -> str:
    return "/".join(map(str, path)) or "the model itself"


def _with(tree, path, value) -> Any:
    """A copy of the tree with the subtree at `path` replaced, or removed where the value is None.

    Dicts that this leaves empty are removed too.
    """
    if not path:
        return value
    key, *rest = path
    below = _with(tree.get(key, {}), rest, value)
    return {**{k: v for k, v in tree.items() if k != key}, **({key: below} if below else {})}
