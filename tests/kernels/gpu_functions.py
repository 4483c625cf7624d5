"""The GPU kernels as tests run them: forward and backward, compiled for cards that are not here."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.bench import hlo, targets
from jbn.kernels.seam import Affine, StatsGradient

CALLED = {"triton": "__gpu$xla.gpu.triton", "mosaic_gpu": "mosaic_gpu_v2"}

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="JAX 0.10 has no interpreter for the copies of Mosaic GPU",
)


def forward(kernels, activation, with_residual, x, affine, dy, residual):
    stats = kernels.fwd_stats(x, None, None, axis=(1,), interpret=False)
    known = {"axis": (1,), "activation": activation, "dtype": x.dtype, "interpret": False}
    return stats, kernels.fwd_apply(x, affine, residual if with_residual else None, **known)


def backward(kernels, activation, with_residual, x, affine, dy, residual):
    known = {
        "saved": residual if with_residual else None,
        "weights": None,
        "axis": (1,),
        "activation": activation,
    }
    sums = kernels.bwd_stats(x, dy, affine, **known, interpret=False)
    residual_dtype = x.dtype if with_residual else None
    stats_gradient = StatsGradient(affine.gain, affine.bias)
    return sums, kernels.bwd_apply(
        x,
        dy,
        affine,
        stats_gradient=stats_gradient,
        residual_dtype=residual_dtype,
        **known,
        interpret=False,
    )


def compiled(target, fn, shape, dtype, **options):
    """Compile fn(x, affine, dy, residual): a function above with its first arguments bound."""
    x, vector = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    # XLA gives up where a register of a Triton kernel is spilled.
    options["xla_gpu_fail_ptx_compilation_on_register_spilling"] = True
    with warnings.catch_warnings():
        # That the Triton backend is deprecated is silenced where the warning arises.
        warnings.simplefilter("error", DeprecationWarning)
        return targets.compile_for(
            target, fn, x, Affine(*[vector] * 3), x, x, compiler_options=options
        )


def passes(compiled, shape, dtype):
    """Bytes that the compiled function moves, in units of x."""
    return hlo.moved(hlo.operations(compiled.as_text())) / (
        np.prod(shape) * jnp.dtype(dtype).itemsize
    )


def launches(compiled, backend):
    """How many kernels of a backend the compiled function launches."""
    return compiled.as_text().count(f'custom_call_target="{CALLED[backend]}"')
