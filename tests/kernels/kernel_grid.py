"""Many cases for a layer that runs on a kernel, and its comparison with the float64 oracle."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jbn
from jbn.kernels import blocks

CHANNELS = (1, 3, 8, 24, 64, 80, 96, 112, 192, 320, 1000, 1280, 2048)
ROWS = (2, 5, 63, 256, 1000, 12544)
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
# A mean at which the dtype still resolves a standard deviation of 1: one float32 ulp at 1e4 is
# 1e-3, one bfloat16 ulp at 10 is 2^-4.
MEANS = {"float32": 1e4, "bfloat16": 10.0, "float16": 100.0}
# Half an ulp, from rounding a result to x's dtype. For float32 results ACCURACY is all.
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ACCURACY = 1e-5  # relative to the size of the array; arithmetic is float32 for every dtype


class Case(NamedTuple):
    channels: int
    rows: int
    dtype: str
    activation: str | None
    with_residual: bool
    with_mean: bool  # x is about MEANS[dtype] rather than 0

    def __str__(self):
        extras = [
            self.activation or "linear",
            *["residual"] * self.with_residual,
            *["mean"] * self.with_mean,
        ]
        return f"{self.rows}x{self.channels}-{self.dtype}-{'-'.join(extras)}"


def pairwise() -> list[Case]:
    """Each (channels, rows) once, from small to large.

    The other fields are chosen such that every pair of values of two fields occurs.
    """
    uncovered = set()
    for pair in itertools.product(_OPTIONS, itertools.product(CHANNELS, ROWS)):
        uncovered |= _pairs(Case(*pair[1], *pair[0]))
    cases = []
    for channels, rows in sorted(itertools.product(CHANNELS, ROWS), key=np.prod):
        candidates = [Case(channels, rows, *option) for option in _OPTIONS]
        best = max(candidates, key=lambda case: len(_pairs(case) & uncovered))
        uncovered -= _pairs(best)
        cases.append(best)
    assert not uncovered, uncovered
    return cases


def cases() -> list[Case]:
    """The pairwise choice and a full grid of the commonest options, from small to large."""
    grid = itertools.product(
        CHANNELS, ROWS, ("float32", "bfloat16"), (None, "relu"), (False, True), (True,)
    )
    return sorted(
        {*itertools.starmap(Case, grid), *pairwise()},
        key=lambda case: (case.rows * case.channels, str(case)),
    )


def speed_up(backend: str, case: Case, monkeypatch) -> None:
    """Let fewer and larger tiles cover an array that the interpreter would take minutes for."""
    size = case.rows * case.channels
    if backend == "triton" and size > 1e7:
        # The interpreter copies whole arrays for every tile: 12544x2048 would take half an hour.
        monkeypatch.setattr(blocks, "NUM_WARPS", 256)
    if backend == "mosaic_gpu" and size > 2e4:
        # The interpreter takes about a millisecond for every access to memory, whatever its size;
        # with more registers than four warps have there are fewer accesses. One program takes all
        # rows of its columns, so it still has more tiles than slots for them. All tests of arrays
        # of such a size see these numbers, so none finds other functions in JAX's caches.
        monkeypatch.setattr(blocks, "NUM_WARPS", 64)
        monkeypatch.setattr(blocks, "RINGS_PER_SM", 0)


def check(implementation: str, case: Case, shape: tuple[int, ...] | None = None) -> None:
    """Compare forward and backward of `batch_norm_train` with the oracle.

    shape: of x, if it is not [rows, channels].
    """
    x, dy, residual, scale, bias = _inputs(case)
    known = {"activation": case.activation, "residual": residual}
    y, m = oracle.forward(x, scale, bias, **known)
    z, _ = oracle.forward(x, scale, bias, residual=residual)
    z_size = np.abs(z).max()
    # Where z is zero up to rounding, relu may go either way: no cotangent comes from there.
    dy = np.where(np.abs(z) <= 4 * ACCURACY * z_size, np.zeros_like(dy), dy)
    want = oracle.backward(x, dy, scale, bias, **known)

    got_y, state, got = _run(implementation, case, shape or x.shape, x, dy, residual, scale, bias)
    rounding = ROUNDING[case.dtype]
    var = oracle.variance(m)
    _close("y", got_y, y, rounding, z_size)
    _close("mean", state.mean, m.mean, 2.0**-23, np.sqrt(var).max())
    _close("var", state.var, var, ACCURACY, 0.0)
    # dx is a difference of terms of the size of gain * dz, which cancel where rows are few. The
    # sums grow like random walks.
    rstd = 1 / np.sqrt(var + 1e-5)
    _close("dx", got["x"], want.x, rounding, np.abs(scale * rstd * want.residual).max())
    xhat = (np.asarray(x, np.float64) - m.mean) * rstd
    _close(
        "dscale",
        got["scale"],
        want.scale,
        0.0,
        np.sqrt(np.square(want.residual * xhat).sum(0)).max(),
    )
    _close("dbias", got["bias"], want.bias, 0.0, np.sqrt(np.square(want.residual).sum(0)).max())
    if case.with_residual:
        _close("dresidual", got["residual"], want.residual, rounding, np.abs(want.residual).max())


_OPTIONS = tuple(itertools.product(MEANS, ACTIVATIONS, (False, True), (False, True)))


def _pairs(case):
    return set(itertools.combinations(zip(Case._fields, case, strict=True), 2))


def _inputs(case):
    generator = np.random.default_rng(abs(hash(case[:2])) % 2**32)
    size, dtype = (case.rows, case.channels), jnp.dtype(case.dtype)
    x = (generator.standard_normal(size) + MEANS[case.dtype] * case.with_mean).astype(dtype)
    dy = generator.standard_normal(size).astype(dtype)
    residual = generator.standard_normal(size).astype(dtype) if case.with_residual else None
    scale, bias = generator.uniform(0.5, 1.5, (2, case.channels)).astype(np.float32)
    return x, dy, residual, scale, bias


def _run(implementation, case, shape, x, dy, residual, scale, bias):
    state = jbn.State(jnp.zeros(case.channels), jnp.ones(case.channels), jnp.int32(0))
    activation = None if case.activation is None else getattr(jax.nn, case.activation)

    def layer(differentiable):
        return jbn.batch_norm_train(
            differentiable["x"],
            jbn.Params(differentiable["scale"], differentiable["bias"]),
            state,
            momentum=0.0,
            residual=differentiable["residual"],
            activation=activation,
            implementation=implementation,
        )

    with_shape = lambda a: None if a is None else jnp.asarray(a).reshape(shape)
    arguments = {
        "x": with_shape(x),
        "residual": with_shape(residual),
        "scale": jnp.asarray(scale),
        "bias": jnp.asarray(bias),
    }

    @jax.jit
    def forward_and_backward(arguments, dy):
        y, pull, state = jax.vjp(layer, arguments, has_aux=True)
        return y, state, pull(dy)[0]

    y, state, gradients = forward_and_backward(arguments, with_shape(dy))
    as_rows = lambda a: a if a is None or a.ndim == 1 else a.reshape(x.shape)
    return as_rows(y), state, {name: as_rows(a) for name, a in gradients.items()}


def _close(name, got, want, rounding, size):
    """|got - want| <= rounding * |want| + ACCURACY * size: the size of the terms of the result."""
    error = np.abs(np.asarray(got, np.float64) - want) - rounding * np.abs(want)
    worst = np.unravel_index(np.argmax(np.where(np.isfinite(error), error, np.inf)), error.shape)
    assert error[worst] <= ACCURACY * size, (
        f"{name}{list(map(int, worst))} is {float(np.asarray(got, np.float64)[worst])}, "
        f"the oracle says {want[worst]}: "
        f"{error[worst] / (size or 1):.2g} of its size {size:.3g} beyond rounding"
    )
