"""The four functions of one implementation, called on their own and checked against float64."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.kernels.seam import Affine, StatsGradient

# Passes over x that each function cannot do without; one more with a residual, or with the y that
# stands for it.
PASSES = {"fwd_stats": 1, "fwd_apply": 2, "bwd_stats": 2, "bwd_apply": 3}

# For each kernel: the module of its block choices, and the constants worth trying other values of.
SWEEPS = {
    "triton": (
        "jbn.kernels.blocks",
        {
            "PROGRAMS_PER_SM": (2, 4, 8, 12),
            "UNROLL": (1, 2, 8),
            "MAPPED_TILES": (1, 2, 8),
            "NUM_WARPS": (2, 8),
            "TILE_BYTES": (256, 512),
            "MAX_REDUCED_TILES": (16, 32, 128),
        },
    ),
    "mosaic_gpu": (
        "jbn.kernels.blocks",
        {
            "RING_STEPS": (2, 3, 6),
            "RING_BYTES": (2**15, 2**16, 3 * 2**16),
            "RINGS_PER_SM": (1, 3, 4),
            "MIN_REDUCED_TILES": (1, 2, 8),
        },
    ),
}


class Inputs(NamedTuple):
    """Arrays [rows, channels] and vectors [channels] for all four functions."""

    x: Array
    dy: Array
    residual: Array | None
    y: Array | None  # with a residual, the saved output
    affine: Affine
    stats_gradient: StatsGradient


def module(implementation: str) -> Any:
    """The module of a kernel, or for "xla" the one for the platform at hand."""
    if implementation == "xla":
        implementation = {"gpu": "xla_gpu", "tpu": "xla_tpu"}.get(jax.default_backend(), "xla")
    return importlib.import_module(f"jbn.kernels.{implementation}")


def inputs(rows: int, channels: int, dtype: str, *, with_residual: bool) -> Inputs:
    """x from N(3, 2), statistics near its own, dy zero where rounding could turn relu on or off."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy, residual = (jax.random.normal(k, (rows, channels), jnp.float32) for k in keys[:3])
    x = (x * 2 + 3).astype(dtype)
    residual = residual.astype(dtype) if with_residual else None
    gain, bias = (jax.random.uniform(k, (channels,), minval=0.5, maxval=1.5) for k in keys[3:])
    full = jnp.full((channels,), 1.0)
    affine = Affine(full * 2.9, gain, bias - 1 - 0.1 * gain)
    z = (x.astype(jnp.float32) - 3.0) * affine.gain[None] + affine.bias[None]
    z = z if residual is None else z + residual.astype(jnp.float32)
    dy = jnp.where(jnp.abs(z) < 1e-3, 0, dy).astype(dtype)
    y = None if residual is None else jax.nn.relu(z).astype(dtype)
    return Inputs(x, dy, residual, y, affine, StatsGradient(full * 0.01, full * -0.02))


def function(implementation: str, name: str, *, interpret: Any = False) -> Callable[[Inputs], Any]:
    """One of the four functions with relu, not jitted; `interpret` as a Pallas kernel takes it."""
    fn = getattr(module(implementation), name)
    extra = {} if implementation == "xla" else {"interpret": interpret}

    def run(inputs: Inputs):
        x, dy, residual, y, affine, stats_gradient = inputs
        axis = (x.ndim - 1,)
        if name == "fwd_stats":
            return fn(x, affine.shift, None, axis=axis, **extra)
        if name == "fwd_apply":
            return fn(
                x, affine, residual, axis=axis, activation=jax.nn.relu, dtype=x.dtype, **extra
            )
        backward = {"saved": y, "weights": None, "axis": axis, "activation": jax.nn.relu, **extra}
        if name == "bwd_stats":
            return fn(x, dy, affine, **backward)
        residual_dtype = None if residual is None else residual.dtype
        return fn(
            x, dy, affine, stats_gradient=stats_gradient, residual_dtype=residual_dtype, **backward
        )

    run.__name__ = run.__qualname__ = f"{name}_{implementation}"
    return run


def error(name: str, inputs: Inputs, result: Any) -> float:
    """The largest error against float64, over the size of what is compared.

    It is below `tolerance` if the function is right.
    """
    x, dy, residual, y, affine, stats_gradient = (
        jax.tree.map(lambda a: np.asarray(a, np.float64), part) for part in inputs
    )
    shift, gain, bias = affine
    xc = x - shift
    if name == "fwd_stats":
        _, got_shift, got_offset, got_m2 = (np.asarray(a, np.float64) for a in result)
        mean = x.mean(0)
        m2 = np.square(x - mean).sum(0)
        return max(_worst(got_shift + got_offset, mean, x.std(0)), _worst(got_m2, m2, m2))
    z = xc * gain + bias + (0 if residual is None else residual)
    if name == "fwd_apply":
        return _worst(result, np.maximum(z, 0), np.maximum(np.abs(z), 1))
    dz = dy * ((z if y is None else y) > 0)
    if name == "bwd_stats":
        sums = zip(result, (dz, dz * xc), strict=True)
        return max(_worst(got, terms.sum(0), np.abs(terms).sum(0) + 1) for got, terms in sums)
    dx, dresidual = result
    expected = gain * dz + stats_gradient.intercept + stats_gradient.slope * xc
    worst = _worst(dx, expected, np.maximum(np.abs(expected), 1))
    return (
        worst if residual is None else max(worst, _worst(dresidual, dz, np.maximum(np.abs(dz), 1)))
    )


def tolerance(name: str, dtype: str) -> float:
    """What rounding may do: 1e-5 to float32 sums (a random walk over 4e5 rows).

    What is stored in x's dtype is rounded once more.
    """
    stored = name.endswith("apply")
    return 1e-5 + (float(jnp.finfo(dtype).eps) if stored else 0.0)


def _worst(got, expected, size):
    """NaN counts as infinitely wrong."""
    ratio = np.abs(np.asarray(got, np.float64) - expected) / size
    return float(np.nan_to_num(ratio, nan=np.inf).max())
