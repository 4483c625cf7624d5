"""Pictures of results (extra bench)."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jbn.bench.report import Row

CUT = 3  # longer bars end here, and say how long they would be
JBN, ROOF = "#c44e52", "#4c72b0"


@contextlib.contextmanager
def figure(path: str | os.PathLike, width: float, height: float) -> Iterator[Any]:
    """Axes whose picture is saved to path when the block ends."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'jbn[bench]'"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure((width, height), layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    FigureCanvasAgg(picture).print_figure(os.fspath(path), dpi=120)


def plot_ratios(path: str | os.PathLike, rows: Sequence[Row], title: str) -> None:
    """Bars of the time over flax's, a group for each problem; flax is the line at 1, the roofline a tick across each group."""
    groups = list(dict.fromkeys(_group(row) for row in rows))
    peers = list(dict.fromkeys(_peer(row) for row in rows if row["peer"] != "flax.linen"))
    found = {(_group(row), _peer(row)): row for row in rows}
    with figure(path, 9, 1.2 + len(groups) * (0.25 + 0.17 * len(peers))) as axes:
        height = 0.8 / max(1, len(peers))
        for index, peer in enumerate(peers):
            bars = [
                (i + index * height, found[group, peer])
                for i, group in enumerate(groups)
                if (group, peer) in found
            ]
            color = (
                JBN if peer.startswith("jbn") else f"{0.45 + 0.4 * index / max(1, len(peers)):.2f}"
            )
            values = [row["ratio_vs_flax"] for _, row in bars]
            drawn = axes.barh(
                [y for y, _ in bars],
                [min(v, CUT) for v in values],
                height * 0.9,
                color=color,
                label=peer,
            )
            axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
        for i, group in enumerate(groups):
            row = next(row for row in rows if _group(row) == group)
            roofline = row["ratio_vs_flax"] / row["times_roofline"]
            axes.vlines(
                roofline,
                i - 0.5 * height,
                i + 0.8 - 0.5 * height,
                ROOF,
                label=None if i else "copy roofline",
            )
        axes.axvline(1, color="black", linewidth=1, label="flax.linen")
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], groups, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"time / time of flax.linen (less is better; bars end at {CUT})")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, loc="best")


def plot_traffic(path: str | os.PathLike, rows: Sequence[Row], title: str) -> None:
    """Bars of the bytes that one layer moves in units of T, a group for each problem; the bound is a tick across each group."""
    rows = [row for row in rows if "moved_T" in row]
    group = lambda row: f"{row['target']}: {row['case']}\n{row['mode']}"
    groups = list(dict.fromkeys(map(group, rows)))
    with figure(path, 8, 1.2 + 0.55 * len(groups)) as axes:
        for index, (peer, color) in enumerate({"flax.linen": "0.6", "jbn": JBN}.items()):
            bars = [
                (groups.index(group(row)) + 0.4 * index, row["moved_T"])
                for row in rows
                if row["peer"] == peer
            ]
            drawn = axes.barh(
                [y for y, _ in bars], [value for _, value in bars], 0.36, color=color, label=peer
            )
            axes.bar_label(drawn, [f"{value:.1f}" for _, value in bars], padding=2, fontsize=7)
        for i, name in enumerate(groups):
            bound = next(row["bound_T"] for row in rows if group(row) == name)
            axes.vlines(
                bound, i - 0.2, i + 0.6, ROOF, label=None if i else "fewest passes over memory"
            )
        axes.set_yticks([i + 0.2 for i in range(len(groups))], groups, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("bytes moved / bytes of x (less is better)")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, loc="best")


def plot_bandwidth(path: str | os.PathLike, rows: Sequence[Row], title: str) -> None:
    """GB/s of each kernel on each shape, beside XLA's; the best copy is the line."""
    copies = [row["GB_per_s"] for row in rows if row.get("part") == "copy" and "GB_per_s" in row]
    rows = [
        row for row in rows if str(row.get("part", "")).startswith("speed") and "GB_per_s" in row
    ]
    group = lambda row: f"{row['case']} {row['dtype']}"
    groups = list(dict.fromkeys(map(group, rows)))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    with figure(path, 9, 1.2 + len(groups) * (0.1 + 0.13 * len(names))) as axes:
        height = 0.8 / max(1, len(names))
        for index, name in enumerate(names):
            bars = [
                (groups.index(group(row)) + index * height, row["GB_per_s"])
                for row in rows
                if row["implementation"] == name
            ]
            color = "0.6" if name == "xla" else (JBN, "#dd8452", "#8172b3")[index % 3]
            axes.barh(
                [y for y, _ in bars],
                [value for _, value in bars],
                0.9 * height,
                color=color,
                label=name,
            )
        if copies:
            axes.axvline(max(copies), color=ROOF, label="copy")
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], groups, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("GB/s of the bytes that cannot be avoided (more is better)")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, loc="best")


def _group(row):
    return f"{row['case']}\n{row['mode']}, {row['dtype']}"


def _peer(row):
    return f"{row['peer']} {row['implementation']}".strip()
