"""Whatever the GPU kernels accept compiles for an H200 without spilling registers.

Needs jax, the CUDA plugin, flax, pytest and hypothesis only, so that a small environment can run it
on another version of JAX.  One kernel is compiled per case.  Every channel count occurs once, and
with the other fields so that all pairs of their values occur.  Half of the cases are marked slow:
.ci/run compiles one half on the newest JAX, the other on an older one.  `-m grid` compiles each
channel count with each kernel in each dtype.
"""

import functools
import itertools
import random
import re
import zlib
from typing import NamedTuple

import gpu_functions
import jax
import jax.numpy as jnp
import pytest

from jbn.bench import targets
from jbn.kernels import mosaic_gpu, triton
from jbn.kernels.seam import Affine, Device

H200 = Device("NVIDIA H200", 132)

# Channel counts of the batch norms of each family.
NETWORKS = {
    "resnet": "64 128 256 512 1024 2048",
    "mobilenet_v2": "32 16 96 24 144 192 64 384 576 160 960 320 1280",
    "mobilenet_v3": "16 72 24 88 96 40 240 120 144 48 288 576 80 200 184 480 112 672 160 960 64",
    "efficientnet": "32 16 96 24 144 40 240 80 480 112 672 192 1152 320 1280 48 288 136 816 232 "
    "1392 384 2304 1536 56 336 160 960 272 1632 448 2688 1792 176 1056 304 1824 512 3072 2048 640 "
    "3840 2560",
    "regnet": "32 24 56 152 368 48 104 208 440 64 144 320 784 128 288 672 120 336 888 72 216 576 "
    "1512 96 192 432 1008 80 240 560 1360 720 1920 168 408 912 224 448 896 2016 1232 3024 232 696 "
    "1392 3712 256 512 2048 400 160 384 1344 2520",
    "densenet": " ".join(map(str, [*range(64, 1025, 32), *range(96, 2209, 48), 1280, 1664, 1920])),
}
# Of no network: few channels, ragged columns, and numbers that are no multiple of 8.
OTHERS = "1 3 8 12 77 616 1000"
CHANNELS = sorted({int(n) for text in (*NETWORKS.values(), OTHERS) for n in text.split()})
ROWS = (1, 49, 333, 1000, 12544)  # 49 images of 1x1, 333: odd
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = (None, "relu", "leaky_relu", "relu6", "silu", "gelu")
FOUR = ("fwd_stats", "fwd_apply", "bwd_stats", "bwd_apply")
KERNELS = (
    *(("mosaic_gpu", name) for name in (*FOUR, "fwd_fused", "bwd_fused")),
    *(("triton", name) for name in FOUR),
)
# Once refused by Mosaic: few columns and rows that are no multiple of 8; a lane with a whole row.
REFUSED = [(333, 64), (130, 24), (1000, 8), (99, 320), (777, 8), (49, 24), (49, 40), (63, 1000)]


class Case(NamedTuple):
    channels: int
    rows: int
    dtype: str
    activation: str | None
    with_residual: bool
    kernel: tuple[str, str]

    def __str__(self):
        extras = [self.activation or "linear", *["residual"] * self.with_residual]
        return (
            f"{'-'.join(self.kernel)}-{self.rows}x{self.channels}-{self.dtype}-{'-'.join(extras)}"
        )


_OTHER_FIELDS = tuple(itertools.product(ROWS, DTYPES, ACTIVATIONS, (False, True), KERNELS))


def _pairwise() -> list[Case]:
    """Every channel count once, and every pair of two values of the other fields."""
    pairs = lambda case: set(itertools.combinations(enumerate(case[1:]), 2))
    uncovered = set().union(*(pairs((None, *rest)) for rest in _OTHER_FIELDS))
    cases, choose = [], random.Random(0)
    channels = itertools.chain(CHANNELS, itertools.cycle([616, 1000]))
    while uncovered or len(cases) < len(CHANNELS):
        number = next(channels)
        candidates = (Case(number, *rest) for rest in choose.sample(_OTHER_FIELDS, 300))
        best = max(candidates, key=lambda case: len(pairs(case) & uncovered))
        uncovered -= pairs(best)
        cases.append(best)
    return cases


def _grid() -> list[Case]:
    """Every channel count with every kernel in every dtype; the other fields in turn."""
    rest = itertools.cycle(itertools.product(ROWS, ACTIVATIONS, (False, True)))
    return [
        Case(channels, rows, dtype, activation, with_residual, kernel)
        for (channels, dtype, kernel), (rows, activation, with_residual) in zip(
            itertools.product(CHANNELS, DTYPES, KERNELS), rest, strict=False
        )
    ]


def _once_refused() -> list[Case]:
    rest = itertools.cycle(itertools.product(("relu", "silu"), DTYPES[1:], (True, False)))
    mosaic = [kernel for kernel in KERNELS if kernel[0] == "mosaic_gpu"]
    return [
        Case(channels, rows, dtype, activation, with_residual, kernel)
        for ((rows, channels), kernel), (activation, dtype, with_residual) in zip(
            itertools.product(REFUSED, mosaic), rest, strict=False
        )
    ]


def _parameters():
    listed = dict.fromkeys((*_pairwise(), *_once_refused()))
    # Not every second one, which would leave half of the kernels out of _once_refused.
    is_slow = lambda case: zlib.crc32(str(case).encode()) % 2 == 1
    marked = [(case, [pytest.mark.slow] * is_slow(case)) for case in listed]
    marked += ((case, [pytest.mark.grid]) for case in _grid() if case not in listed)
    return [pytest.param(case, id=str(case), marks=marks) for case, marks in marked]


@pytest.mark.aot("jax_cuda13_plugin")
@pytest.mark.parametrize("case", _parameters())
def test_compiles_for_h200_without_spills(case, capfd, monkeypatch):
    backend, name = case.kernel
    kernels = {"mosaic_gpu": mosaic_gpu, "triton": triton}[backend]
    shape = (case.rows, case.channels)
    reason = kernels.unsupported(shape, jnp.dtype(case.dtype), (1,))
    if reason is not None:
        assert backend == "mosaic_gpu"
        assert case.channels % 8 != 0
        assert f"not {case.rows} rows of {case.channels}" in reason
        return
    fn = functools.partial(_call, kernels, name, case)
    x, vector = (
        jax.ShapeDtypeStruct(shape, case.dtype),
        jax.ShapeDtypeStruct(shape[1:], jnp.float32),
    )
    if name.endswith("fused") and jax.eval_shape(fn, x, vector) is None:
        if jax.__version_info__ >= (0, 11):
            _check_declined(case)
        return
    # Mosaic prints both. With MOSAIC_GPU_DUMP_TO it would also write, for seconds, its constraints.
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    compiled = targets.compile_for("h200", fn, x, vector, compiler_options=options)
    assert gpu_functions.launches(compiled, backend) == 1
    if backend == "mosaic_gpu":
        _check_mosaic_ptx(capfd.readouterr().out)


def _call(kernels, name, case, x, vector):
    """The kernel with x in place of all arrays, and one vector in place of all vectors."""
    residual = x if case.with_residual else None
    affine = Affine(vector, vector, vector)
    known = {"axis": (1,), "interpret": False}
    activation = None if case.activation is None else getattr(jax.nn, case.activation)
    backward = {"saved": residual, "residual_dtype": None if residual is None else x.dtype}
    match name:
        case "fwd_stats":
            return kernels.fwd_stats(x, None, None, **known)
        case "fwd_apply":
            known |= {"activation": activation, "dtype": x.dtype}
            return kernels.fwd_apply(x, affine, residual, **known)
        case "bwd_stats":
            known |= {"activation": activation, "saved": residual, "weights": None}
            return kernels.bwd_stats(x, x, affine, **known)
        case "bwd_apply":
            known |= {"activation": activation, "weights": None, "stats_gradient": affine[:2]}
            return kernels.bwd_apply(x, x, affine, **backward, **known)
        case "fwd_fused":
            known |= {"activation": activation, "dtype": x.dtype, "device": H200}
            return kernels.fwd_fused(x, vector, vector, residual, jnp.float32(1e-5), **known)
        case _:
            known |= {"activation": activation, "device": H200, "d_stats": (vector, vector)}
            return kernels.bwd_fused(x, x, affine, offset=vector, rstd=vector, **backward, **known)


def _check_declined(case):
    """A fused kernel declines only what is too large, or has more columns than programs."""
    arrays = 1 + case.with_residual + (case.kernel[1] == "bwd_fused")
    size = case.rows * case.channels * arrays * jnp.dtype(case.dtype).itemsize
    assert case.channels % 8 != 0 or size > 10 * 2**20, f"{size} bytes would have fitted"


def _check_mosaic_ptx(printed):
    """By the PTX and by what ptxas reports of it."""
    ptx, report = printed[printed.index(".version") :].split("ptxas info", 1)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    # All large arrays are copied by TMA, and read from shared memory by 16 bytes a lane.
    assert "cp.async.bulk" in ptx
    assert "ld.shared.v4.b32" in ptx
    assert not re.search(r"\bld\.(global|shared)\.[bu](8|16)\b", ptx)


def test_selection_has_every_channel_count_and_every_pair():
    marked = [(p.values[0], {mark.name for mark in p.marks}) for p in _parameters()]
    cases = [case for case, marks in marked if "grid" not in marks]
    assert {case.channels for case in cases} == set(CHANNELS)
    values = ROWS, DTYPES, ACTIVATIONS, (False, True), KERNELS
    for (i, one), (j, other) in itertools.combinations(enumerate(values, 1), 2):
        assert {(case[i], case[j]) for case in cases} >= set(itertools.product(one, other))
    for half in (set(), {"slow"}):
        cases = [case for case, marks in marked if marks == half]
        assert len({(case.rows, case.channels) for case in cases}) >= 60
        for i, every in enumerate(values, 1):
            assert {case[i] for case in cases} >= set(every)
