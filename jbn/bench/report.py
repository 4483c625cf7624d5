"""How results are shown: an aligned table, JSON lines, Markdown, pictures, and a progress bar."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]


def environment() -> Row:
    """Where and with what: part of every row that is kept."""
    names = ("jbn", "jax", "jaxlib", "flax", "torch", "dm-haiku", "equinox")
    versions = {name: _version(name) for name in names}
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return {
        "device": f"{device.platform}: {kind}",
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version for name, version in versions.items() if version},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Aligned columns: text to the left, numbers to the right with four digits.

    In the first column a value is shown once, and then blank as long as it repeats.
    """
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    lines = []
    previous = None
    for line in [list(columns), *cells]:
        shown = [
            "" if previous and i == 0 and line[0] == previous[0] else cell
            for i, cell in enumerate(line)
        ]
        aligned = [
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(shown, widths, right, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
        previous = line
    return "\n".join(lines)


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The same as a Markdown table."""
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row.get(column, "")) for column in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """One object a line."""
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read_json(path: str | os.PathLike) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def progress(items: Iterable, total: int, describe: Callable[[Any], str] | None = None) -> Iterator:
    """The items, with a bar on standard error if that is a terminal: tqdm's, or else plain text."""
    if not sys.stderr.isatty():
        yield from items
    elif installed("tqdm"):
        from tqdm import tqdm

        bar = tqdm(items, total=total, file=sys.stderr, leave=False)
        for item in bar:
            if describe:
                bar.set_postfix_str(describe(item))
            yield item
    else:
        for index, item in enumerate(items, start=1):
            text = describe(item) if describe else ""
            sys.stderr.write(f"\r{index}/{total} {text:60.60}")
            sys.stderr.flush()
            yield item
        sys.stderr.write("\r" + 80 * " " + "\r")


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
