"""The Mosaic GPU kernels: in interpret mode against the oracle, and compiled for an H200 that is not here."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_grid
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

import jbn
from jbn.bench import hlo, targets
from jbn.kernels import mosaic_gpu
from jbn.kernels.seam import Affine, Device, Pull

DEFAULT_SIZE = 1e3  # elements
H200 = Device("NVIDIA H200", 132)
INTERPRET = "mosaic_gpu/interpret"
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 has no interpreter for the copies of Mosaic GPU"
)


def _cases():
    """Those of all kernels whose rows can be put together to 16 bytes; the larger, of several seconds each, under -m grid."""
    cases = []
    for parameter in kernel_grid.parameters():
        (case,) = parameter.values
        if mosaic_gpu.unsupported((case.rows, case.channels), jnp.dtype(case.dtype), (1,)) is None:
            small = case.rows * case.channels <= DEFAULT_SIZE
            cases.append(pytest.param(case, id=str(case), marks=parameter.marks if small else pytest.mark.grid))
    return cases


@needs_interpreter
@pytest.mark.parametrize("case", _cases())
def test_equals_oracle(case):
    kernel_grid.check(INTERPRET, case)


@needs_interpreter
def test_images():
    kernel_grid.check(INTERPRET, kernel_grid.Case(24, 210, "bfloat16", "relu", True, True), (5, 7, 6, 24))


def _stats(x):
    """(mean, var, y) in float64, y by the kernel's own statistics."""
    stats = mosaic_gpu.fwd_stats(jnp.asarray(x), None, None, axis=(1,), interpret=True)
    gain = 1 / jnp.sqrt(stats.m2 / stats.count + 1e-5)
    affine = Affine(stats.shift, stats.offset, gain, jnp.zeros_like(gain))
    y = mosaic_gpu.fwd_apply(jnp.asarray(x), affine, None, axis=(1,), activation=None, dtype=x.dtype, interpret=True)
    as64 = functools.partial(np.asarray, dtype=np.float64)
    return as64(stats.shift) + as64(stats.offset), as64(stats.m2) / as64(stats.count), as64(y)


@needs_interpreter
@pytest.mark.parametrize("rows", [1000, 3136])
def test_keeps_its_digits_at_a_large_mean(rows):
    x = np.random.default_rng(0).normal(1e4, 1, (rows, 24)).astype(np.float32)
    (mean, var, y), m = _stats(x), oracle.moments(x)
    np.testing.assert_allclose(var, oracle.variance(m), rtol=1e-6)
    np.testing.assert_allclose(mean, m.mean, rtol=0, atol=1e-6)  # a float32 alone holds this mean to 5e-4
    np.testing.assert_allclose(y, oracle.forward(x)[0], rtol=0, atol=1e-5)


@needs_interpreter
def test_zero_first_row_before_many_at_a_large_mean():
    x = np.random.default_rng(0).normal(1e4, 1, (2**17, 1)).astype(np.float32)
    x[0] = 0
    np.testing.assert_allclose(_stats(x)[1], oracle.variance(oracle.moments(x)), rtol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_first_row_stays_in_its_channels(bad):
    """Folded by 8 rows, so that neighbours in memory are other rows of the same channels."""
    x = np.random.default_rng(0).normal(100, 1, (256, 8)).astype(np.float32)
    x[0, :3] = bad
    mean, var, y = _stats(x)
    assert not np.isfinite(mean[:3]).any()
    assert not np.isfinite(var[:3]).any()
    want = oracle.forward(x[:, 3:])[0]
    np.testing.assert_allclose(y[:, 3:], want, rtol=0, atol=1e-5)


@needs_interpreter
def test_dtypes_of_each_array_are_their_own():
    """x in bfloat16, y and dy in float32, the residual in float16; each cotangent in the dtype of what it belongs to."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((96, 40)).astype(jnp.bfloat16)
    residual = generator.standard_normal(x.shape).astype(np.float16)
    dy = generator.standard_normal(x.shape).astype(np.float32)
    params, state = jbn.init(40)

    @jax.jit
    def run(x, residual, dy):
        known = {"activation": jax.nn.silu, "dtype": jnp.float32, "implementation": INTERPRET}
        layer = lambda x, residual: jbn.batch_norm_train(x, params, state, residual=residual, **known)[0]
        y, pull = jax.vjp(layer, x, residual)
        return y, *pull(dy)

    y, dx, dresidual = run(x, residual, dy)
    want_y, _ = oracle.forward(x, residual=residual, activation="silu")
    want = oracle.backward(x, dy, residual=residual, activation="silu")
    assert (y.dtype, dx.dtype, dresidual.dtype) == (jnp.float32, jnp.bfloat16, jnp.float16)
    np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-5 * np.abs(want_y).max())
    for got, of, rounding in ((dx, want.x, 2.0**-8), (dresidual, want.residual, 2.0**-11)):
        np.testing.assert_allclose(np.asarray(got, np.float64), of, rtol=rounding, atol=1e-5 * np.abs(of).max())


# Transformations: what the kernels give under each is what XLA's own implementation gives.


def _loss(implementation, x, params, residual):
    _, state = jbn.init(8)
    known = {"activation": jax.nn.silu, "eps": 1e-2, "implementation": implementation}
    y, state = jbn.batch_norm_train(x, params, state, residual=residual, **known)
    return (y**3).sum() + 3 * state.var.sum()


def _vmap(loss, *arguments):
    return jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0))(*arguments)


def _vmap_twice(loss, x, params, residual):
    return jax.vmap(jax.vmap(loss, (1, None, 1)), (0, None, 0))(x, params, residual)


def _grad_of_grad(loss, x, params, residual):
    return jax.grad(lambda x: (jax.grad(loss)(x, params, residual[0]) ** 2).sum())(x[0])


def _jvp_of_grad(loss, x, params, residual):
    return jax.jvp(lambda x: jax.grad(loss)(x, params, residual[0]), (x[0],), (x[1],))


def _remat(loss, x, params, residual):
    return jax.grad(jax.checkpoint(loss), (0, 1, 2))(x[0], params, residual[0])


def _scan(loss, x, params, residual):
    def total(params):
        return jax.lax.scan(lambda sum, each: (sum + loss(each[0], params, each[1]), None), 0.0, (x, residual))[0]

    return jax.grad(total)(params)


@needs_interpreter
@pytest.mark.parametrize("transformed", [_vmap, _vmap_twice, _grad_of_grad, _jvp_of_grad, _remat, _scan])
def test_transformations(transformed):
    x, residual = np.random.default_rng(0).normal(3, 1, (2, 3, 16, 5, 8)).astype(np.float32)
    params = jbn.Params(jnp.linspace(0.5, 1.5, 8), jnp.linspace(-1, 1, 8))
    run = lambda name: jax.jit(functools.partial(transformed, functools.partial(_loss, name)))(x, params, residual)
    for got, want in zip(jax.tree.leaves(run(INTERPRET)), jax.tree.leaves(run("xla")), strict=True):
        # Both round in float32, sums of 80 terms in another order; second derivatives multiply such sums.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@needs_interpreter
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Results vary as x does, so that the default check passes; statistics and gradients are the whole batch's."""
    generator = np.random.default_rng(0)
    x, residual, dy = generator.standard_normal((3, 32, 3, 8)).astype(np.float32)
    params, state = jbn.init(8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, same = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(same, data, data), out_specs=(data, same), check_vma=check_vma)
    def layer(params, x, residual):
        known = {"activation": jax.nn.relu, "axis_name": "data", "implementation": INTERPRET}
        return jbn.batch_norm_train(x, params, state, residual=residual, **known)

    @jax.jit
    def run(params, x, residual, dy):
        y, pull, _ = jax.vjp(layer, params, x, residual, has_aux=True)
        return y, pull(dy)

    y, (dparams, dx, _) = run(params, x, residual, dy)
    want = oracle.backward(x, dy, residual=residual, activation="relu")
    np.testing.assert_allclose(y, oracle.forward(x, residual=residual, activation="relu")[0], atol=1e-5)
    np.testing.assert_allclose(dx, want.x, atol=1e-5)
    np.testing.assert_allclose(dparams.bias, want.bias, atol=1e-4)


# What the kernels do not take.


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "reason"),
    [
        ((4, 3, 5), 1, jnp.float32, r"takes channels last, not axis \(1,\)"),
        ((4, 3), (0, 1), jnp.bfloat16, r"takes channels last, not axis \(0, 1\)"),
        ((9, 7, 12), 2, jnp.float32, "takes .* put together to multiples of 8 channels, not 63 rows of 12"),
        ((4, 5, 3), 2, jnp.bfloat16, "takes .* put together to multiples of 8 channels, not 20 rows of 3"),
    ],
)
def test_unsupported_arrays_say_so(shape, axis, dtype, reason):
    features = tuple(np.array(shape)[np.atleast_1d(axis)])
    with pytest.raises(NotImplementedError, match=rf"'mosaic_gpu/interpret' {reason}.*: use implementation=None"):
        jbn.batch_norm_eval(jnp.ones(shape, dtype), *jbn.init(features), axis=axis, implementation=INTERPRET)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 interprets the kernels")
def test_interpret_mode_needs_jax_0_11():
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu/interpret' needs JAX 0\.11"):
        jbn.batch_norm_eval(jnp.ones((4, 8)), *jbn.init(8), implementation=INTERPRET)


# Compiled for an H200 that is not here.


def _forward(activation, with_residual, x, affine, dy, residual):
    stats = mosaic_gpu.fwd_stats(x, None, None, axis=(1,), interpret=False)
    known = {"axis": (1,), "activation": activation, "dtype": x.dtype, "interpret": False}
    return stats, mosaic_gpu.fwd_apply(x, affine, residual if with_residual else None, **known)


def _backward(activation, with_residual, x, affine, dy, residual):
    known = {"saved": residual if with_residual else None, "weights": None, "axis": (1,), "activation": activation}
    sums = mosaic_gpu.bwd_stats(x, dy, affine, **known, interpret=False)
    residual_dtype = x.dtype if with_residual else None
    pull = Pull(affine.gain, affine.bias)
    return sums, mosaic_gpu.bwd_apply(x, dy, affine, pull=pull, residual_dtype=residual_dtype, **known, interpret=False)


def _compile(fn, activation, with_residual, shape, dtype):
    x, vector = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return targets.compile_for("h200", functools.partial(fn, activation, with_residual), x, Affine(*[vector] * 4), x, x)


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize(("fn", "passes"), [(_forward, 3), (_backward, 5)])
def test_passes_over_memory(fn, passes):
    shape = (128 * 28 * 28, 512)
    moved = hlo.moved(hlo.operations(_compile(fn, jax.nn.relu, False, shape, jnp.bfloat16).as_text()))
    # Beside x: 12 bytes of partial results for every 768 rows, written, and read some four times.
    assert passes <= moved / (np.prod(shape) * 2) <= passes + 0.1


CASES = [
    (jnp.float32, (12544, 1024), jax.nn.gelu, True),
    (jnp.bfloat16, (12544, 80), jax.nn.silu, False),  # folded by 16
    (jnp.float16, (1000, 77), jax.nn.leaky_relu, True),  # masked rows and columns
    (jnp.float32, (1, 8), None, True),
]


@pytest.mark.aot("jax_cuda13_plugin")
def test_compiles_for_h200_without_spills(tmp_path):
    """By the reports and the PTX that Mosaic writes where a variable says so, read once: in a process of its own."""
    environment = {**os.environ, "MOSAIC_GPU_DUMP_TO": str(tmp_path), "PYTHONPATH": os.path.dirname(__file__)}
    code = "import test_mosaic_gpu; test_mosaic_gpu.compile_cases()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == 4 * len(CASES)
    for report in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    for path in tmp_path.glob("*.ptx"):
        ptx = path.read_text()
        # Everything full-size comes by TMA, and from shared memory by 16 bytes a lane.
        assert "cp.async.bulk" in ptx, path.name
        assert "ld.shared.v4.b32" in ptx, path.name
        assert not re.search(r"\bld\.(global|shared)\.[bu](8|16)\b", ptx), path.name


def compile_cases():
    both = lambda *arguments: (_forward(*arguments), _backward(*arguments))
    for dtype, shape, activation, with_residual in CASES:
        text = _compile(both, activation, with_residual, shape, dtype).as_text()
        assert text.count('custom_call_target="mosaic_gpu_v2"') == 4


@pytest.mark.aot("jax_cuda13_plugin")
def test_a100_is_refused_before_lowering():
    x = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)
    layer = lambda x: jbn.batch_norm_train(x, *jbn.init(64), implementation="mosaic_gpu")[0]
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' needs compute capability 9\.0 .*A100.*'triton' or None"):
        targets.compile_for("a100", layer, x)


@pytest.mark.aot("jax_cuda13_plugin")
def test_vmap_compiles_for_h200():
    """One launch of each kernel, the mapped axis in its grid."""
    params, state = jbn.init(64)

    def run(x):
        return jax.vmap(lambda x: jbn.batch_norm_train(x, params, state, implementation="mosaic_gpu")[0])(x)

    text = targets.compile_for("h200", run, jax.ShapeDtypeStruct((3, 256, 64), jnp.bfloat16)).as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2


# Forward and backward in one kernel each.


def _fwd_fused(activation, interpret, x, scale, bias, residual):
    known = {"axis": (x.ndim - 1,), "activation": activation, "dtype": x.dtype, "device": H200, "interpret": interpret}
    return mosaic_gpu.fwd_fused(x, scale, bias, residual, jnp.float32(1e-5), **known)


def _bwd_fused(activation, residual_dtype, interpret, x, dy, affine, rstd, d_stats, saved):
    known = {"axis": (x.ndim - 1,), "device": H200, "interpret": interpret, "residual_dtype": residual_dtype}
    return mosaic_gpu.bwd_fused(x, dy, affine, rstd=rstd, d_stats=d_stats, saved=saved, activation=activation, **known)


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "with_residual"),
    [
        ((5, 20, 64), "float32", "silu", True),
        ((3, 37, 24), "float32", None, True),  # masked rows
        ((200, 512), "bfloat16", "relu", False),  # two programs
        ((4, 8), "float16", "gelu", False),
    ],
)
def test_fused_equals_oracle(shape, dtype, activation, with_residual):
    """One program for each tile of columns: the interpreter knows no barrier across a grid."""
    generator = np.random.default_rng(0)
    case = kernel_grid.Case(shape[-1], 0, dtype, activation, with_residual, True)
    x = (generator.standard_normal(shape) + kernel_grid.MEANS[dtype]).astype(jnp.dtype(dtype))
    dy = generator.standard_normal(shape).astype(x.dtype)
    residual = generator.standard_normal(shape).astype(x.dtype) if with_residual else None
    scale, bias, dmean, dvar = generator.uniform(0.5, 1.5, (4, shape[-1])).astype(np.float32)
    fn = None if activation is None else getattr(jax.nn, activation)
    y, stats = jax.jit(functools.partial(_fwd_fused, fn, True))(x, scale, bias, residual)
    known = {"residual": residual, "activation": activation}
    m = oracle.moments(x)
    rounding = kernel_grid.ROUNDING[case.dtype]
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias, **known)[0], rtol=rounding, atol=2e-5)
    np.testing.assert_allclose(stats.m2 / stats.count, oracle.variance(m), rtol=1e-5)
    rstd = 1 / np.sqrt(stats.m2 / stats.count + 1e-5)
    affine = Affine(stats.shift, stats.offset, scale * rstd, bias)
    run = jax.jit(functools.partial(_bwd_fused, fn, residual.dtype if with_residual else None, True))
    dx, dresidual, sum_dz, sum_dz_xc = run(x, dy, affine, rstd, (dmean, dvar), residual)
    want = oracle.backward(x, dy, scale, bias, **known)
    xc = np.asarray(x, np.float64) - m.mean
    want_dx = want.x + (dmean + 2 * dvar * xc) / m.count
    np.testing.assert_allclose(np.asarray(dx, np.float64), want_dx, rtol=rounding, atol=5e-5)
    np.testing.assert_allclose(sum_dz, want.bias, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sum_dz_xc * rstd, want.scale, rtol=1e-5, atol=1e-4)
    if with_residual:
        np.testing.assert_allclose(np.asarray(dresidual, np.float64), want.residual, rtol=rounding, atol=1e-5)


@pytest.mark.aot("jax_cuda13_plugin")
def test_fused_passes_over_memory():
    """x stays in shared memory; x and dy, twice as much, are read again from the cache, within one launch."""
    shape = (12544, 1024)
    x, v = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    forward = targets.compile_for("h200", functools.partial(_fwd_fused, jax.nn.relu, False), x, v, v, None)
    backward = functools.partial(_bwd_fused, jax.nn.relu, None, False)
    backward = targets.compile_for("h200", backward, x, x, Affine(*[v] * 4), v, (v, v), None)
    for compiled, passes in ((forward, 2), (backward, 3)):
        assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1
        moved = hlo.moved(hlo.operations(compiled.as_text()))
        assert passes <= moved / (np.prod(shape) * 2) <= passes + 0.05


def test_fused_leaves_to_others_what_does_not_fit():
    x, v = jnp.zeros((2**17, 512), jnp.bfloat16), jnp.ones(512)
    assert _fwd_fused(None, False, x, v, v, None) is None
    assert _bwd_fused(None, None, False, x, x, Affine(v, v, v, v), v, (v, v), None) is None
