"""Batch norms of other libraries to and from (Params, State), one pair of functions per library.

What differs between them, and is taken care of here (`options` names it per layer):

    library   momentum weighs   stored variance   eps     names of scale, bias, mean, var
    jbn       the old value     biased*           1e-5    scale, bias, mean, var, count
    PyTorch   the new value     n / (n - 1)       1e-5    weight, bias, running_mean, running_var,
                                                          num_batches_tracked
    Flax      the old value     biased            1e-5    scale, bias, mean, var
    Haiku     the old value     biased, debiased  1e-5    scale, offset, mean_ema, var_ema
    Equinox   the old value     biased, debiased  1e-5    weight, bias, batch_state_index
    Keras     the old value     biased            1e-3    gamma, beta, moving_mean, moving_variance
    (* n / (n - 1) with unbiased=True)

Arrays keep their dtype. Where the target holds less than the source (no batch count in Flax and
Keras), its docstring says what is lost. Only the functions that build another library's objects
import that library.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.convert import kinds
from jbn.core import validate
from jbn.types import Params, State

# Of a torch batch norm.
BATCH_NORM_NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_MOST = np.iinfo(np.int32).max
_EXTRA = {"torch": "install torch", "equinox": "pip install 'jbn[peers]'"}


def from_torch(state_dict: Any, prefix: str = "") -> tuple[Params, State]:
    """A torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, or of a subclass.

    Args:
        state_dict: of the layer, or of a model; tensors or arrays. Or the layer itself, which is
            checked to be a batch norm: an InstanceNorm has the same names.
        prefix: what stands before "weight" in its keys, such as "layer1.0.bn1.".

    Returns:
        (params, state), None for the parameters of affine=False.

    Raises:
        ValueError: no running statistics under the prefix, or sizes that differ.
        TypeError: a layer that is no batch norm.
    """
    if hasattr(state_dict, "state_dict"):
        kinds.library(state_dict, "torch")
        state_dict = state_dict.state_dict()
    validate.mapping(state_dict, "state_dict", "that of a torch module, or the module itself")
    found = {
        name: to_array(state_dict[prefix + name])
        for name in BATCH_NORM_NAMES
        if prefix + name in state_dict
    }
    if "running_mean" not in found or "running_var" not in found:
        if found:
            raise ValueError(kinds.untracked(f"{prefix + 'running_mean'!r} is missing: this"))
        raise ValueError(
            f"state_dict has no {prefix}running_mean and running_var, expected those of a batch "
            f"norm; it has {list(state_dict)[:8]}"
        )
    vectors = {name: found.get(name) for name in BATCH_NORM_NAMES[:4]}
    _one_shape(vectors, f"the batch norm {prefix!r}")
    count = found.get("num_batches_tracked", jnp.zeros((), jnp.int32))
    state = State(found["running_mean"], found["running_var"], count.astype(jnp.int32))
    return Params(found.get("weight"), found.get("bias")), state


def _one_shape(vectors, what):
    shapes = {name: value.shape for name, value in vectors.items() if value is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{what} has shapes {shapes}, expected one for all")


def to_torch(params: Params, state: State, prefix: str = "") -> dict[str, Any]:
    """The state_dict of a torch batch norm; nothing is lost.

    Args:
        params, state: features of rank 1.
        prefix: put before each name.

    Returns:
        {prefix + name: tensor}, for load_state_dict.

    Raises:
        ValueError: several feature axes.  ImportError: torch is missing.
    """
    torch = _import("torch")
    _one_axis(params, state, "PyTorch")
    values = (*params, state.mean, state.var)

    def tensor(value):
        if value.dtype == jnp.bfloat16:  # torch reads no NumPy array of that dtype
            return torch.from_numpy(np.array(value, np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(value))

    vectors = zip(BATCH_NORM_NAMES, values, strict=False)
    named = {prefix + name: tensor(value) for name, value in vectors if value is not None}
    return {**named, prefix + "num_batches_tracked": torch.tensor(int(state.count))}


def from_linen(variables: Mapping[str, Any], *, count: int = 0) -> tuple[Params, State]:
    """A flax.linen or jbn.linen BatchNorm.

    Args:
        variables: {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}} of the layer.
        count: batches seen, which Flax does not record.
    """
    if "batch_stats" not in validate.mapping(variables, "variables", "those of one BatchNorm"):
        raise ValueError(
            f"variables hold {sorted(variables)}, expected 'batch_stats' among them: the running "
            "statistics of one BatchNorm"
        )
    return from_nnx({**variables.get("params", {}), **variables["batch_stats"]}, count=count)


def to_linen(params: Params, state: State) -> dict[str, dict[str, Array]]:
    """The variables of a linen BatchNorm; the count is lost."""
    _check(params, state)
    learned = {name: value for name, value in params._asdict().items() if value is not None}
    return {
        **({"params": learned} if learned else {}),
        "batch_stats": {"mean": state.mean, "var": state.var},
    }


def from_nnx(values: Mapping[str, Any], *, count: int = 0) -> tuple[Params, State]:
    """A flax.nnx or jbn.nnx BatchNorm.

    Args:
        values: "scale", "bias", "mean", "var" of the layer: nnx.to_pure_dict(nnx.state(layer)).
        count: batches seen, which Flax does not record.
    """
    expected = "those of one BatchNorm, such as nnx.to_pure_dict(nnx.state(layer))"
    if not {"mean", "var"} <= set(validate.mapping(values, "values", expected)):
        raise ValueError(
            f"the layer holds {sorted(map(str, values))}, expected mean and var (and scale, bias): "
            "those of one BatchNorm"
        )
    array = lambda name: None if values.get(name) is None else to_array(values[name])
    vectors: dict[str, Any] = {name: array(name) for name in ("scale", "bias", "mean", "var")}
    _one_shape(vectors, "the batch norm")
    scale, bias, mean, var = vectors.values()
    return Params(scale, bias), State(mean, var, _batches(count))


def _batches(count):
    validate.scalar(count, "count")
    if count != int(count) or count < 0:
        raise ValueError(f"count is {count}, expected an int of at least 0: the batches seen")
    if count > _MOST:
        raise ValueError(f"count is {count}, expected at most {_MOST}, which int32 holds")
    return jnp.int32(count)


def to_nnx(params: Params, state: State) -> dict[str, Array]:
    """The pure dict of an nnx BatchNorm, for nnx.update(layer, ...); the count is lost."""
    variables = to_linen(params, state)
    return {**variables.get("params", {}), **variables["batch_stats"]}


def from_haiku(
    params: Mapping[str, Any], state: Mapping[str, Any], name: str = "batch_norm"
) -> tuple[Params, State]:
    """A haiku.BatchNorm; the state holds its debiased averages.

    Args:
        params, state: of the transformed function.
        name: of the module in them, such as "resnet/batch_norm_1".
    """
    for what, tree in (("params", params), ("state", state)):
        validate.mapping(tree, what, f"the {what} of a transformed function")
    if f"{name}/~/mean_ema" not in state:
        raise ValueError(f"no {name}/~/mean_ema in the state, expected one of {list(state)}")
    learned = params.get(name, {})
    vector = lambda value: to_array(value).reshape(-1)
    scale, bias = (
        None if learned.get(key) is None else vector(learned[key]) for key in ("scale", "offset")
    )
    mean, var = (state[f"{name}/~/{which}"] for which in ("mean_ema", "var_ema"))
    count = to_array(mean["counter"]).astype(jnp.int32)
    averages = State(vector(mean["average"]), vector(var["average"]), count)
    return Params(scale, bias), averages


def to_haiku(
    params: Params,
    state: State,
    name: str = "batch_norm",
    *,
    ndim: int,
    axis: int = -1,
    momentum: float,
) -> tuple[dict, dict]:
    """(params, state) of a haiku.BatchNorm.

    The averages are kept exactly; "hidden" is made from them and the count, to float32 rounding.

    Args:
        params, state: features of rank 1.
        name: of the module.
        ndim: rank of its input: Haiku's vectors are broadcastable to it.
        axis: its feature axis.
        momentum: its decay_rate.
    """
    _one_axis(params, state, "Haiku")
    validate.update(momentum)
    shape = [1] * ndim
    shape[validate.axis(axis, ndim)[0]] = state.mean.size
    learned = {"scale": params.scale, "offset": params.bias}
    correction = 1 - momentum ** int(state.count)

    def average(value):
        value = value.reshape(shape)
        return {
            "average": value,
            "hidden": value * jnp.asarray(correction, value.dtype),
            "counter": state.count,
        }

    averages = {f"{name}/~/mean_ema": average(state.mean), f"{name}/~/var_ema": average(state.var)}
    return {
        name: {key: value.reshape(shape) for key, value in learned.items() if value is not None}
    }, averages


def from_equinox(layer: Any, state: Any) -> tuple[Params, State]:
    """An equinox.nn.BatchNorm of either mode; the State holds what it normalizes by in inference.

    mode="batch" debiases its averages although its variance starts at 1, so they are off in the
    first hundreds of batches
    (a variance of 1 becomes 100 after one batch); they are taken over as they are.  mode="ema"
    records no count: 1 stands for "some".

    Args:
        layer: the layer.
        state: the equinox.nn.State it belongs to.
    """
    kinds.library(layer, "equinox")
    if not hasattr(state, "get"):
        raise TypeError(
            f"state is a {type(state).__name__} ({state!r:.60}), expected the equinox.nn.State "
            "that the layer belongs to"
        )
    params = Params(layer.weight, layer.bias)
    if layer.mode == "ema":
        mean, var = state.get(layer.ema_state_index)
        return params, State(mean, var, 1 - state.get(layer.ema_first_time_index).astype(jnp.int32))
    count = jnp.asarray(state.get(layer.batch_counter)).astype(jnp.int32)
    mean, var = state.get(layer.batch_state_index)
    correction = _equinox_correction(layer, count, mean.dtype)
    return params, State(mean / correction, var / correction, count)


def to_equinox(params: Params, state: State, layer: Any, equinox_state: Any) -> tuple[Any, Any]:
    """The layer and its equinox.nn.State with these values; exact for mode="ema", to float rounding
    for mode="batch".

    Args:
        params, state: features of rank 1.
        layer: a layer of as many channels, with the same parameters present.
        equinox_state: the state it belongs to.

    Raises:
        ImportError: equinox is missing.
    """
    equinox = _import("equinox")
    _one_axis(params, state, "Equinox")
    kinds.library(layer, "equinox")
    for name, given, held in (
        ("scale", params.scale, layer.weight),
        ("bias", params.bias, layer.bias),
        ("mean", state.mean, jnp.zeros(layer.input_size)),
    ):
        shapes = [None if vector is None else vector.shape for vector in (given, held)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has shape {shapes[0]}, expected {shapes[1]}, that of the layer: make it "
                "with as many channels, and with channelwise_affine as the params are"
            )
    if params.scale is not None:
        layer = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(params))
    if layer.mode == "ema":
        equinox_state = equinox_state.set(layer.ema_first_time_index, state.count == 0)
        return layer, equinox_state.set(layer.ema_state_index, (state.mean, state.var))
    correction = _equinox_correction(layer, state.count, state.mean.dtype)
    equinox_state = equinox_state.set(layer.batch_counter, int(state.count))
    return layer, equinox_state.set(
        layer.batch_state_index, (state.mean * correction, state.var * correction)
    )


def _equinox_correction(layer, count, dtype):
    return jnp.where(count == 0, 1, 1 - jnp.asarray(layer.momentum, dtype) ** count.astype(dtype))


def from_keras(layer: Any, *, count: int = 0) -> tuple[Params, State]:
    """A built keras.layers.BatchNormalization.

    Args:
        layer: the layer.
        count: batches seen, which Keras does not record.
    """
    kinds.library(layer, "keras")
    if not layer.built:
        raise ValueError(f"the layer {layer.name!r} is not built yet, expected layer.build(shape)")
    array = lambda variable: None if variable is None else to_array(variable.value)
    return Params(array(layer.gamma), array(layer.beta)), State(
        to_array(layer.moving_mean.value), to_array(layer.moving_variance.value), _batches(count)
    )


def to_keras(params: Params, state: State) -> list[np.ndarray]:
    """For set_weights of a keras.layers.BatchNormalization; the count is lost.

    In its order: gamma, beta, moving mean, moving variance.
    """
    _one_axis(params, state, "Keras")
    return [np.asarray(value) for value in (*params, state.mean, state.var) if value is not None]


def to_array(value: Any) -> Array:
    """A jax.Array of the same dtype, from whatever holds it."""
    if hasattr(value, "detach"):
        if getattr(value, "is_meta", False) or type(value).__name__.startswith("Uninitialized"):
            raise ValueError(
                f"got a torch {type(value).__name__} without values, of a lazy module or on the "
                "meta device: run the module once, or load its weights"
            )
        value = value.detach().cpu()
        bfloat16 = str(value.dtype) == "torch.bfloat16"  # which .numpy() refuses
        value = value.float().numpy() if bfloat16 else value.numpy()
        value = value.astype(jnp.bfloat16) if bfloat16 else value
    value = np.asarray(value)
    if value.dtype.kind in "OSU":
        raise TypeError(f"{value!r:.60} is no array of numbers, expected a tensor or an array")
    if value.dtype == np.int64 and np.any(value != value.astype(np.int32)):
        raise ValueError(
            f"an array of dtype int64 holds {value.max()}, expected at most {_MOST}, which int32 "
            "holds: lower it first, also if it is a num_batches_tracked"
        )
    array = jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)
    if array.dtype != value.dtype and value.dtype != np.int64:
        raise ValueError(
            f"an array of dtype {value.dtype} would become {array.dtype}: convert under "
            "jax.enable_x64(True)"
        )
    return array


def _check(params, state):
    for value, name, expected in ((params, "params", Params), (state, "state", State)):
        if not isinstance(value, expected):
            raise TypeError(
                f"{name} is a {type(value).__name__} ({value!r:.60}), expected jbn."
                f"{expected.__name__}: such as jbn.init(features) and the from_ functions give"
            )


def _one_axis(params, state, library):
    _check(params, state)
    validate.state(state, "state", prefix="state.")
    if state.mean.ndim != 1:
        raise ValueError(
            f"features have shape {state.mean.shape}, expected one axis: {library} has no batch "
            "norm over several"
        )


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"to build a {name} object, {name} is needed: {_EXTRA[name]}") from error
