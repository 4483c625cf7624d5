"""The three pytrees that users hold: what is learned, what is remembered, what one batch says.

`jax.export` can serialize functions that take and return them.
"""

from typing import NamedTuple

from jax import Array, export


class Params(NamedTuple):
    """What training learns.

    Attributes:
        scale: gamma, one value per feature (the shape of the feature axes), or None for no scaling.
        bias: beta, likewise, or None.
    """

    scale: Array | None
    bias: Array | None


class State(NamedTuple):
    """What inference uses: averages over the batches seen in training.

    Attributes:
        mean: running mean, the shape of the feature axes; float32 (float64 for float64 parameters).
        var: running variance, likewise.
        count: int32 scalar, the number of batches seen.
    """

    mean: Array
    var: Array
    count: Array


class Moments(NamedTuple):
    """Statistics of a set of values; two of them merge exactly (Chan, Golub & LeVeque 1979).

    Attributes:
        count: float32 (float64 for float64 values), the shape of the feature axes: sum of the
            weights, or how many values.
        mean: their mean.
        m2: sum of weight * (value - mean)^2; the biased variance is m2 / count.
    """

    count: Array
    mean: Array
    m2: Array


# `import jax` has imported jax.export already.
for _tuple in (Params, State, Moments):
    export.register_namedtuple_serialization(_tuple, serialized_name=f"jbn.{_tuple.__name__}")
