"""Time one layer: every problem, every peer that can run here."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jbn.bench import peers, timing
from jbn.bench.cases import Problem

# Larger than the last-level cache of any GPU several times over, so that no input is found in it by
# accident.
_GPU_CACHE = 4 * 50 * 2**20
_CPU_SETS = 4  # in turn, a round each
REFERENCE = "flax.linen"


def measure(
    problems: Sequence[Problem],
    contestants: Sequence[peers.Peer],
    *,
    rounds: int,
    seconds: float,
    limit: float = math.inf,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one problem after the other.

    Args:
        problems: what to compute.
        contestants: who computes it, `flax.linen` among them.
        rounds, seconds, limit: as in `timing.measure`, for each problem.
    """
    backend = jax.default_backend()
    for problem in problems:
        input_sets = (
            _CPU_SETS if backend == "cpu" else max(2, min(16, -(-_GPU_CACHE // problem.nbytes)))
        )
        runs = [_contestant(peer, problem, input_sets, backend) for peer in contestants]
        present = [run for run in runs if run is not None]
        copy = timing.Contestant(
            "copy",
            peers.copy(problem, input_sets),
            jax.block_until_ready,
            _jax_clock(backend),
            "copy",
        )
        samples = timing.measure([*present, copy], rounds=rounds, seconds=seconds, limit=limit)
        named = {peer.name: peer for peer in contestants}
        yield [_row(problem, named[run.name], samples) for run in present]


def _contestant(peer, problem, input_sets, backend):
    run = peer.build(problem, input_sets)
    if run is None:
        return None
    if peer.library == "torch":
        if backend != "gpu":
            return timing.Contestant(peer.name, run, peer.wait)
        from jbn.bench import peers_torch

        return timing.Contestant(
            peer.name, run, peer.wait, "own", run_many=functools.partial(peers_torch.elapsed, run)
        )
    return timing.Contestant(peer.name, run, peer.wait, _jax_clock(backend), peers.module(peer))


def _jax_clock(backend):
    return "host" if backend == "cpu" else "profile"


def _row(problem, peer, samples):
    mine, copy = samples[peer.name], samples["copy"]
    q1, median, q3 = mine.quartiles
    # A copy is two passes.
    over_memory, on_chip = (passes / 2 * copy.quartiles[1] for passes in problem.passes)
    return {
        "case": problem.name,
        "mode": problem.mode,
        "dtype": problem.dtype,
        "implementation": peer.implementation,
        "peer": peer.library,
        "median_ms": 1e3 * median,
        "q1_ms": 1e3 * q1,
        "q3_ms": 1e3 * q3,
        "ratio_vs_flax": timing.ratio(mine, samples[REFERENCE]),
        "times_roofline": median / over_memory,
        "times_roofline_on_chip": median / on_chip,
        "roofline_ms": 1e3 * over_memory,
        "shape": list(problem.case.shape),
        "clock": mine.clock,
        "rounds": len(mine.seconds),
    }
