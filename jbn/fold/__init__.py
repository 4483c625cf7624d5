"""Fold a batch norm in inference mode into the linear layer before or after it.

`certify` shows that the model still computes the same.
"""

from jbn.fold.certificate import Certificate, certify
from jbn.fold.linear import fold_next, fold_previous, kernel_axes
from jbn.fold.models import FoldedNorm, fold_nnx, fold_variables
from jbn.fold.pairs import Pair, find_pairs

__all__ = [
    "Certificate",
    "FoldedNorm",
    "Pair",
    "certify",
    "find_pairs",
    "fold_next",
    "fold_nnx",
    "fold_previous",
    "fold_variables",
    "kernel_axes",
]
