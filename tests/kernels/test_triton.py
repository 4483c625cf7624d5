"""The Triton kernels, compiled for GPUs that are not here.

They are compared with the oracle in test_contract.py.  What they have in common with the Mosaic GPU
kernels is in test_gpu_kernels.py, and what compiles for an H200 in test_gpu_compiles.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from gpu_functions import backward, compiled, forward, launches

from jbn.kernels import triton


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
        # All of x and dy are loaded in vectors of 16 bytes, and the per-channel vectors in float32.
        assert sum(".v4." in load for load in loads) >= 5, (name, loads)
        assert all(".b16" not in load for load in loads), (name, loads)


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize("fn", [forward, backward])
def test_compiles_for_a100_without_spills(fn):
    fn = functools.partial(fn, triton, jax.nn.relu, False)
    assert launches(compiled("a100", fn, (12544, 1024), jnp.bfloat16), "triton") == 2
