"""Batch norms and whole models of other libraries, to and from jbn."""

from jbn.convert.averaging import debiased_momentum, options
from jbn.convert.layers import (
    from_equinox,
    from_haiku,
    from_keras,
    from_linen,
    from_nnx,
    from_torch,
    to_equinox,
    to_haiku,
    to_keras,
    to_linen,
    to_nnx,
    to_torch,
)
from jbn.convert.models import from_torch_model, module_path, resnet_path, torch_pairs
from jbn.convert.sbx import from_sbx, to_sbx

__all__ = [
    "debiased_momentum",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_sbx",
    "from_torch",
    "from_torch_model",
    "module_path",
    "options",
    "resnet_path",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_sbx",
    "to_torch",
    "torch_pairs",
]
