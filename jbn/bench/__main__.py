"""What jbn costs, beside what its peers cost: in time, in bytes moved, in memory.

Exit codes: 0 if the rows were made, 1 if the work failed, 2 if the command line is wrong or its
--filter leaves nothing.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import jax

from jbn.bench import (
    cases,
    device,
    model,
    networks,
    op,
    peers,
    pictures,
    report,
    targets,
    timing,
    traffic,
)

_OP_COLUMNS = ("case", "mode", "dtype", "peer", "implementation", "median_ms", "q1_ms", "q3_ms")
_OP_COLUMNS += ("ratio_vs_flax", "times_roofline")
_LAYER_COLUMNS = ("case", "mode", "peer", "moved_T", "usual_T", "bound_T", "saved_T")
_LAYER_COLUMNS += ("temporary_T", "kernels", "estimated_cycles", "ratio_vs_flax")
_STEP_COLUMNS = ("case", "peer", "moved_GB", "outside_products_GB", "temporary_GB", "kernels")
_STEP_COLUMNS += ("estimated_cycles", "ratio_of", "ratio_vs_flax")
_MODEL_COLUMNS = ("case", "peer", "implementation", "median_ms", "q1_ms", "q3_ms")
_MODEL_COLUMNS += ("ratio_vs_flax", "images_per_s", "trace_s", "lower_s", "compile_s", "peak_GB")
_MODEL_COLUMNS += ("first_loss", "second_loss")
# Alone on a machine, the middle half of the measurements of one program spreads by 2 to 8 %.
_CALM = 0.2


def main(arguments: list[str] | None = None) -> int:
    targets.stay_on_host()
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jbn.bench", description=__doc__, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--filter", default="", help="only rows whose case, mode, dtype or peer contain every word")
    add("--quick", action="store_true", help="a small choice: under 60 s on two CPU cores")
    add("--json", metavar="FILE", type=_new_file, help="write one JSON object a row")
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--plot", metavar="FILE", type=_picture, help="draw a picture (extra bench)")
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--repeats", type=_positive, help="rounds of measurement")

    def command(name, run, summary, *parents):
        added = commands.add_parser(
            name, parents=[common, *parents], help=summary, description=summary
        )
        added.set_defaults(run=run)
        return added.add_argument

    add = command("op", _op, "time one layer, for every peer that is installed", drawn, timed)
    add("--batch", type=_positive, help="images in a batch")
    add = command(
        "traffic",
        _traffic,
        "compile a layer and train steps for a target, run nothing, and count the bytes they move",
        drawn,
    )
    names = ", ".join(targets.TARGETS)
    add("--target", nargs="+", default=["cpu"], help=f"{names}; GPUs and TPUs need the extra aot")
    add("--batch", type=_positive, default=128, help="images in a train step")
    add("--side", type=_positive, default=224, help="their height and width")
    add("--part", choices=("layer", "model"), help="only the layer, or only the train steps")
    _add_networks(add)
    add = command("model", _model, "time a network's train step, and its compilation", drawn, timed)
    add("--batch", type=_positive, help="images in a step (default: by memory)")
    add("--side", type=_positive, help="their height and width")
    _add_networks(add)
    add = command(
        "device",
        _device,
        "check and time everything on this device, in 8 minutes at most",
    )
    add(
        "--out",
        metavar="FOLDER",
        default="results",
        help="where the tables and pictures (extra bench) go",
    )
    add("--seconds", type=float, default=470, help="stop after so long")
    return parser


def _positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number >= 1")
    return int(text)


def _new_file(text):
    """A path to write to. What cannot be written is found before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a file in a folder that exists")
    return text


def _picture(text):
    if not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'jbn[bench]'")
    return _new_file(text)


def _add_networks(add):
    add(
        "--network",
        nargs="+",
        choices=list(networks.NETWORKS),
        default=["resnet50"],
        help="whose train step (default: resnet50)",
    )


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
        return _nothing_left(options)
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
        f"x ~ N(0.5, 2); {counts[0]} to {counts[-1]} rounds, and everybody runs once in each. "
        "ratio_vs_flax: the median over the rounds of the ratio within a round"
    )
    if kept and backend == "cpu":
        print("freed memory stays with this process, so page faults are not measured")
    print(
        "times_roofline: the time over that of the passes that cannot be avoided, each as fast as "
        "a copy of x in the same rounds"
    )
    return _finish(options, rows, missing)


def _traffic(options):
    # It only compiles: no device is needed, and none is taken.
    jax.config.update("jax_platforms", "cpu")
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
        f"target {target}: one layer, in units of T = the bytes of x. Of a conditional, moved_T "
        "counts the costliest branch and the other columns the cheapest;\n"
        "bound_T: the fewest passes over memory; saved_T: what is kept for the backward pass"
    )
    print(report.table(rows, _LAYER_COLUMNS) + "\n", flush=True)
    return rows


def _traffic_of_model(target, options):
    rows = []
    for network in options.network:
        found = traffic.model_rows(target, batch=options.batch, side=options.side, network=network)
        rows += [row for row in report.progress(found, 2) if _matches(options.filter, row)]
    print(
        f"target {target}: a train step in bfloat16. Products are convolutions and matrix "
        "products. Of a conditional the cheapest\nbranch counts: on TPU jbn reads x a second time "
        "only where the running mean is far from the mean"
    )
    print(report.table(rows, _STEP_COLUMNS) + "\n", flush=True)
    return rows


def _model(options):
    batch, side = model.batch_for(jax.devices()[0])
    rounds = options.repeats or (3 if options.quick else 15)
    known = {"batch": options.batch or batch, "side": options.side or side}
    rows, missing = [], []
    for network in options.network:
        found, missing_here = model.measure(
            **known, rounds=rounds, compiled=not options.quick, network=network
        )
        rows += [row for row in found if _matches(options.filter, row)]
        missing += [name for name in missing_here if name not in missing]
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
    """The problems and peers left: a word narrows the problems if it occurs in one, else the peers.

    flax.linen stays, as the reference.
    """
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


def _nothing_left(options):
    print(f"--filter {options.filter!r} leaves nothing to show", file=sys.stderr)
    return 2


def _warning(rows):
    """What to think of the times if other load made them spread; None if they are calm."""
    timed = [row for row in rows if "q3_ms" in row]
    spread = max(((row["q3_ms"] - row["q1_ms"]) / row["median_ms"] for row in timed), default=0)
    if spread <= _CALM:
        return None
    return (
        f"warning: the middle half of some times spreads over {spread:.0%} of the median, so other "
        "work runs on this machine. Ratios are within a round and suffer least; repeat when it is "
        "quiet"
    )


def _finish(options, rows, missing, plot=pictures.plot_ratios, where=None):
    if not rows:
        return _nothing_left(options)
    if warning := _warning(rows):
        print(warning, file=sys.stderr)
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
