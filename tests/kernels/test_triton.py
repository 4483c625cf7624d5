"""The Triton kernels: in interpret mode against the oracle, and compiled for GPUs that are not
here.

What they have in common with those of Mosaic: test_gpu_kernels.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import kernel_grid
import pytest
from gpu_functions import backward, both, compiled, forward, launches

from jbn.kernels import blocks, triton

LARGE = 1e7  # elements


@pytest.mark.parametrize("case", kernel_grid.parameters())
def test_equals_oracle(case, monkeypatch):
    if case.rows * case.channels > LARGE:
        # The interpreter copies whole arrays for every tile: 12544x2048 would take half an hour.
        # Larger tiles, the same walk.
        monkeypatch.setattr(blocks, "NUM_WARPS", 256)
    kernel_grid.check("triton/interpret", case)


# Compiled for GPUs that are not here.


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize("fn", [forward, backward])
def test_wide_loads(fn, tmp_path):
    dump = {"xla_dump_to": str(tmp_path), "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*"}
    compiled(
        "h200",
        functools.partial(fn, triton, jax.nn.relu, False),
        (128 * 28 * 28, 512),
        jnp.bfloat16,
        **dump,
    )
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    bodies = re.findall(r"\.entry (jbn_\w+)\((.*?)(?=\.entry|\Z)", ptx, re.S)
    assert len(bodies) == 2, [name for name, _ in bodies]
    for name, body in bodies:
        loads = re.findall(r"\bld\.global\.[.\w:]*", body)
        # All of x and dy in vectors of 16 bytes; nothing narrower is loaded than the per-channel
        # vectors.
        assert sum(".v4." in load for load in loads) >= 5, (name, loads)
        assert all(".b16" not in load for load in loads), (name, loads)


CASES = [
    (jnp.float32, (12544, 1024), jax.nn.gelu, True),
    (jnp.bfloat16, (12544, 80), jax.nn.silu, False),  # folded by 4
    (jnp.float16, (999, 77), jax.nn.leaky_relu, True),  # masked rows and columns
    (jnp.bfloat16, (10**7, 3), jax.nn.relu, True),
    (jnp.float32, (2, 1), None, True),
]


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize(("dtype", "shape", "activation", "with_residual"), CASES)
def test_compiles_for_h200_without_spills(dtype, shape, activation, with_residual):
    assert (
        launches(
            compiled(
                "h200", functools.partial(both, triton, activation, with_residual), shape, dtype
            ),
            "triton",
        )
        == 4
    )


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize("fn", [forward, backward])
def test_compiles_for_a100_without_spills(fn):
    fn = functools.partial(fn, triton, jax.nn.relu, False)
    assert launches(compiled("a100", fn, (12544, 1024), jnp.bfloat16), "triton") == 2
