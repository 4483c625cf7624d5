"""Every implementation through the whole contract of kernels/seam.py, against the float64 oracle.

What is particular to one implementation has a file of its own beside this one.
"""

import functools
import inspect
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kernel_grid
import numpy as np
import oracle
import pytest
from gpu_functions import needs_interpreter
from kernel_grid import ACCURACY, MEANS, ROUNDING

from jbn.kernels import mosaic_gpu, mosaic_tpu, seam, triton, xla, xla_cpu, xla_gpu, xla_tpu
from jbn.kernels.seam import Affine, Device, StatsGradient

PALLAS = {"triton": triton, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
XLA_CPU = types.SimpleNamespace(
    fwd_stats=functools.partial(xla.fwd_stats, sums=xla_cpu.joint_sums),
    fwd_apply=xla.fwd_apply,
    bwd_stats=functools.partial(xla.bwd_stats, sums=xla_cpu.joint_sums),
    bwd_apply=xla.bwd_apply,
)
BACKENDS = {"xla": xla, "xla_cpu": XLA_CPU, "xla_gpu": xla_gpu, "xla_tpu": xla_tpu, **PALLAS}
DEVICES = {"mosaic_gpu": Device("NVIDIA H200", 132), "mosaic_tpu": Device("TPU v5e", 1)}
FUNCTIONS = (seam.FwdStats, seam.FwdApply, seam.BwdStats, seam.BwdApply)


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    activation: str | None
    with_residual: bool
    axis: int = -1

    @property
    def axes(self):
        return (self.axis % len(self.shape),)

    @property
    def function(self):
        return None if self.activation is None else getattr(jax.nn, self.activation)

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        extras = f"{self.activation or 'linear'}{'-residual' * self.with_residual}"
        return f"{shape}-{self.dtype}-{extras}" + f"-axis{self.axis}" * (self.axis != -1)


CASES = [
    Case((37, 24), "float32", None, True),
    Case((48, 16), "float32", "relu6", True),
    Case((5, 7, 6, 40), "bfloat16", "relu", True),
    Case((63, 64), "float32", "relu", False),
    Case((130, 8), "bfloat16", "silu", False),
    Case((64, 3), "float16", "gelu", True),
    Case((99, 80), "float32", "leaky_relu", True),
    Case((16, 320), "bfloat16", "relu6", False),
    Case((2, 1000), "float32", "silu", True),
    Case((3, 12, 200), "float16", "relu", True),
    Case((24,), "float32", "relu", True),
    Case((6, 8, 5, 3), "float32", "gelu", True, axis=1),
]


def _taken(cases, backends=tuple(BACKENDS)):
    """Every (backend, case) that the backend does not refuse."""
    marks = {"mosaic_gpu": needs_interpreter}
    return [
        pytest.param(backend, case, id=f"{backend}-{case}", marks=marks.get(backend, ()))
        for backend in backends
        for case in cases
        if backend not in PALLAS
        or not PALLAS[backend].unsupported(case.shape, jnp.dtype(case.dtype), case.axes)
    ]


class Inputs(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray
    dmean: np.ndarray
    dvar: np.ndarray


def _inputs(case):
    generator = np.random.default_rng(0)
    x, dy, residual = generator.standard_normal((3, *case.shape))
    vectors = generator.uniform(0.5, 1.5, (4, case.shape[case.axis])).astype(np.float32)
    arrays = [a.astype(jnp.dtype(case.dtype)) for a in (x + MEANS[case.dtype], dy, residual)]
    return Inputs(*arrays[:2], arrays[2] if case.with_residual else None, *vectors)


def _wide(vector, case):
    return seam.broadcastable(np.asarray(vector, np.float64), len(case.shape), case.axes)


def _close(name, got, want, size, rounding=0.0):
    """Within ACCURACY of the size of the terms, and of one or more roundings of the result."""
    error = np.abs(np.asarray(got, np.float64) - want) - rounding
    assert np.max(error) <= ACCURACY * np.max(size), (name, float(np.max(error)), np.max(size))


def _sums_close(names, got, terms, case):
    """Sums over the rows, which grow like random walks."""
    for name, sum_, term in zip(names, got, terms, strict=True):
        reduced = seam.reduced_axes(term.ndim, case.axes)
        _close(name, sum_, term.sum(reduced), np.sqrt(np.square(term).sum(reduced)))


@pytest.mark.parametrize(("backend", "case"), _taken(CASES))
def test_four_functions(backend, case):
    """Each function by itself, given the same vectors; jitted together, which is faster."""
    kernels, dtype, axis = BACKENDS[backend], jnp.dtype(case.dtype), case.axes
    x, dy, residual, scale, bias, slope, intercept = _inputs(case)
    m, as64 = oracle.moments(x, axis), functools.partial(np.asarray, dtype=np.float64)
    shift = m.mean.astype(np.float32)
    gain = scale / np.sqrt(oracle.variance(m) + 1e-2).astype(np.float32)
    affine = Affine(shift, gain, bias)
    stats_gradient = StatsGradient(slope, intercept) if case.with_residual else None

    linear = (as64(x) - _wide(shift, case)) * _wide(gain, case) + _wide(bias, case)
    z = linear + (0 if residual is None else as64(residual))
    rounding = ROUNDING[case.dtype]
    # XLA's fusions on GPU and TPU need the sum with a residual in x's dtype.
    narrow = case.with_residual and backend in ("xla_gpu", "xla_tpu")
    of_sum = rounding * (np.abs(linear) + np.abs(z)) if narrow else 0.0
    # Where z is zero up to rounding, relu may go either way: no cotangent comes from there.
    dy = np.where(np.abs(z) <= of_sum + 4 * ACCURACY * np.abs(z).max(), np.zeros_like(dy), dy)
    y, dz = oracle.activate(z, case.activation), as64(dy)
    dz = dz * oracle.activation_derivative(z, case.activation)
    saved = None
    if case.activation is not None and case.with_residual:
        saved = y.astype(dtype) if case.function in seam.SIGN_PRESERVING else residual

    @jax.jit
    def run(x, dy, residual, saved, affine, stats_gradient):
        static = {"axis": axis, "activation": case.function, "dtype": dtype}
        static |= {"residual_dtype": None if residual is None else dtype, "interpret": True}
        arguments = (
            seam.FwdStats(x, jnp.zeros_like(affine.shift), None),
            seam.FwdApply(x, affine, residual),
            seam.BwdStats(x, dy, affine, saved, None),
            seam.BwdApply(x, dy, affine, stats_gradient, saved, None),
        )
        names = lambda a: (*a.options, *(["interpret"] if backend in PALLAS else []))
        return [
            getattr(kernels, a.name)(**a._asdict(), **{name: static[name] for name in names(a)})
            for a in arguments
        ]

    stats, got_y, sums, (dx, dresidual) = run(x, dy, residual, saved, affine, stats_gradient)
    std = np.sqrt(oracle.variance(m)).max()
    np.testing.assert_array_equal(stats.count, m.count)
    _close("mean", as64(stats.shift) + as64(stats.offset), m.mean, max(std, ACCURACY))
    _close("m2", stats.m2, m.m2, m.m2)
    assert got_y.dtype == dtype
    _close("y", got_y, y, np.abs(z), rounding * np.abs(y) + of_sum)
    xc = as64(x) - _wide(shift, case)
    _sums_close(("sum dz", "sum dz * (x - shift)"), sums, (dz, dz * xc), case)
    want = terms = _wide(gain, case) * dz
    if stats_gradient is not None:
        want = want + _wide(intercept, case) + _wide(slope, case) * xc
    assert dx.dtype == dtype
    _close("dx", dx, want, np.abs(terms).max() + np.abs(want).max(), rounding * np.abs(want))
    assert (dresidual is None) == (residual is None)
    if dresidual is not None:
        assert dresidual.dtype == dtype
        _close("dresidual", dresidual, dz, np.abs(dz), rounding * np.abs(dz))


FUSED = [
    Case((5, 20, 64), "float32", "silu", True),
    Case((3, 37, 24), "float32", None, True),  # rows that fill no block
    Case((40, 512), "bfloat16", "relu", True),  # two programs
    Case((4, 8), "float16", "gelu", False),
]


@pytest.mark.parametrize(("backend", "case"), _taken(FUSED, tuple(DEVICES)))
def test_a_pass_in_one_kernel(backend, case):
    """y and the statistics; then dx with cotangents of mean and variance, and the sums."""
    kernels, x_axis = PALLAS[backend], case.axes
    x, dy, residual, scale, bias, dmean, dvar = _inputs(case)
    known = {"axis": x_axis, "activation": case.function, "device": DEVICES[backend]}
    known["interpret"] = True
    options = {"residual": residual, "activation": case.activation}
    z, _ = oracle.forward(x, scale, bias, residual=residual)
    dy = np.where(np.abs(z) <= 4 * ACCURACY * np.abs(z).max(), np.zeros_like(dy), dy)
    want_y, m = oracle.forward(x, scale, bias, **options)
    want = oracle.backward(x, dy, scale, bias, **options, dmean=dmean, dvar=dvar)
    rounding, var = ROUNDING[case.dtype], oracle.variance(m)

    forward = functools.partial(kernels.fwd_fused, dtype=x.dtype, **known)
    y, stats = jax.jit(forward)(x, scale, bias, residual, jnp.float32(1e-5))
    _close("y", y, want_y, np.abs(z), rounding * np.abs(want_y))
    mean = np.asarray(stats.shift, np.float64) + np.asarray(stats.offset, np.float64)
    _close("mean", mean, m.mean, np.sqrt(var))
    _close("m2", stats.m2, m.m2, m.m2)

    rstd = jnp.asarray(1 / np.sqrt(var + 1e-5), jnp.float32)
    affine = Affine(stats.shift, scale * rstd, bias - stats.offset * scale * rstd)
    saved = None
    if case.activation is not None and case.with_residual:
        saved = y if case.function in seam.SIGN_PRESERVING else residual
    residual_dtype = None if residual is None else residual.dtype
    vectors = {"offset": stats.offset, "rstd": rstd, "d_stats": (dmean, dvar), "saved": saved}
    backward = functools.partial(kernels.bwd_fused, residual_dtype=residual_dtype, **known)
    dx, dresidual, *sums = jax.jit(backward)(x, dy, affine, **vectors)
    size = np.abs(scale * np.asarray(rstd) * want.residual.max()).max() + np.abs(want.x).max()
    _close("dx", dx, want.x, size, rounding * np.abs(want.x))
    xs = np.asarray(x, np.float64) - _wide(stats.shift, case)
    terms = (want.residual, want.residual * xs)
    _sums_close(("sum dz", "sum dz * (x - shift)"), sums, terms, case)
    assert (dresidual is None) == (residual is None)
    if dresidual is not None:
        _close("dresidual", dresidual, want.residual, 1.0, rounding * np.abs(want.residual))


@pytest.mark.parametrize("backend", DEVICES)
def test_a_kernel_declines_what_does_not_fit(backend):
    kernels, v = PALLAS[backend], jax.ShapeDtypeStruct((512,), jnp.float32)
    x = jax.ShapeDtypeStruct((2**21, 512), jnp.bfloat16)
    known = {"axis": (1,), "activation": None, "device": DEVICES[backend], "interpret": False}
    forward = functools.partial(kernels.fwd_fused, dtype=x.dtype, **known)
    assert jax.eval_shape(forward, x, v, v, None, jnp.float32(1e-5)) is None
    backward = functools.partial(kernels.bwd_fused, saved=None, residual_dtype=None, **known)
    vectors = {"offset": v, "rstd": v, "d_stats": (v, v)}
    assert jax.eval_shape(backward, x, x, Affine(v, v, v), **vectors) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_arguments_are_named_as_the_seam_says(backend, function):
    parameters = inspect.signature(getattr(BACKENDS[backend], function.name)).parameters
    sums = ("sums",) if backend in ("xla", "xla_cpu") and function.reduces else ()
    extra = ("interpret",) if backend in PALLAS else sums
    assert tuple(parameters) == (*function._fields, *function.options, *extra)


@pytest.mark.parametrize("backend", PALLAS)
def test_unsupported_is_the_end_of_a_sentence_or_none(backend):
    kernels = PALLAS[backend]
    assert kernels.unsupported((64, 8), jnp.dtype("float32"), (1,)) is None
    for shape, dtype, axis, reason in [
        ((64, 8), "float64", (1,), "takes float32"),
        ((64, 8), "int32", (1,), "takes float32"),
        ((4, 8, 5), "float32", (1,), r"takes channels last, not axis (1,) of 3"),
        ((0, 8), "bfloat16", (1,), "has nothing to do on an empty array"),
        ((2**31, 2**31), "bfloat16", (1,), "numbers rows and channels in int32"),
    ]:
        assert kernels.unsupported(shape, np.dtype(jnp.dtype(dtype)), axis).startswith(reason)


@pytest.mark.parametrize(
    ("backend", "kind", "reason"),
    [
        ("triton", "Tesla V100-SXM2-16GB", "Ampere"),
        ("triton", "Tesla T4", "Ampere"),
        ("triton", "Quadro RTX 6000", "Ampere"),
        ("triton", "NVIDIA A100-SXM4-40GB", None),
        ("triton", "NVIDIA RTX A4000", None),
        ("triton", "NVIDIA H200", None),
        ("mosaic_gpu", "NVIDIA A100-SXM4-40GB", "Hopper"),
        ("mosaic_gpu", "NVIDIA L40S", "Hopper"),
        ("mosaic_gpu", "NVIDIA H200", None),
        ("mosaic_tpu", "TPU v5 lite", None),
    ],
)
def test_unsupported_device(backend, kind, reason):
    said = PALLAS[backend].unsupported_device(kind)
    assert said is None if reason is None else (reason in said and kind in said)


@pytest.mark.grid
@pytest.mark.parametrize("backend", PALLAS)
@pytest.mark.parametrize("case", kernel_grid.cases(), ids=str)
def test_layer(backend, case, monkeypatch):
    """Forward and backward by the public call: too many shapes for every run."""
    if PALLAS[backend].unsupported((case.rows, case.channels), jnp.dtype(case.dtype), (1,)):
        pytest.skip(f"{backend} does not take {case}")
    kernel_grid.speed_up(backend, case, monkeypatch)
    kernel_grid.check(f"{backend}/interpret", case)
