"""Check and time everything on this device: each part in its own process, under a time limit.

An item that hangs or takes its process down costs one row: the process is killed, and another one
goes on with the next item.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jbn.bench import pictures, report
from jbn.bench.report import Row

# Seconds for all items of a part, by the first word of its name, and for one item (compilation
# included).
_PART_SECONDS = {
    "copy": 40,
    "correctness": 60,
    "speed": 75,
    "op": 110,
    "model": 110,
    "xla": 30,
    "barrier": 40,
    "sweep": 60,
}
_ITEM_SECONDS = {"model": 105, "barrier": 35}
_ITEM_SECONDS_OTHERS = 40.0
_START_SECONDS = 60.0  # for importing jax and opening the device
_COLUMNS = (
    "case",
    "mode",
    "dtype",
    "implementation",
    "peer",
    "constant",
    "value",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "GB_per_s",
)
_COLUMNS += (
    "ratio_vs_flax",
    "times_roofline",
    "images_per_s",
    "peak_GB",
    "error",
    "allowed",
    "repeats",
    "ok",
    "status",
)


class Limits(NamedTuple):
    """Seconds."""

    part: float
    item: float
    start: float = _START_SECONDS


def run(
    folder: str | os.PathLike, *, seconds: float, words: str = "", only: Sequence[str] | None = None
) -> list[Row]:
    """Run the parts, and write results.jsonl, results.md and pictures into the folder while they
    go.

    Args:
        folder: made if it is not there.
        seconds: for all of it; parts that find no time left are named.
        words: only parts whose names contain them all.
        only: the parts; None asks the device which suit it.
    """
    deadline = time.monotonic() + seconds
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads(
        subprocess.run(
            _child("about"), check=True, capture_output=True, text=True, env=_environment()
        ).stdout
    )
    names = [name for name in only or about["parts"] if all(word in name for word in words.split())]
    rows: list[Row] = []
    for name in report.progress(names, len(names), str):
        left = deadline - time.monotonic()
        kind = name.split()[0]
        limits = Limits(
            min(_PART_SECONDS[kind], left), _ITEM_SECONDS.get(kind, _ITEM_SECONDS_OTHERS)
        )
        found = (
            run_part(name, limits)
            if left > 5
            else [{"part": name, "status": "not run: no time left"}]
        )
        rows += [row | about["environment"] for row in found]
        write(folder, rows)
    return rows


def run_part(name: str, limits: Limits) -> list[Row]:
    """The rows of a part.

    One row more tells of each item that hung or ended its process, and of time that ran out.
    """
    deadline = time.monotonic() + limits.part
    rows: list[Row] = []
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            path = Path(folder, f"{first}.jsonl")
            path.touch()
            ended = _watch(_child(name, str(first), str(path)), path, deadline, limits)
            lines = [
                json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
            ]
            rows += [line["row"] for line in lines if "row" in line]
            begun = [line for line in lines if "begin" in line]
            finished = {line["end"] for line in lines if "end" in line}
            if ended == "done":
                return rows
            lost = begun[-1]["label"] if begun and begun[-1]["begin"] not in finished else ""
            rows.append({"part": name, "case": lost, "status": ended})
            # Nothing begun: it would fail in the same way again.
            if ended.startswith("time") or not begun:
                return rows
            first = begun[-1]["begin"] + 1


def write(folder: Path, rows: Sequence[Row]) -> None:
    """results.jsonl, results.md, and pictures where there is something to draw (extra bench)."""
    report.write_json(folder / "results.jsonl", rows)
    environment = {
        key: rows[0][key] for key in ("device", "python", "jax", "date") if key in rows[0]
    }
    title = ", ".join(f"{key} {value}" for key, value in environment.items())
    sections = [f"# {title}", "", "By `python -m jbn.bench device`."]
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        columns = [column for column in _COLUMNS if any(column in row for row in of_part)]
        sections += ["", f"## {part}", "", report.markdown(of_part, columns)]
    (folder / "results.md").write_text("\n".join(sections) + "\n")
    if not report.installed("matplotlib"):
        return
    layers = [row for row in rows if row["part"] == "op" and "times_roofline" in row]
    if layers:
        pictures.plot_ratios(folder / "op.png", layers, title)
    if any(row["part"].startswith("speed") and "GB_per_s" in row for row in rows):
        pictures.plot_bandwidth(folder / "kernels.png", rows, title)


def _watch(command, path, deadline, limits):
    """Run the command; returns "done", or why it was stopped.

    It is stopped when it has written nothing for too long, and when the time is up.
    """
    with open(path.with_suffix(".err"), "w+") as errors:
        child = subprocess.Popen(
            command, stdout=errors, stderr=errors, start_new_session=True, env=_environment()
        )
        size, since = 0, time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                if path.stat().st_size != size:
                    size, since = path.stat().st_size, now
                if now > deadline:
                    return f"time is up: {limits.part:.0f} s"
                if now - since > (limits.item if size else limits.start):
                    return f"hung: nothing for {now - since:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.returncode == 0:
            return "done"
        errors.seek(0)
        return f"ended with {child.returncode}: {_last_line(errors.read())}"


def _last_line(text):
    """The last line that tells something; the rest of a traceback does not fit a table."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1][:200].replace("|", "/") if lines else "no message"


def _child(*arguments):
    return [sys.executable, "-m", "jbn.bench.parts", *arguments]


def _environment():
    # torch and JAX share the card: neither may take all of its memory at the start.
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
