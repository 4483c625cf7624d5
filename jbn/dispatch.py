"""Which implementation runs: chosen here and nowhere else, from static shapes and the platform the program is lowered for."""

import functools
import importlib
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jbn.kernels import xla, xla_gpu, xla_tpu

# The kernels that there are, and where each runs. Measured on a card or chip: none of them yet.  Until one has been measured
# faster, None means XLA's own fusions everywhere.
PLATFORMS = {"triton": ("cuda",), "mosaic_tpu": ("tpu",)}


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
    if backend not in PLATFORMS:
        raise NotImplementedError(f"implementation {implementation!r} is not written yet: use implementation=None")
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
    return [x]


mlir.register_lowering(_only_on, _lower_only_on)
