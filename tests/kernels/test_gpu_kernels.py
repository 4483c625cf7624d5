"""What the Triton and the Mosaic GPU kernels have in common: interpreted, and compiled."""

import functools
from typing import NamedTuple

import gpu_functions
import jax
import jax.numpy as jnp
import kernel_grid
import numpy as np
import oracle
import pytest
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

import jbn
from jbn.bench import targets
from jbn.kernels import mosaic_gpu, shared_gpu, triton
from jbn.kernels.seam import Affine

KERNELS = {"triton": triton, "mosaic_gpu": mosaic_gpu}

every_backend = pytest.mark.parametrize("backend", KERNELS)
_mosaic = functools.partial(pytest.param, "mosaic_gpu", marks=gpu_functions.needs_interpreter)
interpreted = pytest.mark.parametrize("backend", ["triton", _mosaic()])


@interpreted
def test_images(backend):
    kernel_grid.check(
        f"{backend}/interpret",
        kernel_grid.Case(24, 210, "bfloat16", "relu", True, True),
        (5, 7, 6, 24),
    )


def _stats(backend, x):
    """(mean, var, y) in float64, y by the kernel's own statistics."""
    known = {"axis": (1,), "interpret": True}
    stats = KERNELS[backend].fwd_stats(jnp.asarray(x), None, None, **known)
    gain = 1 / jnp.sqrt(stats.m2 / stats.count + 1e-5)
    affine = Affine(stats.shift, gain, -stats.offset * gain)
    y = KERNELS[backend].fwd_apply(
        jnp.asarray(x), affine, None, activation=None, dtype=x.dtype, **known
    )
    as64 = functools.partial(np.asarray, dtype=np.float64)
    return as64(stats.shift) + as64(stats.offset), as64(stats.m2) / as64(stats.count), as64(y)


@pytest.mark.parametrize(
    ("backend", "rows"), [("triton", 999), ("triton", 12544), _mosaic(1000), _mosaic(3136)]
)
def test_keeps_its_digits_at_a_large_mean(backend, rows):
    x = np.random.default_rng(0).normal(1e4, 1, (rows, 24)).astype(np.float32)
    (mean, var, y), m = _stats(backend, x), oracle.moments(x)
    np.testing.assert_allclose(var, oracle.variance(m), rtol=1e-6)
    np.testing.assert_allclose(
        mean, m.mean, rtol=0, atol=1e-6
    )  # a float32 alone holds this mean to 5e-4
    np.testing.assert_allclose(y, oracle.forward(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "rows"),
    [
        ("triton", 2**17),
        pytest.param("triton", 2**20, marks=pytest.mark.slow),
        _mosaic(2**17),
    ],
)
def test_zero_first_row_before_many_at_a_large_mean(backend, rows):
    x = np.random.default_rng(0).normal(1e4, 1, (rows, 1)).astype(np.float32)
    x[0] = 0
    np.testing.assert_allclose(_stats(backend, x)[1], oracle.variance(oracle.moments(x)), rtol=1e-5)


@interpreted
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_first_row_stays_in_its_channels(backend, bad):
    """Rows lie side by side in a tile, so that neighbours are other rows of the same channels."""
    x = np.random.default_rng(0).normal(100, 1, (256, 8)).astype(np.float32)
    x[0, :3] = bad
    mean, var, y = _stats(backend, x)
    assert not np.isfinite(mean[:3]).any()
    assert not np.isfinite(var[:3]).any()
    want = oracle.forward(x[:, 3:])[0]
    np.testing.assert_allclose(y[:, 3:], want, rtol=0, atol=1e-5)


@interpreted
def test_rows_beyond_the_end_count_for_nothing(backend):
    """Such rows read as x = 0: here that is z = -1e20, where the derivative of gelu is NaN.

    All rows that exist have z = 0, where the derivative is 1/2.
    """
    far, rows, channels = 1e20, 37, 64
    x = jnp.full((rows, channels), far, jnp.float32)
    dy = jnp.asarray(np.random.default_rng(0).normal(1, 1, x.shape), jnp.float32)
    vector = jnp.ones(channels, jnp.float32)
    affine = Affine(far * vector, vector, 0 * vector)
    sum_dz, sum_dz_x = KERNELS[backend].bwd_stats(
        x, dy, affine, saved=None, weights=None, axis=(1,), activation=jax.nn.gelu, interpret=True
    )
    np.testing.assert_allclose(sum_dz, 0.5 * np.asarray(dy, np.float64).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(sum_dz_x, 0)


@interpreted
def test_dtypes_of_each_array_are_their_own(backend):
    """x in bfloat16, y and dy in float32, the residual in float16.

    Each cotangent has the dtype of the array that it belongs to.
    """
    generator = np.random.default_rng(0)
    x = generator.standard_normal((96, 40)).astype(jnp.bfloat16)
    residual = generator.standard_normal(x.shape).astype(np.float16)
    dy = generator.standard_normal(x.shape).astype(np.float32)
    params, state = jbn.init(40)

    @jax.jit
    def run(x, residual, dy):
        known = {
            "activation": jax.nn.silu,
            "dtype": jnp.float32,
            "implementation": f"{backend}/interpret",
        }
        layer = lambda x, residual: jbn.batch_norm_train(
            x, params, state, residual=residual, **known
        )[0]
        y, pull = jax.vjp(layer, x, residual)
        return y, *pull(dy)

    y, dx, dresidual = run(x, residual, dy)
    want_y, _ = oracle.forward(x, residual=residual, activation="silu")
    want = oracle.backward(x, dy, residual=residual, activation="silu")
    assert (y.dtype, dx.dtype, dresidual.dtype) == (jnp.float32, jnp.bfloat16, jnp.float16)
    np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-5 * np.abs(want_y).max())
    for got, of, rounding in ((dx, want.x, 2.0**-8), (dresidual, want.residual, 2.0**-11)):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), of, rtol=rounding, atol=1e-5 * np.abs(of).max()
        )


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
        return jax.lax.scan(
            lambda sum, each: (sum + loss(each[0], params, each[1]), None), 0.0, (x, residual)
        )[0]

    return jax.grad(total)(params)


@interpreted
@pytest.mark.parametrize(
    "transformed", [_vmap, _vmap_twice, _grad_of_grad, _jvp_of_grad, _remat, _scan]
)
def test_transformations(backend, transformed):
    x, residual = np.random.default_rng(0).normal(3, 1, (2, 3, 16, 5, 8)).astype(np.float32)
    params = jbn.Params(jnp.linspace(0.5, 1.5, 8), jnp.linspace(-1, 1, 8))
    run = lambda name: jax.jit(functools.partial(transformed, functools.partial(_loss, name)))(
        x, params, residual
    )
    for got, want in zip(
        jax.tree.leaves(run(f"{backend}/interpret")), jax.tree.leaves(run("xla")), strict=True
    ):
        # Both round in float32, but add 80 terms in another order. Second derivatives multiply
        # such sums.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@interpreted
@pytest.mark.parametrize("jit", [False, True])
def test_named_vmap(backend, jit):
    """Each example alone, with statistics over the named axis; without jit, too."""
    x = np.random.default_rng(0).normal(3, 1, (3, 4, 16)).astype(np.float32)
    params, state = jbn.init(16)

    def layer(x):
        known = {"axis_name": "batch", "implementation": f"{backend}/interpret"}
        return jbn.batch_norm_train(x, params, state, **known)[0]

    mapped = jax.vmap(layer, axis_name="batch")
    y = (jax.jit(mapped) if jit else mapped)(x)
    want = oracle.forward(x.reshape(12, 16))[0].reshape(x.shape)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)


class _Product(NamedTuple):
    """A launch for `shared_gpu.launch_primitive`, of a kernel that is a product."""

    shapes: tuple
    interpret: bool
    batchable: bool

    def __call__(self, a, b):
        return [a * b]


@pytest.mark.parametrize("batchable", [True, False])
def test_vmap_of_a_launch_makes_one_or_a_loop(batchable):
    """A launch that is not batchable is never called with mapped operands."""
    lower = lambda context, launch, *operands: mlir.lower_fun(launch, True)(context, *operands)
    primitive = shared_gpu.launch_primitive(f"product_{batchable}", lower)
    launch = _Product(((5,),), False, batchable)
    product = lambda a, b: primitive.bind(a, b, launch=launch)[0]
    a, b = np.random.default_rng(0).standard_normal((2, 5, 3, 2)).astype(np.float32)
    mapped = jax.vmap(jax.vmap(product, (1, None)), (2, 1))
    want = np.einsum("nij,nj->jin", a, b[:, 0])
    np.testing.assert_allclose(jax.jit(mapped)(a, b[:, 0]), want, rtol=1e-6)
    assert (" scan[" in str(jax.make_jaxpr(mapped)(a, b[:, 0]))) is not batchable


@interpreted
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(backend, check_vma):
    """Results vary as x does, so the default check passes; statistics are the whole batch's."""
    generator = np.random.default_rng(0)
    x, residual, dy = generator.standard_normal((3, 32, 3, 8)).astype(np.float32)
    params, state = jbn.init(8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, same = PartitionSpec("data"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(same, data, data),
        out_specs=(data, same),
        check_vma=check_vma,
    )
    def layer(params, x, residual):
        known = {
            "activation": jax.nn.relu,
            "axis_name": "data",
            "implementation": f"{backend}/interpret",
        }
        return jbn.batch_norm_train(x, params, state, residual=residual, **known)

    @jax.jit
    def run(params, x, residual, dy):
        y, pull, _ = jax.vjp(layer, params, x, residual, has_aux=True)
        return y, pull(dy)

    y, (dparams, dx, _) = run(params, x, residual, dy)
    want = oracle.backward(x, dy, residual=residual, activation="relu")
    np.testing.assert_allclose(
        y, oracle.forward(x, residual=residual, activation="relu")[0], atol=1e-5
    )
    np.testing.assert_allclose(dx, want.x, atol=1e-5)
    np.testing.assert_allclose(dparams.bias, want.bias, atol=1e-4)


# What the kernels do not take.


@every_backend
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "reason"),
    [
        ((4, 3, 5), 1, jnp.float32, r"channels last, not axis \(1,\)"),
        ((4, 3), (0, 1), jnp.bfloat16, r"channels last, not axis \(0, 1\)"),
    ],
)
def test_unsupported_layouts_say_so(backend, shape, axis, dtype, reason):
    features = tuple(np.array(shape)[np.atleast_1d(axis)])
    with pytest.raises(
        NotImplementedError,
        match=rf"'{backend}/interpret' takes {reason}.*: use implementation=None",
    ):
        jbn.batch_norm_eval(
            jnp.ones(shape, dtype),
            *jbn.init(features),
            axis=axis,
            implementation=f"{backend}/interpret",
        )


@every_backend
@pytest.mark.x64
def test_float64_is_unsupported(backend):
    with pytest.raises(
        NotImplementedError, match="takes float32, bfloat16 and float16, not float64"
    ):
        jbn.batch_norm_eval(
            jnp.ones((4, 3), jnp.float64), *jbn.init(3), implementation=f"{backend}/interpret"
        )


# Compiled for an H200 that is not here.


@pytest.mark.aot("jax_cuda13_plugin")
@every_backend
@pytest.mark.parametrize(
    ("fn", "passes"), [(gpu_functions.forward, 3), (gpu_functions.backward, 5)]
)
def test_passes_over_memory(backend, fn, passes):
    shape, dtype = (128 * 28 * 28, 512), jnp.bfloat16
    compiled = gpu_functions.compiled(
        "h200", functools.partial(fn, KERNELS[backend], jax.nn.relu, False), shape, dtype
    )
    # Beside x: 12 bytes of partial results for every 512 rows or more, written, and read some four
    # times.
    assert passes <= gpu_functions.passes(compiled, shape, dtype) <= passes + 0.1


@pytest.mark.aot("jax_cuda13_plugin")
@every_backend
def test_vmap_compiles_for_h200(backend):
    """One launch of each kernel, the mapped axis in its grid."""
    params, state = jbn.init(64)

    def run(x):
        return jax.vmap(
            lambda x: jbn.batch_norm_train(x, params, state, implementation=backend)[0]
        )(x)

    compiled = targets.compile_for("h200", run, jax.ShapeDtypeStruct((3, 256, 64), jnp.bfloat16))
    assert gpu_functions.launches(compiled, backend) == 2
