"""How far two versions of a model are apart: the proof handed out with a fold or a conversion."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jbn.core import validate


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Largest difference of two functions, measured on given inputs and promised for nothing else.

    Attributes:
        max_error: largest absolute difference of any output element; NaN if an output was not
            finite.
        max_output: largest absolute value of the reference's outputs, to compare max_error with.
        inputs: how many inputs were tried.
    """

    max_error: float
    max_output: float
    inputs: int

    def require(self, tolerance: float) -> "Certificate":
        """Itself, if max_error is at most `tolerance`; otherwise (NaN too) ValueError."""
        if not self.max_error <= tolerance:
            raise ValueError(f"max_error is {self.max_error}, expected at most {tolerance}: {self}")
        return self


def certify(reference: Callable, candidate: Callable, inputs: Iterable[Any]) -> Certificate:
    """Compare two functions of one argument that each return one array.

    Args:
        reference: the model before.
        candidate: the model after; may belong to another library, as long as NumPy reads its
            output.
        inputs: arguments for both, such as batches of real data; all are tried.

    Raises:
        ValueError: no inputs, or outputs of different shapes.
        TypeError: no functions, inputs that are no iterable, or outputs that are no arrays.
    """
    validate.function(reference, "reference", "of one argument")
    validate.function(candidate, "candidate", "of one argument")
    if not hasattr(inputs, "__iter__") or isinstance(inputs, str | Mapping):
        raise TypeError(
            f"inputs is a {type(inputs).__name__} ({inputs!r:.60}), expected a list of arguments"
        )
    error, largest, tried = 0.0, 0.0, 0
    for x in inputs:
        expected, found = (_widest(f(x)) for f in (reference, candidate))
        if expected.shape != found.shape:
            raise ValueError(
                f"outputs of shape {expected.shape} and {found.shape}, expected the same"
            )
        # np.maximum keeps a NaN, max() may not.
        error = float(np.maximum(error, np.abs(expected - found).max(initial=0)))
        largest = float(np.maximum(largest, np.abs(expected).max(initial=0)))
        tried += 1
    if not tried:
        raise ValueError(
            "inputs is empty, expected at least one: a certificate says nothing without them"
        )
    return Certificate(error, largest, tried)


def _widest(output):
    """As float64, or complex128 for complex numbers."""
    try:
        array = np.asarray(output)
    except ValueError:  # arrays of several shapes, of which NumPy makes no array
        array = None
    if array is None or array.dtype.kind in "OSU":
        raise TypeError(
            f"a function returned a {type(output).__name__}, expected one array: choose one of "
            "the outputs, such as lambda x: f(x)[0]"
        )
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
