"""What is measured: named layers, three operations on each, three ways to run them."""

import math
from typing import NamedTuple

OPERATIONS = ("bn", "bn_relu", "bn_add_relu")
MODES = ("forward", "forward_backward", "eval")
DTYPES = ("float32", "bfloat16")

# Passes over one tensor T, where each pass goes over memory and where x, dy stay on chip between
# the passes.
_PASSES = {
    # forward: read x for the statistics; read x, write y.  eval: the second alone.
    # backward: read x, dy for the two sums; read x, dy, write dx.
    "bn": {"forward": (3, 2), "forward_backward": (8, 5), "eval": (2, 2)},
    # The mask of relu is recomputed from x.
    "bn_relu": {"forward": (3, 2), "forward_backward": (8, 5), "eval": (2, 2)},
    # forward: also read the residual.  backward: also write dz, the residual's gradient.  The mask,
    # as bits, is a sixteenth of a pass or less.
    "bn_add_relu": {"forward": (4, 3), "forward_backward": (10, 7), "eval": (3, 3)},
}


class Case(NamedTuple):
    """One layer. The shape is that of x; axis is its feature axis."""

    name: str
    shape: tuple[int, ...]
    axis: int = -1

    @property
    def features(self) -> int:
        return self.shape[self.axis]

    @property
    def channels_last(self) -> bool:
        return self.axis in (-1, len(self.shape) - 1)


class Problem(NamedTuple):
    """One layer, one operation, one dtype, one way to run it: what every peer computes."""

    case: Case
    operation: str
    mode: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operation}/{self.case.name}"

    @property
    def nbytes(self) -> int:
        """T, the bytes of x."""
        return math.prod(self.case.shape) * (2 if self.dtype == "bfloat16" else 4)

    @property
    def adds(self) -> bool:
        return self.operation == "bn_add_relu"

    @property
    def relu(self) -> bool:
        return self.operation != "bn"

    @property
    def passes(self) -> tuple[int, int]:
        """(with every pass over memory, with x and dy kept on chip), in units of T."""
        return _PASSES[self.operation][self.mode]


def layers(batch: int) -> list[Case]:
    """The layers of ResNet-50 on 224x224 images, and four that it does not have."""
    sides = {"stem": (112, 64)}
    for stage, (side, width) in enumerate([(56, 64), (28, 128), (14, 256), (7, 512)], start=1):
        sides |= {f"stage{stage}_narrow": (side, width), f"stage{stage}_wide": (side, 4 * width)}
    cases = [Case(name, (batch, side, side, width)) for name, (side, width) in sides.items()]
    return [
        *cases,
        Case("dense", (512 * batch, 1024)),
        Case("odd", (batch, 28, 28, 112)),
        Case("odd_small", (batch, 56, 56, 24)),
        Case("channels_first", (batch, 256, 28, 28), axis=1),
    ]


def problems(batch: int) -> list[Problem]:
    """Everything."""
    return [
        Problem(case, operation, mode, dtype)
        for case in layers(batch)
        for operation in OPERATIONS
        for dtype in DTYPES
        for mode in MODES
    ]


def quick() -> list[Problem]:
    """A choice that takes under a minute on two CPU cores, compilation included."""
    # Convolutions beyond the caches: within them two runs differ by more than two peers.
    by_name = {case.name: case for case in layers(batch=16)} | {
        "dense": Case("dense", (2048, 1024))
    }
    convolution = by_name["stage2_wide"]
    found = [Problem(convolution, "bn_relu", mode, "float32") for mode in MODES]
    found += [
        Problem(convolution, operation, "forward_backward", "float32")
        for operation in ("bn", "bn_add_relu")
    ]
    found += [
        Problem(by_name[name], "bn_relu", "forward_backward", "bfloat16")
        for name in ("stage3_narrow", "dense")
    ]
    return found
