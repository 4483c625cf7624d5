"""How the batch norms of other libraries average, as arguments of jbn's functions."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jbn.convert import kinds
from jbn.core import validate


def options(layer: Any) -> dict[str, Any]:
    """The keyword arguments of `jbn.batch_norm_train` with which training goes on as in another
    library's layer.

    Args:
        layer: a batch norm of torch.nn, flax.linen, flax.nnx, jbn, haiku, equinox or keras, or of a
            subclass, such as timm's BatchNormAct2d. For those that debias (haiku, equinox), pass
            the `momentum` found here through `debiased_momentum`.

    Returns:
        axis, momentum, eps, unbiased; and activation, virtual_batch_size, skip_nonfinite, axis_name
        and axis_index_groups of a layer that has them. For `jbn.batch_norm_eval` keep axis, eps and
        activation alone. The mapped axis of an equinox layer is axis 0 of x here, and a
        SyncBatchNorm has none: give axis_name yourself where the batch is spread over devices. With
        r_max and d_max of a BatchRenorm they are the arguments of `jbn.batch_renorm_train`.

    Raises:
        TypeError: no batch norm of these libraries, or an activation that is not known.
        ValueError: a torch batch norm without running statistics, or with dropout; a BatchRenorm
            whose limits change with its steps.
    """
    library = kinds.library(layer)
    if library == "torch":
        return _torch_options(layer)
    if library == "haiku":
        axis, momentum, eps = layer.channel_index, layer.mean_ema.decay, layer.eps
    elif library == "equinox":  # x [batch, channels, ...] outside its vmap
        axis, momentum, eps = 1, layer.momentum, layer.eps
    else:
        axis, momentum, eps = layer.axis, layer.momentum, layer.epsilon
    found = {"axis": axis, "momentum": momentum, "eps": eps}
    found["unbiased"] = getattr(layer, "unbiased", False)
    if library == "flax":
        extra = ("activation", "virtual_batch_size", "skip_nonfinite")
        found |= {name: getattr(layer, name) for name in extra if getattr(layer, name, None)}
        found |= _mapped(layer.axis_name, layer.axis_index_groups)
    elif library == "haiku":
        found |= _mapped(layer.cross_replica_axis, layer.cross_replica_axis_index_groups)
    return found | _limits(layer) if hasattr(layer, "r_max") else found


def _mapped(axis_name, groups):
    """The arguments that say over which devices a layer takes its statistics."""
    if axis_name is None:  # flax ignores the groups then
        return {}
    name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    return {"axis_name": name, **({} if groups is None else {"axis_index_groups": groups})}


def _limits(layer):
    if layer.warmup_steps is not None or callable(layer.r_max) or callable(layer.d_max):
        raise ValueError(
            f"the limits of the BatchRenorm change with its steps (r_max {layer.r_max}, d_max "
            f"{layer.d_max}, warmup_steps {layer.warmup_steps}), expected two numbers: pass those "
            "of the step to jbn.batch_renorm_train"
        )
    return {"r_max": layer.r_max, "d_max": layer.d_max}


def _torch_options(layer):
    if layer.running_mean is None:
        raise ValueError(kinds.untracked(type(layer).__name__))
    momentum = None if layer.momentum is None else 1 - layer.momentum
    found = {"axis": 1, "momentum": momentum, "eps": layer.eps, "unbiased": True}
    drop = getattr(layer, "drop", None)
    if drop is not None and type(drop).__name__ != "Identity":
        raise ValueError(
            f"the batch norm drops elements by {drop}, expected no dropout: apply it yourself"
        )
    function = kinds.activation(layer.act) if hasattr(layer, "act") else None
    return found if function is None else {**found, "activation": function}


def debiased_momentum(momentum: float, count: Array) -> Array:
    """The momentum of one step with which a debiased average, as in Haiku and Equinox, goes on from
    `count` batches.

        momentum * (1 - momentum^count) / (1 - momentum^(count + 1))

    It is 0 for the first batch and rises to `momentum`.  Without it, training that goes on after a
    conversion at batch 10 (momentum 0.99) gives the next batch 1 % of the weight where these
    libraries give it 9.6 %.

    Args:
        momentum: of the layer, in [0, 1).
        count: int32 scalar, `state.count`.

    Reference: Kingma & Ba 2015, section 3.
    """
    validate.update(momentum)
    decay, count = jnp.asarray(momentum, jnp.float32), jnp.asarray(count, jnp.float32)
    return decay * (1 - decay**count) / (1 - decay ** (count + 1))
