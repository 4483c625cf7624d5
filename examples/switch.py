"""Models of somebody else, switched to jbn without touching their source: errors and times.

python examples/switch.py            ResNet-50, EfficientNet-B0, U-Net, DenseNet-121; linen and nnx

One line changes: `with jbn.linen.replacing():` for linen, `jbn.nnx.replace(model)` for nnx. Errors
are relative, |a - b| / |b| over all values, b being flax in float64. The images have mean 0 and
standard deviation 1, so that flax is accurate, too. The networks have silu in place of relu: at
relu's kink the rounding of any layer flips derivatives, and the gradients of a ResNet-50 then
differ from those in float64 by 4e-2, whoever computes the norms; with silu by less than 1e-4.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import networks_linen
import networks_nnx
import numpy as np
from flax import nnx
from tqdm import tqdm

import jbn.linen
import jbn.nnx

LEARNING_RATE = 1e-3  # at 0.02 flax's own run moves by 4e-4 when x moves by one ulp


def linen_program(model, x, switched):
    """(apply, params, stats); apply of (params, stats, x, train) gives y and the new statistics."""
    context = jbn.linen.replacing if switched else contextlib.nullcontext

    def apply(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        with context():  # the one line
            y, new = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return y, new["batch_stats"]

    with context():
        variables = model.init(jax.random.key(0), x, train=False)
    return apply, variables["params"], variables["batch_stats"]


def nnx_program(model, x, switched):
    """As linen_program; the switched model stays switched."""
    if switched:
        jbn.nnx.replace(model)  # the one line
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x, train):
        copy = nnx.merge(graph, params, stats, copy=True)
        copy.train() if train else copy.eval()
        return copy(x), nnx.state(copy, nnx.BatchStat)

    return apply, params, stats


def sgd_step(apply):
    """A jitted function of (params, stats, x, target): y, the gradients, and the new variables."""

    def loss(params, stats, x, target):
        y, stats = apply(params, stats, x, True)
        return jnp.square(y - target).mean(), (y, stats)

    @jax.jit
    def step(params, stats, x, target):
        gradients, (y, stats) = jax.grad(loss, has_aux=True)(params, stats, x, target)
        moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)
        return y, gradients, moved, stats

    return step


def run(program, x, target, steps):
    """What is compared, by name, as NumPy arrays; the time to compile one step; and that step."""
    apply, params, stats = program
    values = {"evaluation": jax.jit(apply, static_argnums=3)(params, stats, x, False)[0]}
    start = time.perf_counter()
    step = sgd_step(apply).lower(params, stats, x, target).compile()
    compile_time = time.perf_counter() - start
    values["training"], values["gradients"], moved, values["statistics"] = step(
        params, stats, x, target
    )
    new_stats = values["statistics"]
    for _ in range(steps - 1):
        _, _, moved, new_stats = step(moved, new_stats, x, target)
    values[f"{steps} steps"] = moved, new_stats
    leaves = {key: list(map(np.asarray, jax.tree.leaves(v))) for key, v in values.items()}
    return leaves, compile_time, lambda: jax.block_until_ready(step(params, stats, x, target))


def error(values, truth):
    """|values - truth| / |truth|, over all arrays together."""
    norm = lambda arrays: np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum() for a in arrays))
    return float(norm([a - b for a, b in zip(values, truth, strict=True)]) / norm(truth))


def compare(make, model, x, *, steps=10, rounds=5):
    """One row: the errors of flax and of jbn by what is compared, and the ratios of their times.

    Args:
        make: linen_program or nnx_program.
        model: of flax's layers.
        x: images [batch, height, width, 3], float32.
        steps: of training.
        rounds: how often each step is timed, in turn; the medians are compared.
    """
    apply, *variables = make(model, x, False)
    y = jax.eval_shape(lambda *v: apply(*v, x, False)[0], *variables)
    target = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
        truth, _, _ = run((apply, *wide(variables)), wide(x), wide(target), steps)
    flax, flax_compile, flax_step = run((apply, *variables), x, target, steps)
    ours, our_compile, our_step = run(make(model, x, True), x, target, steps)
    times = [[timed(step) for step in (flax_step, our_step)] for _ in range(rounds)]
    flax_time, our_time = map(statistics.median, zip(*times, strict=True))
    return {
        "flax": {key: error(flax[key], truth[key]) for key in truth},
        "jbn": {key: error(ours[key], truth[key]) for key in truth},
        "step time, jbn / flax": our_time / flax_time,
        "compile time, jbn / flax": our_compile / flax_compile,
    }


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(rows):
    """Markdown: a row per model and quantity, then the times."""
    quantities = list(next(iter(rows.values()))["flax"])
    columns = ["model", *quantities, "lines changed", "step time", "compile time"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        cells = [f"{row['flax'][q]:.0e} / {row['jbn'][q]:.0e}" for q in quantities]
        cells.append("1")
        cells += [f"{row[f'{what} time, jbn / flax']:.2f}" for what in ("step", "compile")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--tiny", action="store_true", help="a block or two per stage")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the numbers")
    arguments = parser.parse_args(arguments)
    x = np.random.default_rng(0).normal(size=(8, arguments.size, arguments.size, 3))
    size = "tiny" if arguments.tiny else "small"
    systems = {"linen": (networks_linen, linen_program), "nnx": (networks_nnx, nnx_program)}
    jobs = [
        (f"{name}, {system}", make, model)
        for system, (networks, make) in systems.items()
        for name, model in getattr(networks, size)().items()
    ]
    rows = {}
    for name, make, model in (progress := tqdm(jobs)):
        progress.set_description(name)
        rows[name] = compare(make, model, x.astype(np.float32), steps=arguments.steps)
        tqdm.write(table({name: rows[name]}).splitlines()[-1])
    print("relative error of flax / of jbn; times are jbn's over flax's\n")
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
