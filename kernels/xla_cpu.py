"""How per-channel sums are made on CPU: the rest of what runs there is `xla`.

XLA:CPU makes each sum a kernel of its own, so that two sums of the same x read x twice.  A
`lax.reduce` of two operands reads it once, but over many rows it takes seven times as long.  Over a
few rows it is as fast as the memory: forward and backward took 0.67 to 0.97 of the time that they
took with separate sums (two cores with AVX2, shapes of ResNet, float32 and bfloat16).
"""

import math

from jax import Array, lax

from jbn.kernels.seam import barrier, reduced_axes
from jbn.kernels.xla import separate_sums

# LLVM unrolls a loop over so many rows and vectorizes the loop around it. Over 64 rows it does
# not, which takes ten times as long.
MAX_ROWS = 16
# With fewer rows the partial sums of two arrays would be as large as what a second pass reads.
MIN_ROWS = 4


def joint_sums(axis: tuple[int, ...], *values: Array) -> tuple[Array, ...]:
    """The per-channel sums of several arrays, from one pass over what the arrays are made of.

    Groups of rows are summed together; separate kernels then add up the groups.
    """
    channels = axis[0] if axis else 0  # the axes before it are all reduced: they are the rows
    rows = math.prod(values[0].shape[:channels])
    group = next(k for k in range(MAX_ROWS, 0, -1) if rows % k == 0)
    if group < MIN_ROWS:
        return separate_sums(axis, *values)
    shape = (group, rows // group, *values[0].shape[channels:])
    zeros = [value.dtype.type(0) for value in values]
    add = lambda a, b: tuple(map(lax.add, a, b))
    sums = lax.reduce([value.reshape(shape) for value in values], zeros, add, (0,))
    rest = reduced_axes(len(shape) - 1, tuple(a - channels + 1 for a in axis))
    return tuple(value.sum(rest) for value in barrier(tuple(sums)))
