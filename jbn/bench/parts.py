"""What `python -m jbn.bench device` measures: parts, each a list of items that run in one process.

`python -m jbn.bench.parts NAME FIRST FILE` runs the items of a part from number FIRST on.  For each
it appends to FILE a line before, its rows, and a line after, so that whoever started it sees which
item hangs or takes the process down.
"""

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn.bench import cases, kernel_checks, model, op, peer_layers, peers, report, timing
from jbn.kernels.backends import PLATFORMS

Rows = list[dict[str, Any]]


class Item(NamedTuple):
    label: str
    run: Callable[[], Rows]


class Scale(NamedTuple):
    """How large the problems are: by platform, so that the same command runs on a laptop."""

    shapes: tuple[tuple[int, int], ...]  # [rows, channels]
    rounds: int
    repeats: int  # of the fused kernel's barrier


ACCELERATOR = Scale(
    ((401408, 256), (100352, 512), (25088, 1024), (6272, 2048), (401408, 64), (100352, 112)),
    7,
    1000,
)
HOST = Scale(((6272, 64), (1568, 112)), 3, 10)


def items(part: str, *, backend: str) -> Iterator[Item]:
    """The items of a part, the most important first.

    Args:
        part: "copy", "xla", "model", "op", or "correctness", "speed", "sweep", "barrier" and a
            space and an implementation.
        backend: `jax.default_backend()`.
    """
    name, _, implementation = part.partition(" ")
    scale = HOST if backend == "cpu" else ACCELERATOR
    make = {
        "copy": _copy,
        "xla": _xla,
        "correctness": _correctness,
        "speed": _speed,
        "sweep": _sweep,
        "barrier": _barrier,
        "op": _op,
        "model": _model,
    }[name]
    yield from make(scale, implementation) if implementation else make(scale)


def names(backend: str) -> list[str]:
    """The parts for a platform, the most important first."""
    kernels = implementations(backend)
    checked = kernels or ["xla"]
    found = [
        "copy",
        *(f"correctness {name}" for name in checked),
        *(f"speed {name}" for name in ["xla", *kernels]),
    ]
    found += ["op", "model", "xla"]
    found += [
        f"barrier {name}" for name in kernels if hasattr(kernel_checks.module(name), "fwd_fused")
    ]
    return found + [f"sweep {name}" for name in kernels if name in kernel_checks.SWEEPS]


def implementations(backend: str) -> list[str]:
    """The kernels that run on a platform and are there."""
    platform = "cuda" if backend == "gpu" else backend
    named = [name for name, platforms in PLATFORMS.items() if platform in platforms]
    return [name for name in named if importlib.util.find_spec(f"jbn.kernels.{name}")]


def _time(name, run, scale):
    """Samples of a jitted function called `name`, by the device's clock where there is one."""
    clock = "host" if jax.default_backend() == "cpu" else "profile"
    contestant = timing.Contestant(name, run, jax.block_until_ready, clock, name)
    return timing.measure([contestant], rounds=scale.rounds, seconds=0.002)[name]


def _row(samples, moved, **facts):
    q1, median, q3 = samples.quartiles
    times = {"median_ms": 1e3 * median, "q1_ms": 1e3 * q1, "q3_ms": 1e3 * q3}
    return {
        **facts,
        **times,
        "GB_per_s": moved / median / 1e9,
        "clock": samples.clock,
        "rounds": len(samples.seconds),
    }


def _copy(scale):
    """The bandwidth of a copy, which nothing else can exceed."""
    for megabytes in (16, 64, 256, 1024) if scale is ACCELERATOR else (4, 16):
        for dtype in cases.DTYPES:
            yield Item(
                f"{megabytes} MB {dtype}", functools.partial(_copy_rows, scale, megabytes, dtype)
            )


def _copy_rows(scale, megabytes, dtype):
    size = megabytes * 10**6 // jnp.dtype(dtype).itemsize // 512
    problem = cases.Problem(cases.Case("copy", (size, 512)), "bn", "eval", dtype)
    samples = _time("copy", peers.copy(problem, 2), scale)
    return [_row(samples, 2 * problem.nbytes, case=f"copy {megabytes} MB", dtype=dtype)]


def _xla(scale):
    """What XLA's own fusions reach: sums over rows, and an elementwise pass."""
    functions = {
        "xla_sum": (lambda x, v: x.astype(jnp.float32).sum(0), 1),
        "xla_affine": (lambda x, v: jax.nn.relu(x * v[None] + v[None]), 2),
    }
    for rows, channels in scale.shapes:
        for dtype in cases.DTYPES:
            for name, (fn, passes) in functions.items():
                run = functools.partial(_xla_rows, scale, name, fn, passes, rows, channels, dtype)
                yield Item(f"{name} {rows}x{channels} {dtype}", run)


def _xla_rows(scale, name, fn, passes, rows, channels, dtype):
    x, v = jnp.ones((rows, channels), dtype), jnp.ones((channels,), dtype)
    compiled = peers.jit_as(name, fn)
    samples = _time(name, lambda i: compiled(x, v), scale)
    return [_row(samples, passes * x.nbytes, case=f"{name} {rows}x{channels}", dtype=dtype)]


def _correctness(scale, implementation):
    """Each function against float64, with and without a residual."""
    for rows, channels in scale.shapes:
        # The oracle is computed on the host: a tenth of the rows is enough to see a wrong index.
        for dtype in cases.DTYPES:
            for name in kernel_checks.PASSES:
                for with_residual in (False, True) if name != "fwd_stats" else (False,):
                    run = functools.partial(
                        _check,
                        implementation,
                        name,
                        max(63, rows // 10),
                        channels,
                        dtype,
                        with_residual,
                    )
                    yield Item(
                        f"{name} {rows}x{channels} {dtype}{' +residual' * with_residual}", run
                    )


def _check(implementation, name, rows, channels, dtype, with_residual):
    inputs = kernel_checks.inputs(rows, channels, dtype, with_residual=with_residual)
    worst = kernel_checks.error(
        name, inputs, jax.jit(kernel_checks.function(implementation, name))(inputs)
    )
    allowed = kernel_checks.tolerance(name, dtype)
    case = f"{name} {rows}x{channels}{' +residual' * with_residual}"
    facts = {"case": case, "dtype": dtype, "implementation": implementation}
    return [{**facts, "error": worst, "allowed": allowed, "ok": worst <= allowed}]


def _speed(scale, implementation):
    """Each function on each shape; bytes are those it cannot do without."""
    for rows, channels in scale.shapes:
        for dtype in reversed(cases.DTYPES):
            for name in kernel_checks.PASSES:
                run = functools.partial(
                    _speed_rows, scale, implementation, name, rows, channels, dtype
                )
                yield Item(f"{name} {rows}x{channels} {dtype}", run)


def _speed_rows(scale, implementation, name, rows, channels, dtype, **facts):
    # Several sets, so that none is found in the cache.
    sets = [
        kernel_checks.inputs(rows, channels, dtype, with_residual=False)
        for _ in range(1 if scale is HOST else 4)
    ]
    fn = kernel_checks.function(implementation, name)
    compiled = jax.jit(fn)
    samples = _time(fn.__name__, lambda i: compiled(sets[i % len(sets)]), scale)
    facts = {
        "case": f"{name} {rows}x{channels}",
        "dtype": dtype,
        "implementation": implementation,
        **facts,
    }
    return [_row(samples, kernel_checks.PASSES[name] * sets[0].x.nbytes, **facts)]


def _sweep(scale, implementation):
    """Each constant of the block choices at other values, one at a time, on two shapes."""
    where, constants = kernel_checks.SWEEPS[implementation]
    for constant, values in {"": ("as it is",), **constants}.items():
        for value in values:
            for rows, channels in (scale.shapes[0], scale.shapes[3]):
                for name in kernel_checks.PASSES:
                    run = functools.partial(
                        _sweep_rows,
                        scale,
                        implementation,
                        name,
                        rows,
                        channels,
                        where,
                        constant,
                        value,
                    )
                    yield Item(f"{constant} {value} {name} {rows}x{channels}", run)


def _sweep_rows(scale, implementation, name, rows, channels, where, constant, value):
    blocks = importlib.import_module(where)
    before = getattr(blocks, constant, None)
    if constant:
        setattr(
            blocks, constant, value
        )  # read when the kernel is traced; nobody else is in this process
    try:
        return _speed_rows(
            scale,
            implementation,
            name,
            rows,
            channels,
            "bfloat16",
            constant=constant,
            value=str(value),
        )
    finally:
        if constant:
            setattr(blocks, constant, before)
            jax.clear_caches()


def _barrier(scale, implementation):
    """The fused kernel many times through the public call, so that a barrier that can hang does."""
    run = functools.partial(_barrier_rows, scale, implementation)
    yield Item(f"{scale.repeats} times", run)


def _barrier_rows(scale, implementation):
    rows, channels = 12544, 1024
    problem = cases.Problem(cases.Case("fused", (rows, channels)), "bn_relu", "forward", "bfloat16")
    layer = functools.partial(peer_layers.jbn_linen, implementation=implementation)
    run = peers.jax_peer("jbn", implementation, layer).build(problem, 1)
    assert run is not None
    first = np.asarray(run(0)[0])
    different = sum(not np.array_equal(np.asarray(run(0)[0]), first) for _ in range(scale.repeats))
    return [
        {
            "case": f"fused {rows}x{channels}",
            "implementation": implementation,
            "repeats": scale.repeats,
            "ok": different == 0,
        }
    ]


def _op(scale):
    """Whole layers against every peer."""
    problems = cases.problems(128) if scale is ACCELERATOR else cases.quick()[:2]
    wanted = (
        [p for p in problems if p.operation != "bn" and p.mode != "forward"]
        if scale is ACCELERATOR
        else problems
    )
    contestants, _ = peers.find(jax.default_backend(), compiled=scale is ACCELERATOR)
    # bfloat16 and training first: what is left out when the time is up is what matters least.
    for problem in sorted(wanted, key=lambda p: (p.dtype, p.mode != "forward_backward")):
        measure = functools.partial(
            op.measure, [problem], contestants, rounds=scale.rounds, seconds=0.002
        )
        yield Item(
            f"{problem.name} {problem.mode} {problem.dtype}",
            lambda measure=measure: next(measure()),
        )


def _model(scale):
    """A ResNet-50 train step."""
    batch, side = model.batch_for(jax.devices()[0])
    measure = functools.partial(
        model.measure, batch=batch, side=side, rounds=scale.rounds, compiled=scale is ACCELERATOR
    )
    yield Item(f"{batch}x{side}x{side}", lambda: measure()[0])


def main(part: str, first: str = "0", path: str = "") -> None:
    backend = jax.default_backend()
    if part == "about":
        print(json.dumps({"environment": report.environment(), "parts": names(backend)}))
        return
    with open(path, "a", buffering=1) as file:
        for number, item in enumerate(items(part, backend=backend)):
            if number < int(first):
                continue
            file.write(json.dumps({"begin": number, "label": item.label}) + "\n")
            try:
                rows = item.run()
            except NotImplementedError as error:
                rows = [{"case": item.label, "status": f"not here: {error}"}]
            for row in rows:
                file.write(json.dumps({"row": {"part": part, **row}}) + "\n")
            file.write(json.dumps({"end": number}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
