"""The Pallas backends: which there are, where each runs, and why one cannot take a program.

To add one: a module beside this one that keeps the contract of seam.py, and its names below.
"""

import functools
import importlib
from typing import Any, Literal, NamedTuple, get_args

import jax

from jbn.kernels.seam import Device

# What an argument `implementation` may say; "/interpret" is Pallas's interpreter, on any platform.
Implementation = Literal[
    "xla",
    "triton",
    "mosaic_gpu",
    "mosaic_tpu",
    "triton/interpret",
    "mosaic_gpu/interpret",
    "mosaic_tpu/interpret",
]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
PLATFORMS: dict[Implementation, tuple[str, ...]] = {
    "triton": ("cuda",),
    "mosaic_gpu": ("cuda",),
    "mosaic_tpu": ("tpu",),
}


class Backend(NamedTuple):
    """One of them, as an argument `implementation` names it."""

    implementation: str
    kernels: Any  # the module
    interpret: bool

    def unsupported(self, shape: tuple, dtype: Any, axis: tuple[int, ...]) -> str | None:
        """Why it cannot take such an x, as the end of a sentence; None if it can."""
        if is_symbolic(shape):
            return f"takes no symbolic shape such as {shape}"
        return self.kernels.unsupported(shape, dtype, axis)

    def refuse_elsewhere(self, platforms: tuple[str, ...]) -> None:
        """Say why it cannot be lowered for these platforms or the device, if it cannot."""
        if self.interpret:
            return
        name, runs_on = self.implementation, PLATFORMS[self.implementation]
        if not set(platforms) <= set(runs_on):
            raise NotImplementedError(
                f"implementation {name!r} runs on {' and '.join(runs_on)}, not on "
                f"{', '.join(platforms)}: use implementation=None, or '{name}/interpret' to "
                "check numbers anywhere"
            )
        runs_for = device()
        reason = runs_for and self.kernels.unsupported_device(runs_for.kind)
        if reason:
            raise NotImplementedError(f"implementation {name!r} {reason}")


@functools.cache
def named(implementation: str | None) -> Backend | None:
    """The backend of this name; None for XLA, which is no Pallas backend."""
    if implementation in (None, "xla"):
        return None
    name, _, interpret = implementation.partition("/")
    return Backend(implementation, importlib.import_module(f"jbn.kernels.{name}"), bool(interpret))


def device() -> Device | None:
    """The device that the program is meant for, or else runs on; None for a plain CPU."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant is not None:
        return Device(meant.device_kind, meant.num_cores or 1)
    first = jax.local_devices()[0]
    if first.platform == "cpu":
        return None
    return Device(first.device_kind, getattr(first, "core_count", 1))


def is_symbolic(shape: tuple) -> bool:
    """Whether jax.export knows a dimension of it by a symbol only."""
    return not all(isinstance(n, int) for n in shape)
