"""What is measured of each channel, written once for reports (NumPy) and metrics (JAX, in jit)."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jbn.core import validate
from jbn.types import Moments


class Batch(NamedTuple):
    """What one batch of a layer's input looked like: per channel, its mean and biased variance."""

    mean: Any
    var: Any


class Measured(NamedTuple):
    """Arrays of the shape of the features; drift and spread are None where no batch is known.

    Attributes:
        drift: (batch mean - running mean) / running standard deviation. Of a complex layer drift
            and one_sided are magnitudes.
        spread: batch standard deviation / running standard deviation.
        input_var: variance of the input, of the batch if it is known, else the running one.
        signal: standard deviation of the normalized value in training,
            sqrt(input_var / (input_var + eps)).
        ratio: |running mean| / running standard deviation.
        one_sided: mean of the output in its own standard deviations: of the batch in evaluation, or
            in training.
    """

    drift: Any
    spread: Any
    input_var: Any
    signal: Any
    ratio: Any
    one_sided: Any


def measure(scale, bias, running: Batch, batch: Batch | None, eps: float, xp: Any) -> Measured:
    """Measure every channel of a layer.

    Args:
        scale, bias: of the shape of the features, or None.
        running: the running statistics.
        batch: those of a batch, or None.
        eps: of the layer.
        xp: numpy or jax.numpy.
    """
    std = xp.sqrt(running.var)
    drift = spread = None
    batch_mean, batch_var = running
    if batch is not None:
        batch_mean, batch_var = batch
        drift, spread = magnitude(batch_mean - running.mean, xp) / std, xp.sqrt(batch_var) / std
    gain = 1 / xp.sqrt(running.var + eps)
    gain = gain if scale is None else scale * gain.astype(scale.dtype)
    output_mean = gain * (batch_mean - running.mean)
    output_mean = output_mean if bias is None else output_mean + bias
    return Measured(
        drift=drift,
        spread=spread,
        input_var=batch_var,
        signal=xp.sqrt(batch_var / (batch_var + eps)),
        ratio=xp.abs(running.mean) / std,
        one_sided=magnitude(output_mean, xp) / (xp.abs(gain) * xp.sqrt(batch_var)),
    )


def moments_by_layer(moments: Any, layers: Collection[str]) -> Mapping[str, Moments]:
    """The moments of some of the layers, by their names."""
    moments = {} if moments is None else moments
    if not isinstance(moments, Mapping):
        raise TypeError(
            f"moments is a {type(moments).__name__}, expected a dict from the names of layers to "
            "their jbn.Moments, as from jbn.health.input_moments"
        )
    if unknown := [name for name in moments if name not in layers]:
        raise ValueError(f"moments of {unknown}, expected names among the layers: {list(layers)}")
    return moments


def check_moments(moments: Moments, shape: tuple[int, ...], layer: str) -> None:
    """Refuse what are no moments of this layer's input; their mean may be complex."""
    name = f"moments of {layer}"
    if isinstance(moments, Moments) and hasattr(moments.mean, "real"):
        validate.moments(moments._replace(mean=moments.mean.real), name)
    else:
        validate.moments(moments, name)
    if moments.mean.shape != shape:
        raise ValueError(
            f"{name} have shape {moments.mean.shape}, expected {shape}: those of the layer's input"
        )


def magnitude(values: Any, xp: Any) -> Any:
    """Of complex values the magnitude; others, and None, as they are."""
    return xp.abs(values) if xp.iscomplexobj(values) else values
