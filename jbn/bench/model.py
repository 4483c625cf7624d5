"""Time a network's train step: with flax's batch norm and, from the same weights, with jbn's.

torchvision's ResNet-50 is timed beside ours.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbn.bench import networks, resnet, timing


def measure(
    *, batch: int, side: int, rounds: int, compiled: bool, network: str = "resnet50"
) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row for each implementation, the names of those not installed).

    Args:
        batch: images in a step.
        side: their height and width.
        rounds: of measurement.
        compiled: whether to include torch.compile.
        network: one of `networks.NETWORKS`; torchvision is timed on ResNet-50 alone.
    """
    images = jax.random.normal(jax.random.key(1), (batch, side, side, 3), jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(2), (batch,), 0, resnet.CLASSES)
    contestants, facts = [], {}
    for library, norm in resnet.norms().items():
        run, fact = _jax_step(norm, network, images, labels)
        contestants.append(timing.Contestant(library, run, jax.block_until_ready))
        facts[library] = fact
    wanted = ("torch", "torchvision") if network == "resnet50" else ()
    missing = [name for name in wanted if not importlib.util.find_spec(name)]
    if wanted and not missing:
        from jbn.bench import model_torch

        for name, run, wait, fact in model_torch.steps(batch, side, compiled):
            contestants.append(timing.Contestant(name, run, wait))
            facts[name] = fact
    samples = timing.measure(contestants, rounds=rounds, seconds=0)
    reference = samples[contestants[0].name]
    case = f"{networks.NETWORKS[network][0]} {batch}x{side}x{side}"
    rows = [
        {"case": case, **_row(c.name, samples[c.name], reference, facts[c.name](), batch)}
        for c in contestants
    ]
    return rows, missing


def batch_for(device: Any) -> tuple[int, int]:
    """(batch, side) by memory: ResNet-50, the largest, needs about 45 MB an image in bfloat16."""
    if device.platform == "cpu":
        return 4, 64
    memory = (device.memory_stats() or {}).get("bytes_limit", 16e9)
    return max(16, min(256, 1 << int(memory / 2 / 45e6).bit_length() - 1)), 224


def _jax_step(norm: Callable, network, images, labels):
    """(run(i) -> loss, facts() -> dict). The state moves from step to step."""
    init, step = networks.training(norm, network)
    state = jax.jit(init)(jax.random.key(0), images)
    jitted = jax.jit(step, donate_argnums=0)
    traced, trace_s = _timed(lambda: jitted.trace(state, images, labels))
    lowered, lower_s = _timed(traced.lower)
    compiled, compile_s = _timed(lowered.compile)
    stages = {"trace_s": trace_s, "lower_s": lower_s, "compile_s": compile_s}
    losses = []

    def run(i):
        nonlocal state
        del i
        state, loss = compiled(state, images, labels)
        if len(losses) < 2:
            losses.append(loss)
        return loss

    return run, lambda: {**stages, **_facts(compiled, losses)}


def _timed(fn):
    """(what fn returns, the seconds it took)."""
    start = time.perf_counter()
    return fn(), time.perf_counter() - start


def _facts(compiled, losses):
    memory = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {"peak_GB": used / 1e9, "first_loss": float(losses[0]), "second_loss": float(losses[1])}


def _row(name, samples, reference, facts, batch):
    q1, median, q3 = samples.quartiles
    library, _, implementation = name.partition(" ")
    return {
        "mode": "train step",
        "dtype": "bfloat16",
        "implementation": implementation,
        "peer": library,
        "median_ms": 1e3 * median,
        "q1_ms": 1e3 * q1,
        "q3_ms": 1e3 * q3,
        "ratio_vs_flax": timing.ratio(samples, reference),
        "images_per_s": batch / median,
        **facts,
        "clock": samples.clock,
        "rounds": len(samples.seconds),
    }
