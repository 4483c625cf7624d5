"""What is measured of each channel, written once for reports (NumPy) and metrics (JAX, in jit)."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """What one batch of a layer's input looked like: per channel, its mean and biased variance."""

    mean: Any
    var: Any


class Measured(NamedTuple):
    """Arrays of the shape of the features; drift and spread are None where no batch is known.

    Attributes:
        drift: (batch mean - running mean) / running standard deviation.
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
        drift, spread = (batch_mean - running.mean) / std, xp.sqrt(batch_var) / std
    gain = 1 / xp.sqrt(running.var + eps)
    gain = gain if scale is None else scale * gain
    output_mean = gain * (batch_mean - running.mean)
    output_mean = output_mean if bias is None else output_mean + bias
    return Measured(
        drift=drift,
        spread=spread,
        input_var=batch_var,
        signal=xp.sqrt(batch_var / (batch_var + eps)),
        ratio=xp.abs(running.mean) / std,
        one_sided=output_mean / (xp.abs(gain) * xp.sqrt(batch_var)),
    )
