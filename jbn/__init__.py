"""Batch normalization for JAX: pure functions over explicit state, and drop-in Flax modules.

`jbn.linen` and `jbn.nnx` hold the modules; the tools (`jbn.fold`, `jbn.convert`, ...) are imported by name.
"""

import importlib

from jbn.functional import (
    batch_norm_eval,
    batch_norm_train,
    init,
    merge_moments,
    moments,
    normalize,
    psum_moments,
    update_state,
)
from jbn.renorm import batch_renorm_train
from jbn.types import Moments, Params, State

__all__ = [
    "Moments",
    "Params",
    "State",
    "batch_norm_eval",
    "batch_norm_train",
    "batch_renorm_train",
    "init",
    "merge_moments",
    "moments",
    "normalize",
    "psum_moments",
    "update_state",
]


def __getattr__(name):
    """`jbn.linen` and `jbn.nnx` on first use, so that `import jbn` does not import Flax."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jbn.{name}")
    raise AttributeError(f"module 'jbn' has no attribute {name!r}")
