"""Which implementation runs: chosen here and nowhere else, from static shapes and the platform the program is lowered for."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jbn.kernels import xla, xla_gpu, xla_tpu
from jbn.kernels.seam import Device

# The kernels that there are, and where each runs. Measured on a card or chip: none of them yet.  Until one has been measured
# faster, None means XLA's own fusions everywhere.
PLATFORMS = {"triton": ("cuda",), "mosaic_gpu": ("cuda",), "mosaic_tpu": ("tpu",)}


def run(name: str, implementation: str | None, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    """Call one of the four functions of the seam on local arrays.

    Args:
        name: "fwd_stats", "fwd_apply", "bwd_stats" or "bwd_apply".
        implementation: as in the public API. Weighted statistics and their gradients always run on XLA.
        arrays: the array arguments by name; None for those absent.
        static: the others, hashable.

    Raises:
        NotImplementedError: the implementation cannot take these shapes, or (at lowering) this platform.
    """
    if on_xla(implementation, arrays.get("weights")):
        return _xla(name, arrays, static)
    return _kernel(name, implementation, tuple(static.items()), arrays)


def on_xla(implementation: str | None, weights: Any) -> bool:
    """Whether `run` takes the jnp functions, on every platform: XLA can partition what is elementwise in them."""
    return implementation in (None, "xla") or weights is not None


def fused(name: str, implementation: str | None, x: jax.Array, axis: tuple[int, ...]) -> Callable | None:
    """The kernel that keeps x on chip between the two passes of forward or backward, or None: for `on_one_device`.

    Args:
        name: "fwd_fused" or "bwd_fused" of the seam; the kernel itself returns None where x is too large.
    """
    backend, _, interpret = (implementation or "xla").partition("/")
    if backend not in PLATFORMS or any(kind != AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types):
        return None
    module, device = importlib.import_module(f"jbn.kernels.{backend}"), _device()
    kernel = getattr(module, name, None)
    if kernel is None or device is None or module.unsupported(x.shape, x.dtype, axis) is not None:
        return None

    def run(x, *args, **static):
        x = x if interpret else _only_on.bind(x, platforms=PLATFORMS[backend], implementation=implementation)
        return kernel(x, *args, **static, device=device, interpret=bool(interpret))

    return run


def _device():
    """What the program is meant for, or else runs on; None for a plain CPU."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant is not None:
        return Device(meant.device_kind, meant.num_cores or 1)
    here = jax.local_devices()[0]
    return None if here.platform == "cpu" else Device(here.device_kind, getattr(here, "core_count", 1))


def on_one_device(fused: Callable, otherwise: Callable, *args: Any) -> Any:
    """fused(*args) in a program lowered for one device; elsewhere, and where that is None or mapped, otherwise(*args)."""
    leaves, tree = jax.tree.flatten(args)
    traced = lambda fn: jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), return_shape=True)(*leaves)
    fused_jaxpr, fitting = traced(fused)
    if fitting is None:
        return otherwise(*args)
    jaxpr, out = traced(otherwise)
    return jax.tree.unflatten(jax.tree.structure(out), _on_one_device.bind(*leaves, fused=fused_jaxpr, otherwise=jaxpr))


_on_one_device = Primitive("jbn_on_one_device")
_on_one_device.multiple_results = True
_on_one_device.def_impl(lambda *leaves, fused, otherwise: jaxpr_as_fun(otherwise)(*leaves))
_on_one_device.def_abstract_eval(lambda *_, fused, otherwise: otherwise.out_avals)


def _batch_on_one_device(leaves, dims, *, fused, otherwise):
    out = jax.vmap(jaxpr_as_fun(otherwise), dims, 0)(*leaves)
    return out, [0] * len(out)


def _jvp_on_one_device(primals, tangents, *, fused, otherwise):
    tangents = tuple(jnp.zeros_like(p) if type(t) is ad.Zero else t for p, t in zip(primals, tangents, strict=True))
    return jax.jvp(jaxpr_as_fun(otherwise), primals, tangents)


def _lower_on_one_device(context, *leaves, fused, otherwise):
    alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    return mlir.lower_fun(jaxpr_as_fun(fused if alone else otherwise), multiple_results=True)(context, *leaves)


batching.primitive_batchers[_on_one_device] = _batch_on_one_device
ad.primitive_jvps[_on_one_device] = _jvp_on_one_device
mlir.register_lowering(_on_one_device, _lower_on_one_device)


def _xla(name, arrays, static):
    """The placement of barriers and casts that suits the platform, decided at lowering."""
    placed = {place: _bind(module, name, static) for place, module in (("cuda", xla_gpu), ("tpu", xla_tpu))}
    return lax.platform_dependent(arrays, default=_bind(xla, name, static), **placed)


def _bind(module, name, static):
    return lambda arrays: getattr(module, name)(**arrays, **static)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _kernel(name, implementation, static, arrays):
    """A Pallas kernel; derivatives of second and higher order take the jnp twin."""
    backend, _, interpret = implementation.partition("/")
    module = importlib.import_module(f"jbn.kernels.{backend}")
    x = arrays["x"]
    reason = module.unsupported(x.shape, x.dtype, dict(static)["axis"])
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} {reason}: use implementation=None")
    if not interpret:
        arrays = {**arrays, "x": _only_on.bind(x, platforms=PLATFORMS[backend], implementation=implementation)}
    return getattr(module, name)(**arrays, **dict(static), interpret=bool(interpret))


@_kernel.defjvp
def _(name, implementation, static, primals, tangents):
    return _kernel(name, implementation, static, *primals), jax.jvp(_bind(xla, name, dict(static)), primals, tangents)[1]


# The identity, except that lowering it for a platform the kernel does not run on says so.
_only_on = Primitive("jbn_only_on")
_only_on.def_impl(lambda x, **_: x)
_only_on.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_only_on, lambda ct, _, **__: [ct])
batching.defvectorized(_only_on)


def _lower_only_on(context, x, *, platforms, implementation):
    here = context.module_context.platforms
    if not set(here) <= set(platforms):
        raise NotImplementedError(
            f"implementation {implementation!r} runs on {' and '.join(platforms)}, not on {', '.join(here)}: "
            f"use implementation=None, or {implementation + '/interpret'!r} to check numbers anywhere"
        )
    refuse = getattr(importlib.import_module(f"jbn.kernels.{implementation}"), "unsupported_device", lambda kind: None)
    device = _device()
    reason = None if device is None else refuse(device.kind)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} {reason}")
    return [x]


mlir.register_lowering(_only_on, _lower_only_on)
