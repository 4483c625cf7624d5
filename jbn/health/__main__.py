"""Print the report of a checkpoint: python -m jbn.health CHECKPOINT [--plot out.png]."""

import argparse
import sys
from pathlib import Path

from jbn.health import checkpoints
from jbn.health.reports import model_report


def main(argv: list[str] | None = None) -> int:
    """Print the report of a checkpoint; returns 1 if there are warnings, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m jbn.health", description="Report on the batch norms of a checkpoint."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="an orbax folder, or a file of flax.serialization"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.PNG", help="draw the numbers of all channels"
    )
    parser.add_argument(
        "--eps", type=float, default=1e-5, help="of the layers, default %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        result = model_report(checkpoints.load(arguments.checkpoint), eps=arguments.eps)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(result)
    if arguments.plot:
        from jbn import plot  # matplotlib is an extra

        plot.overview(result).savefig(arguments.plot, dpi=110)
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
