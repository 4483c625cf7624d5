"""What one layer, and a network's train step, move on a target: compiled for it, not run."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jbn.bench import hlo, networks, peer_layers, peers, resnet, targets
from jbn.bench.cases import Case, Problem

# 411 MB in bf16: larger than the on-chip memory of every target, so that no pass is hidden in it.
LAYER = Case("stage1_wide", (256, 56, 56, 256))
# Compiling for the host takes its caches for granted and its time from everybody else.
CPU_LAYER = Case("stage1_wide", (8, 56, 56, 256))


def layer_rows(
    target: str, operations=("bn", "bn_relu", "bn_add_relu"), modes=("forward", "forward_backward")
) -> Iterator[dict]:
    """One row for each library, operation and mode: passes in units of T, the bytes of x."""
    case = CPU_LAYER if target == "cpu" else LAYER
    makers = {"flax.linen": peer_layers.flax_linen, "jbn": peer_layers.jbn_linen}
    for operation in operations:
        for mode in modes:
            reference = None
            for library, make in makers.items():
                problem = Problem(case, operation, mode, "bfloat16")
                row = layer_row(target, problem, make)
                reference = reference or row
                bound, on_chip = problem.passes
                yield {
                    **{
                        "target": target,
                        "case": problem.name,
                        "mode": mode,
                        "dtype": problem.dtype,
                        "peer": library,
                    },
                    **row,
                    **{
                        "bound_T": bound,
                        "bound_on_chip_T": on_chip,
                        "ratio_vs_flax": row["moved_T"] / reference["moved_T"],
                    },
                }


def layer_row(target: str, problem: Problem, make_layer: Callable) -> dict[str, Any]:
    """What one library's layer moves, keeps and runs; bytes in units of T."""
    layer = make_layer(problem)
    fn = peers.jax_function(problem, layer)
    x = jax.ShapeDtypeStruct(problem.case.shape, problem.dtype)
    compiled = targets.compile_for(target, fn, layer.params, layer.stats, x, x, x)
    residual = x if problem.adds else None
    saved = saved_bytes(functools.partial(_train, layer), layer.params, layer.stats, x, residual)
    unit = problem.nbytes
    found = summary(compiled)
    return {
        "moved_T": found["most"] / unit,
        "usual_T": found["moved"] / unit,
        "saved_T": saved / unit,
        "temporary_T": found["temporary"] / unit,
        "kernels": found["kernels"],
        "estimated_cycles": found["estimated_cycles"],
    }


def model_row(
    target: str, norm: Callable, *, batch: int, side: int, network: str = "resnet50"
) -> dict[str, Any]:
    """What a train step in bfloat16 moves; bytes in GB."""
    init, step = networks.training(norm, network)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    state = jax.eval_shape(init, jax.random.key(0), images)
    found = summary(targets.compile_for(target, step, state, images, labels, donate_argnums=0))
    return {
        "moved_GB": found["moved"] / 1e9,
        "outside_products_GB": found["outside_products"] / 1e9,
        "temporary_GB": found["temporary"] / 1e9,
        "kernels": found["kernels"],
        "estimated_cycles": found["estimated_cycles"],
    }


def model_rows(target: str, *, batch: int, side: int, network: str = "resnet50") -> Iterator[dict]:
    """One row for each library."""
    reference = None
    for library, norm in resnet.norms().items():
        row = model_row(target, norm, batch=batch, side=side, network=network)
        reference = reference or row
        key = "estimated_cycles" if row["estimated_cycles"] else "outside_products_GB"
        case = f"{networks.NETWORKS[network][0]} {batch}x{side}x{side}"
        named = {"target": target, "case": case, "mode": "train step", "peer": library}
        yield {**named, **row, "ratio_of": key, "ratio_vs_flax": row[key] / reference[key]}


def summary(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes and counts of a compiled program.

    Of a conditional the cheapest branch counts, and the costliest under "most".
    """
    text = compiled.as_text() or ""
    operations = hlo.operations(text, branch=hlo.cheapest)
    memory = compiled.memory_analysis()
    return {
        "moved": hlo.moved(operations),
        "most": hlo.moved(hlo.operations(text, branch=hlo.costliest)),
        "outside_products": hlo.moved([op for op in operations if not op.is_product]),
        "temporary": memory.temp_size_in_bytes if memory else 0,
        "kernels": sum(op.times for op in operations),
        "estimated_cycles": hlo.estimated_cycles(operations),
    }


def saved_bytes(fn: Callable, *args: Any) -> int:
    """Bytes that fn's derivative keeps for the backward pass, kept arguments included.

    Args:
        fn: function to (result, auxiliary results that are not differentiated).
        args: arrays or `jax.ShapeDtypeStruct`.
    """
    residuals = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args, has_aux=True)[1]))(
        *args
    )
    kept = {id(var): var.aval for var in residuals.jaxpr.outvars}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values())


def _train(layer, params, stats, x, residual):
    return layer.train(params, stats, x, residual)
