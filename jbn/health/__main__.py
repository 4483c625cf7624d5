"""The command `python -m jbn.health`: reads checkpoints, prints their reports, and draws them."""

import argparse
import contextlib
import io
import logging
import sys
from pathlib import Path

from jbn.health import checkpoints, page
from jbn.health.findings import printable
from jbn.health.reports import ModelReport, model_report

_DESCRIPTION = """Report on every batch norm of a checkpoint, or of several of one run: values that
are not finite, statistics never updated, dead, pruned or one-sided channels, variances near eps,
each with its layer, channels and remedy."""
_CODES = "exit codes: 0 no warnings, 1 warnings (in the last checkpoint), 2 nothing could be read"


def main(argv: list[str] | None = None) -> int:
    """Print the reports of checkpoints; returns 1 if the last one has warnings, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m jbn.health", description=_DESCRIPTION, epilog=_CODES
    )
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="an orbax folder, the folder of a CheckpointManager (all its steps), or a msgpack "
        "file of flax.serialization; several of one run in order",
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT.HTML", help="write a page to open in a browser"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.PNG", help="draw the numbers of all channels (the last)"
    )
    parser.add_argument(
        "--eps", type=float, default=1e-5, help="of the layers, default %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        # Orbax logs what it raises too, and prints tracebacks of its threads.
        with contextlib.redirect_stderr(io.StringIO()):
            logging.getLogger("absl").setLevel(logging.CRITICAL)
            reports = _reports(arguments.checkpoints, arguments.eps)
        last = _print(reports)
        if arguments.html:
            arguments.html.write_text(page.render(reports), encoding="utf-8")
        if arguments.plot:
            if arguments.plot.is_dir():
                raise IsADirectoryError(f"{arguments.plot} is a folder, expected a file to write")
            from jbn import plot  # matplotlib is an extra

            plot.overview(last).savefig(arguments.plot, dpi=110)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    return 1 if last.findings else 0


def _reports(paths, eps) -> dict[str, ModelReport]:
    """The reports by label, in the order given: a step, the name of a file, or both."""
    trees = {}
    for path in paths:
        for label, tree in checkpoints.load(path).items():
            name = label if len(paths) == 1 or label == path.name else f"{path}/{label}"
            trees[str(path) if name in trees else name] = tree
    return {label: model_report(tree, eps=eps) for label, tree in trees.items()}


def _print(reports) -> ModelReport:
    """Print all reports; returns the last one."""
    for label, report in reports.items():
        if len(reports) > 1:
            print(f"== {printable(label)}")
        print(report)
    return list(reports.values())[-1]


if __name__ == "__main__":
    # After a damaged checkpoint, threads of tensorstore call a closed event loop until the end.
    sys.unraisablehook = lambda _: None
    sys.exit(main())
