"""How long things take: rounds in which everybody runs in turn, medians over the rounds."""

import ctypes
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

MIN_ROUNDS = 5
_ELSEWHERE = 2**23  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


class Contestant(NamedTuple):
    """run(i) starts the computation on input set i; wait(result) returns when it has ended.

    clock: "host", or "profile" (device time of the module jit_<module>, by JAX's profiler), or
        "own" (run_many measures).
    """

    name: str
    run: Callable[[int], Any]
    wait: Callable[[Any], None]
    clock: str = "host"
    module: str = ""
    run_many: Callable[[int], float] | None = None  # seconds of each of so many calls


class Samples(NamedTuple):
    """Seconds of one call, one value a round."""

    seconds: tuple[float, ...]
    clock: str

    @property
    def quartiles(self) -> tuple[float, float, float]:
        if len(self.seconds) == 1:
            only = self.seconds[0]
            return only, only, only
        q1, median, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, median, q3


def keep_memory() -> bool:
    """Tell glibc to keep freed memory, for the whole process; call it before JAX starts.

    By default glibc returns large arrays to the system, depending on what lies beside them, and the
    next call pays for zeroed pages.  This can double the time, differs between processes, and says
    nothing about the code measured.  Memory that belongs to a thread is returned in any case, so
    all threads share one arena.

    Returns:
        False where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)]
    )


def measure(
    contestants: Sequence[Contestant], *, rounds: int, seconds: float, limit: float = math.inf
) -> dict[str, Samples]:
    """Samples of each contestant by name.

    In each round everybody runs once, in an order drawn anew, so that a slow spell of the machine
    and the influence of the predecessor meet all alike.  On the host, the calls of a round read one
    input set and the next round reads another, and the results move in memory, because the place of
    an array is worth 20 % and differs between processes.

    Args:
        rounds: how many, at most.
        seconds: the least time of a measurement; short calls are repeated until they fill it.
        limit: seconds after which no round begins, once there were MIN_ROUNDS.
    """
    calls = {c.name: _calibrate(c, seconds) for c in contestants}
    traced = any(c.clock == "profile" for c in contestants)
    with tempfile.TemporaryDirectory() as folder:
        if traced:
            jax.profiler.start_trace(folder)
        taken: dict[str, list[float]] = {c.name: [] for c in contestants}
        done, start, draw = 0, time.perf_counter(), random.Random(0)
        while done < rounds and (done < MIN_ROUNDS or time.perf_counter() - start < limit):
            elsewhere = np.empty(draw.randrange(_ELSEWHERE), np.uint8)
            for contestant in draw.sample(contestants, len(contestants)):
                taken[contestant.name].append(_one(contestant, calls[contestant.name], done))
            del elsewhere
            done += 1
        if traced:
            jax.profiler.stop_trace()
        on_device = _profiled(folder) if traced else {}
    samples = {}
    for c in contestants:
        runs = on_device.get(f"jit_{c.module}", []) if c.clock == "profile" else []
        per_round = _per_round(runs, done, calls[c.name] + 1)
        clock = "device" if per_round or c.clock == "own" else "host"
        samples[c.name] = Samples(tuple(per_round or taken[c.name]), clock)
    return samples


def ratio(samples: Samples, reference: Samples) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(samples.seconds, reference.seconds, strict=True))


def module_seconds(profile: Any, *, plane: str = "/device:") -> dict[str, list[float]]:
    """Device seconds of every event of every compiled module, in order of time, from a
    `jax.profiler.ProfileData`.

    A TPU notes whole modules; a GPU notes kernels, on the lines of its streams.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for device in profile.planes:
        if not device.name.startswith(plane):
            continue
        names = {line.name for line in device.lines}
        is_whole = "XLA Modules" in names
        # Of a GPU's lines only the streams: the others repeat them. Of the host's only XLA's
        # threads.
        wanted = (
            {"XLA Modules"}
            if is_whole
            else {name for name in names if name.startswith(("Stream", "tf_XLA"))}
        )
        for line in device.lines:
            for event in line.events if line.name in wanted else ():
                module = (
                    event.name.partition("(")[0]
                    if is_whole
                    else dict(event.stats).get("hlo_module")
                )
                if module is not None:
                    found.setdefault(str(module), []).append(
                        (event.start_ns, event.duration_ns / 1e9)
                    )
    return {module: [seconds for _, seconds in sorted(events)] for module, events in found.items()}


def _calibrate(contestant, seconds):
    """Warm up, and find how many calls fill the time."""
    for i in range(2):
        contestant.wait(contestant.run(i))
    start = time.perf_counter()
    contestant.wait(contestant.run(0))
    return max(1, min(1000, math.ceil(seconds / (time.perf_counter() - start))))


def _one(contestant, calls, done):
    # The first call is not timed: the predecessor has left its data in the caches, and its threads
    # may still spin.
    contestant.wait(contestant.run(done))
    if contestant.run_many is not None:
        return contestant.run_many(calls)
    start = time.perf_counter()
    result = None
    for i in range(calls):
        result = contestant.run(done if contestant.clock == "host" else i)
    contestant.wait(result)
    return (time.perf_counter() - start) / calls


def _profiled(folder):
    (path,) = Path(folder).rglob("*.xplane.pb")
    return module_seconds(ProfileData.from_file(str(path)))


def _per_round(events, rounds, calls):
    """The mean time of a call in each round, without the first call of the round.

    Empty if the events are not those of rounds * calls runs.
    """
    runs = rounds * calls
    if not events or len(events) % runs:
        return []
    width = len(events) // runs
    each = [sum(events[i * width : (i + 1) * width]) for i in range(runs)]
    return [statistics.fmean(each[r * calls + 1 : (r + 1) * calls]) for r in range(rounds)]
