"""The Mosaic GPU kernels: what they refuse, and how they are launched.

They are compared with the oracle in test_contract.py.  What they have in common with the Triton
kernels is in test_gpu_kernels.py, and what compiles for an H200 in test_gpu_compiles.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gpu_functions import launches, needs_interpreter, passes
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jbn
from jbn.bench import targets
from jbn.kernels import blocks, mosaic_gpu
from jbn.kernels.seam import Affine, Device

H200 = Device("NVIDIA H200", 132)
INTERPRET = "mosaic_gpu/interpret"


# What the kernels do not take.


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "reason"),
    [
        (
            (9, 7, 12),
            2,
            jnp.float32,
            "takes .* put together to multiples of 8 channels, not 63 rows of 12",
        ),
        (
            (4, 5, 3),
            2,
            jnp.bfloat16,
            "takes .* put together to multiples of 8 channels, not 20 rows of 3",
        ),
    ],
)
def test_unsupported_arrays_say_so(shape, axis, dtype, reason):
    features = tuple(np.array(shape)[np.atleast_1d(axis)])
    with pytest.raises(
        NotImplementedError, match=rf"'mosaic_gpu/interpret' {reason}.*: use implementation=None"
    ):
        jbn.batch_norm_eval(
            jnp.ones(shape, dtype), *jbn.init(features), axis=axis, implementation=INTERPRET
        )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 interprets the kernels")
def test_interpret_mode_needs_jax_0_11():
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu/interpret' needs JAX 0\.11"):
        jbn.batch_norm_eval(jnp.ones((4, 8)), *jbn.init(8), implementation=INTERPRET)


@needs_interpreter
def test_jit_over_devices():
    """XLA gathers x for the interpreter. In custom_partitioning the process ended by SIGSEGV."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(0).normal(3, 1, (128, 16)).astype(np.float32)
    layer = lambda x: jbn.batch_norm_train(x, *jbn.init(16), implementation=INTERPRET)[0]
    y = jax.jit(layer)(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(y, oracle.forward(x)[0], rtol=0, atol=1e-5)


@needs_interpreter
def test_interpreter_refuses_custom_partitioning():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, vector = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    stats = lambda x: tuple(mosaic_gpu.fwd_stats(x, None, None, axis=(1,), interpret=True))
    partitioned = custom_partitioning(stats)
    partitioned.def_partition(
        lambda mesh, operands, results: (mesh, stats, (vector,) * 4, (rows,)),
        sharding_rule="n c -> c, c, c, c",
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="cannot run in custom_partitioning"):
        jax.jit(partitioned)(jax.device_put(jnp.ones((128, 16)), rows))


# Forward and backward in one kernel each.


def _fwd_fused(activation, interpret, x, scale, bias, residual):
    known = {
        "axis": (x.ndim - 1,),
        "activation": activation,
        "dtype": x.dtype,
        "device": H200,
        "interpret": interpret,
    }
    return mosaic_gpu.fwd_fused(x, scale, bias, residual, jnp.float32(1e-5), **known)


def _bwd_fused(activation, residual_dtype, interpret, x, dy, affine, offset, rstd, d_stats, saved):
    known = {
        "axis": (x.ndim - 1,),
        "device": H200,
        "interpret": interpret,
        "residual_dtype": residual_dtype,
    }
    vectors = {"offset": offset, "rstd": rstd, "d_stats": d_stats}
    return mosaic_gpu.bwd_fused(
        x, dy, affine, saved=saved, activation=activation, **vectors, **known
    )


def _compiled_fused(activation, with_residual, shape, dtype):
    """Forward and backward for an H200."""
    x, v = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    residual = x if with_residual else None
    forward = functools.partial(_fwd_fused, activation, False)
    backward = functools.partial(_bwd_fused, activation, dtype if with_residual else None, False)
    return (
        targets.compile_for("h200", forward, x, v, v, residual),
        targets.compile_for("h200", backward, x, x, Affine(v, v, v), v, v, (v, v), residual),
    )


@pytest.mark.aot("jax_cuda13_plugin")
def test_fused_passes_over_memory():
    """x stays in shared memory; x and dy, twice as much, are read again from the cache."""
    shape, dtype = (12544, 1024), jnp.bfloat16
    for fused, reads_and_writes in zip(
        _compiled_fused(jax.nn.relu, False, shape, dtype), (2, 3), strict=True
    ):
        assert launches(fused, "mosaic_gpu") == 1
        assert reads_and_writes <= passes(fused, shape, dtype) <= reads_and_writes + 0.05


def test_vmap_launches_fused_kernels_one_by_one():
    """One launch for all would share one barrier counter, and its programs would not wait."""
    x, v = jnp.zeros((3, 1000, 64), jnp.float32), jnp.ones(64)
    forward = lambda x: _fwd_fused(None, False, x, v, v, None)
    affine = Affine(v, v, v)
    backward = lambda x: _bwd_fused(None, None, False, x, x, affine, v, v, (v, v), None)
    for fused in (forward, backward):
        if jax.__version_info__ < (0, 11):
            assert fused(x[0]) is None
            continue
        program = str(jax.make_jaxpr(jax.vmap(fused))(x))
        assert program.count("jbn_mosaic_gpu[") == 1
        assert program.index("scan[") < program.index("jbn_mosaic_gpu[")
        assert "_Batched" not in program
    tiles = blocks.resident(1000, 64, (4,), H200.cores - blocks.SM_MARGIN)
    assert tiles is not None
    assert tiles.num_chunks > 1, "without a barrier there would be nothing to test"


# Compiled for an H200 that is not here: test_gpu_compiles.py.


@pytest.mark.aot("jax_cuda13_plugin")
def test_a100_is_refused_before_lowering():
    x = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)
    layer = lambda x: jbn.batch_norm_train(x, *jbn.init(64), implementation="mosaic_gpu")[0]
    with pytest.raises(
        NotImplementedError,
        match=r"'mosaic_gpu' needs compute capability 9\.0 .*A100.*'triton' or None",
    ):
        targets.compile_for("a100", layer, x)
