"""python -m jbn.bench op | traffic | model | device: what jbn costs, beside what its peers cost."""

import argparse
import math
import sys
from pathlib import Path

import jax

from jbn.bench import cases, device, model, op, peers, pictures, report, targets, timing, traffic

_OP_COLUMNS = ("case", "mode", "dtype", "peer", "implementation", "median_ms", "q1_ms", "q3_ms")
_OP_COLUMNS += ("ratio_vs_flax", "times_roofline")
_LAYER_COLUMNS = (
    "case",
    "mode",
    "peer",
    "moved_T",
    "usual_T",
    "bound_T",
    "saved_T",
    "temporary_T",
    "kernels",
)
_LAYER_COLUMNS += ("estimated_cycles", "ratio_vs_flax")
_STEP_COLUMNS = (
    "case",
    "peer",
    "moved_GB",
    "outside_products_GB",
    "temporary_GB",
    "kernels",
    "estimated_cycles",
)
_STEP_COLUMNS += ("ratio_of", "ratio_vs_flax")
_MODEL_COLUMNS = (
    "case",
    "peer",
    "implementation",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "ratio_vs_flax",
    "images_per_s",
)
_MODEL_COLUMNS += ("peak_GB", "first_loss", "second_loss")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m jbn.bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--filter",
        default="",
        help="only rows whose case, mode, dtype or peer contain all these words",
    )
    common.add_argument(
        "--quick", action="store_true", help="a small choice: under 60 s on two CPU cores"
    )
    common.add_argument("--repeats", type=int, help="rounds of measurement")
    common.add_argument("--json", metavar="FILE", help="write one JSON object a row")
    common.add_argument("--plot", metavar="FILE", help="draw a picture (extra bench)")
    command = commands.add_parser(
        "op", parents=[common], help="time one layer, against every peer installed"
    )
    command.add_argument("--batch", type=int, help="images in a batch")
    command.set_defaults(run=_op)
    command = commands.add_parser(
        "traffic", parents=[common], help="bytes moved, compiled for a target and not run"
    )
    command.add_argument(
        "--target",
        nargs="+",
        default=["cpu"],
        help=f"{', '.join(targets.TARGETS)}; GPUs and TPUs: extra aot",
    )
    command.add_argument("--batch", type=int, default=128, help="images in the ResNet-50 step")
    command.add_argument("--side", type=int, default=224, help="their height and width")
    command.add_argument(
        "--part", choices=("layer", "model"), help="only one layer, or only the ResNet-50 step"
    )
    command.set_defaults(run=_traffic)
    command = commands.add_parser("model", parents=[common], help="time a ResNet-50 train step")
    command.add_argument("--batch", type=int, help="images in a step (default: by memory)")
    command.add_argument("--side", type=int, help="their height and width")
    command.set_defaults(run=_model)
    command = commands.add_parser(
        "device", parents=[common], help="everything about this device, in 8 minutes at most"
    )
    command.add_argument(
        "--out", metavar="FOLDER", default="results", help="where the tables and pictures go"
    )
    command.add_argument("--seconds", type=float, default=470, help="stop after so long")
    command.set_defaults(run=_device)
    return parser


def _op(options):
    kept = timing.keep_memory()
    backend = jax.default_backend()
    problems = (
        cases.quick()
        if options.quick
        else cases.problems(options.batch or (8 if backend == "cpu" else 128))
    )
    contestants, missing = peers.find(backend, compiled=not options.quick)
    problems, contestants = _filtered(options.filter, problems, contestants)
    if not problems:
        print(f"--filter {options.filter!r} leaves nothing", file=sys.stderr)
        return 2
    pace = (
        {"rounds": 201, "seconds": 0.002, "limit": 3.5}
        if options.quick
        else {"rounds": 21, "seconds": 0.02}
    )
    if options.repeats:
        pace |= {"rounds": options.repeats, "limit": math.inf}
    rows = []
    measured = op.measure(problems, contestants, **pace)
    for found in report.progress(
        measured, len(problems), lambda rows: f"{rows[0]['case']} {rows[0]['mode']}"
    ):
        rows += found
    print(report.table(rows, _OP_COLUMNS))
    counts = sorted({row["rounds"] for row in rows})
    print(
        f"x ~ N(0.5, 2); {counts[0]} to {counts[-1]} rounds, everybody once in each; ratio: the median of those of a round"
    )
    if kept and backend == "cpu":
        print("malloc keeps what is freed: no page faults are measured")
    print(
        "times_roofline: over the time of a copy of x in the same rounds, times the passes, each of them over memory"
    )
    return _finish(options, rows, missing)


def _traffic(options):
    jax.config.update(
        "jax_platforms", "cpu"
    )  # it only compiles: no device is needed, and none is taken
    rows = []
    for target in options.target:
        if options.part != "model":
            rows += _traffic_of_layers(target, options)
        if options.part == "model" or not (options.part or options.quick or target == "cpu"):
            rows += _traffic_of_model(target, options)
    return _finish(
        options,
        rows,
        [],
        pictures.plot_traffic,
        f"compiled for {', '.join(options.target)}, not run",
    )


def _traffic_of_layers(target, options):
    choice = {"operations": ("bn_relu",), "modes": ("forward_backward",)} if options.quick else {}
    found = traffic.layer_rows(target, **choice)
    rows = [
        row
        for row in report.progress(found, 2 if options.quick else 12)
        if _matches(options.filter, row)
    ]
    print(
        f"target {target}: one layer, in units of T = the bytes of x; moved_T counts the dearest branch of a conditional,"
    )
    print(
        "the rest the cheapest; bound_T: every pass over memory; saved_T: kept for the backward pass"
    )
    print(report.table(rows, _LAYER_COLUMNS) + "\n", flush=True)
    return rows


def _traffic_of_model(target, options):
    found = traffic.model_rows(target, batch=options.batch, side=options.side)
    rows = [row for row in report.progress(found, 2) if _matches(options.filter, row)]
    print(
        f"target {target}: a ResNet-50 train step in bfloat16; products: convolutions and matrix products; a conditional"
    )
    print(
        "counts its cheapest branch: on TPU jbn looks at x a second time only where the running mean is far from the mean"
    )
    print(report.table(rows, _STEP_COLUMNS) + "\n", flush=True)
    return rows


def _model(options):
    batch, side = model.batch_for(jax.devices()[0])
    rounds = options.repeats or (3 if options.quick else 15)
    rows, missing = model.measure(
        batch=options.batch or batch,
        side=options.side or side,
        rounds=rounds,
        compiled=not options.quick,
    )
    rows = [row for row in rows if _matches(options.filter, row)]
    print(report.table(rows, _MODEL_COLUMNS))
    return _finish(options, rows, missing)


def _device(options):
    only = ("copy", "op") if options.quick else None
    rows = device.run(options.out, seconds=options.seconds, words=options.filter, only=only)
    print((Path(options.out) / "results.md").read_text())
    if options.json:
        report.write_json(options.json, rows)
    return 0


def _matches(words, row):
    text = " ".join(
        str(row.get(key, "")) for key in ("case", "mode", "dtype", "peer", "implementation")
    )
    return all(word in text for word in words.split())


def _filtered(words, problems, contestants):
    """Each word narrows the problems if it occurs in one, else the peers; flax.linen stays, as the reference."""
    for word in words.split():
        matching = [p for p in problems if word in f"{p.name} {p.mode} {p.dtype}"]
        if matching:
            problems = matching
        else:
            kept = [peer for peer in contestants if word in peer.name]
            problems = problems if kept else []
            contestants = [
                peer for peer in contestants if peer in kept or peer.name == op.REFERENCE
            ]
    return problems, contestants


def _finish(options, rows, missing, plot=pictures.plot_ratios, where=None):
    environment = report.environment()
    where = where or environment["device"]
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if missing:
        print(
            f"not installed, so not compared: {', '.join(missing)} (extra peers; torch by itself)"
        )
    if options.json:
        report.write_json(options.json, [row | environment for row in rows])
    if options.plot:
        plot(options.plot, rows, f"{where}; jax {environment['jax']}, {environment['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
