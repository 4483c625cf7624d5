"""Which implementation runs: chosen here and nowhere else, from static shapes and the platform the program is lowered for."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

from jbn.core.lowering import at_lowering
from jbn.kernels import xla, xla_gpu, xla_tpu
from jbn.kernels.seam import Device

# The kernels that there are, and where each runs. Measured on a card or chip: none of them yet.
# Until one has been measured faster, None means XLA's own fusions everywhere.
PLATFORMS = {"triton": ("cuda",), "mosaic_gpu": ("cuda",), "mosaic_tpu": ("tpu",)}


def run(
    name: str, implementation: str | None, arrays: dict[str, Any], static: dict[str, Any]
) -> Any:
    """Call one of the four functions of the seam on local arrays.

    Args:
        name: "fwd_stats", "fwd_apply", "bwd_stats" or "bwd_apply".
        implementation: as in the public API. Weighted statistics and their gradients always run on
            XLA.
        arrays: the array arguments by name; None for those absent.
        static: the others, hashable.

    Raises:
        NotImplementedError: the implementation cannot take these shapes, or (at lowering) this
            platform.
    """
    if on_xla(implementation, arrays.get("weights")):
        return _xla(name, arrays, static)
    return _kernel(name, implementation, arrays, static)


def on_xla(implementation: str | None, weights: Any) -> bool:
    """Whether `run` takes the jnp functions, on every platform: XLA can partition what is elementwise in them."""
    return implementation in (None, "xla") or weights is not None


def fused(
    name: str, implementation: str | None, x: jax.Array, axis: tuple[int, ...]
) -> Callable | None:
    """The kernel that keeps x on chip between the two passes of forward or backward, or None: for
    `on_one_device`.

    Args:
        name: "fwd_fused" or "bwd_fused" of the seam; the kernel itself returns None where x is too
            large.
    """
    backend, _, interpret = (implementation or "xla").partition("/")
    if backend not in PLATFORMS or any(
        kind != AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types
    ):
        return None
    module, device = importlib.import_module(f"jbn.kernels.{backend}"), _device()
    kernel = getattr(module, name, None)
    if kernel is None or device is None or module.unsupported(x.shape, x.dtype, axis) is not None:
        return None
    return functools.partial(kernel, device=device, interpret=bool(interpret))


def on_one_device(
    implementation: str | None, fused: Callable, otherwise: Callable, *args: Any
) -> Any:
    """fused(*args) in a program lowered for one device; elsewhere, and where that is None or mapped, otherwise(*args)."""
    leaves, tree = jax.tree.flatten(args)
    if jax.eval_shape(fused, *args) is None:
        return otherwise(*args)
    flat = lambda fn: lambda *leaves: jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves)))

    def choose(module_context):
        alone = getattr(module_context.axis_context, "num_devices", None) == 1
        return 1 + _refuse_elsewhere(implementation, module_context) if alone else 0

    out = at_lowering(choose, (flat(otherwise), flat(fused)), flat(otherwise), *leaves)
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(otherwise, *args)), out)


def _device():
    """What the program is meant for, or else runs on; None for a plain CPU."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant is not None:
        return Device(meant.device_kind, meant.num_cores or 1)
    here = jax.local_devices()[0]
    return (
        None if here.platform == "cpu" else Device(here.device_kind, getattr(here, "core_count", 1))
    )


def _xla(name, arrays, static):
    """The placement of barriers and casts that suits the platform, decided at lowering."""
    placed = {
        place: _bind(module, name, static)
        for place, module in (("cuda", xla_gpu), ("tpu", xla_tpu))
    }
    return lax.platform_dependent(arrays, default=_bind(xla, name, static), **placed)


def _bind(module, name, static):
    return lambda arrays: getattr(module, name)(**arrays, **static)


def _kernel(name, implementation, arrays, static):
    """A Pallas kernel; derivatives of second and higher order take the jnp twin."""
    backend, _, interpret = implementation.partition("/")
    module = importlib.import_module(f"jbn.kernels.{backend}")
    reason = module.unsupported(arrays["x"].shape, arrays["x"].dtype, static["axis"])
    if reason is not None:
        raise NotImplementedError(
            f"implementation {implementation!r} {reason}: use implementation=None"
        )
    leaves, tree = jax.tree.flatten(arrays)
    flat = lambda fn: lambda *leaves: jax.tree.leaves(fn(jax.tree.unflatten(tree, leaves)))
    kernel, twin = (
        _bind(module, name, {**static, "interpret": bool(interpret)}),
        _bind(xla, name, static),
    )
    choose = functools.partial(_refuse_elsewhere, implementation)
    return at_lowering(choose, (flat(kernel),), flat(twin), *leaves, vmapped=jax.vmap(flat(kernel)))


def _refuse_elsewhere(implementation, module_context):
    """0, or an error that says why the kernel cannot be lowered for this platform or device."""
    backend, _, interpret = implementation.partition("/")
    if interpret:
        return 0
    here, platforms = module_context.platforms, PLATFORMS[backend]
    if not set(here) <= set(platforms):
        raise NotImplementedError(
            f"implementation {implementation!r} runs on {' and '.join(platforms)}, not on {', '.join(here)}: "
            f"use implementation=None, or {implementation + '/interpret'!r} to check numbers anywhere"
        )
    refuse = getattr(
        importlib.import_module(f"jbn.kernels.{backend}"), "unsupported_device", lambda kind: None
    )
    device = _device()
    reason = None if device is None else refuse(device.kind)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} {reason}")
    return 0
