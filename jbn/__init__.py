"""Batch normalization for JAX: pure functions over explicit state, drop-in Flax modules, and tools
around them."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jbn.functional import (
    batch_norm_eval,
    batch_norm_train,
    batch_renorm_train,
    init,
    merge_moments,
    moments,
    normalize,
    psum_moments,
    update_state,
)
from jbn.types import Moments, Params, State

if _TYPE_CHECKING:
    from jbn import convert, fold, fusing, health, linen, nnx, plot, policy, recalibrate

__version__ = "0.2.0"

__all__ = [
    "Moments",
    "Params",
    "State",
    "batch_norm_eval",
    "batch_norm_train",
    "batch_renorm_train",
    "convert",
    "fold",
    "fusing",
    "health",
    "init",
    "linen",
    "merge_moments",
    "moments",
    "nnx",
    "normalize",
    "plot",
    "policy",
    "psum_moments",
    "recalibrate",
    "update_state",
]

# Imported at first use: `import jbn` imports neither Flax nor matplotlib.
_LAZY = ("convert", "fold", "fusing", "health", "linen", "nnx", "plot", "policy", "recalibrate")


def __getattr__(name: str):
    if name in _LAZY:
        return _importlib.import_module(f"jbn.{name}")
    raise AttributeError(f"module 'jbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "bench", "functional", "types"]
