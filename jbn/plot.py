"""Pictures of batch-norm layers, as matplotlib figures: `plot.drift(report).savefig("drift.png")`.

Matplotlib is an extra.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn import functional
from jbn.core import validate
from jbn.types import Params, State

# The colours of every picture of jbn: jbn itself, another library, a network without batch norm,
# and whatever else is compared.
COLORS = {"jbn": "#0b6fb8", "peer": "#8a8a8a", "without": "#d1581c", "other": "#3c9a5f"}


def drift(report: Any) -> Any:
    """How far a batch's means lie from the running ones: a row per layer, a column per channel.

    Args:
        report: of `jbn.health`, of a layer or a model, made with the moments of a batch.

    Returns:
        A matplotlib Figure. A cross marks a channel that holds a NaN or an infinity.

    Raises:
        ValueError: no layer of the report has moments.  TypeError: no report.
        ModuleNotFoundError: matplotlib is missing.
    """
    layers = [m for m in _layers(report) if m.drift is not None]
    if not layers:
        raise ValueError(
            "the report holds no drift, expected one made with moments: "
            "report(params, state, jbn.moments(x))"
        )
    row, size = (0.35, 9) if len(layers) <= 20 else (7.2 / len(layers), 6)
    figure = _figure(10, 2.2 + row * len(layers))
    largest = max(np.abs(m.drift[np.isfinite(m.drift)]).max(initial=0) for m in layers)
    figure.suptitle(
        f"Drift of the batch from the running statistics: at most {largest:.2g} running standard "
        f"deviations",
        fontweight="bold",
    )
    ax = figure.subplots()
    table = np.full((len(layers), max(m.drift.size for m in layers)), np.nan)
    for y, (m, values) in enumerate(zip(layers, table, strict=True)):
        values[: m.drift.size] = _known(m.drift, m.finite)
        broken = np.flatnonzero(~m.finite)
        values[broken] = np.nan
        ax.plot(broken, np.full(broken.size, y), "x", color="black")
    colors = ax.imshow(
        np.ma.masked_invalid(table), aspect="auto", interpolation="nearest", cmap="RdBu_r"
    )
    colors.set_clim(-3, 3)
    ax.set_facecolor("0.8")
    ax.set_yticks(range(len(layers)), [_name(m) for m in layers], fontsize=size)
    ax.set_xlabel("channel")
    ax.locator_params(axis="x", integer=True)
    name = "drift of the mean, in running standard deviations"
    figure.colorbar(colors, ax=ax, label=name, extend="both", location="bottom", aspect=50)
    return figure


MARKS = {  # kind of finding: marker and colour
    "not finite": ("X", "black"),
    "negative variance": ("P", "black"),
    "dead": ("s", COLORS["without"]),
    "variance near eps": ("v", COLORS["without"]),
    "drift": ("o", COLORS["jbn"]),
    "cancellation": ("D", COLORS["jbn"]),
    "prunable": ("p", COLORS["other"]),
    "off": ("<", COLORS["other"]),
    "saturated": (">", COLORS["other"]),
}
MOST_ROWS = 60  # of an overview: more layers do not fit one screen


def overview(report: Any) -> Any:
    """One screen for a model: what was found, and the range of every number, a row per layer.

    A mark stands at each suspicious channel, another one for each kind of finding. The first few
    are named beside it. The bars show the other numbers, from the smallest to the largest channel,
    with a tick at the median. Of more than 60 layers those with findings are shown.

    Args:
        report: of `jbn.health`, of a layer or a model.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: no report.  ModuleNotFoundError: matplotlib is missing.
    """
    layers = _layers(report)
    shown = layers
    if len(layers) > MOST_ROWS:
        shown = sorted(layers, key=lambda m: not m.findings)[:MOST_ROWS]
        shown = [m for m in layers if m in shown]
    known = {name for m in shown for name in _NUMBERS if getattr(m, name) is not None}
    columns = [(name, *_NUMBERS[name]) for name in _NUMBERS if name in known]
    row, size = (0.4, 9) if len(shown) <= 16 else (7.2 / len(shown), 6.5)
    figure = _figure(14, max(3.4, 2 + row * len(shown)))
    warnings = [finding for m in layers for finding in m.findings]
    suspicious = sum(bool(m.findings) for m in layers)
    title = f"{len(layers)} batch norm{'s'[: len(layers) > 1]}: "
    title += (
        f"{len(warnings)} warning{'s'[: len(warnings) > 1]} in {suspicious} of them"
        if warnings
        else "no warnings"
    )
    title += f" ({len(layers) - len(shown)} not shown)" if len(shown) < len(layers) else ""
    figure.suptitle(title, fontweight="bold")
    ratios = [6, *[1.5] * len(columns)]
    channels, *axes = figure.subplots(1, 1 + len(columns), sharey=True, width_ratios=ratios)
    _draw_findings(figure, channels, shown, size)
    for ax, (name, label, limits) in zip(axes, columns, strict=True):
        for y, m in enumerate(shown):
            values = getattr(m, name)
            values = values if values is None else _known(values, m.finite)[np.ravel(m.finite)]
            if values is not None and values.size:
                values = values if limits is None else np.clip(values, *limits)
                color = COLORS["without"] if m.findings else COLORS["jbn"]
                ax.plot([values.min(), values.max()], [y, y], "-", color=color, lw=2)
                ax.plot(np.median(values), y, "|", color="black", ms=size)
        # Over less than two decades a logarithmic axis has hardly a tick.
        smallest, largest = sorted(np.abs(ax.dataLim.intervalx))
        linear_to = _LOGARITHMIC.get(name, np.inf)
        if largest > 100 * max(smallest, linear_to):
            ax.set_xscale("symlog", linthresh=linear_to)
            ax.xaxis.get_major_locator().set_params(numticks=4)
        else:
            ax.locator_params(axis="x", nbins=3)
        ax.set_title(label, fontsize=9)
        ax.tick_params(axis="x", labelsize=7)
        ax.grid(alpha=0.25)
    return figure


# Attribute of a layer's report: its name in the picture, and the limits at which bars are cut off.
_NUMBERS = {
    "scale": ("gamma (scale)", None),
    "var": ("running\nvariance", None),
    "ratio": ("|mean| / std\nof the input", (0, 1e4)),
    "one_sided": ("mean / std\nof the output", (-10, 10)),
    "drift": ("drift, in\nrunning std", (-5, 5)),
}
_LOGARITHMIC = {"var": 1e-2, "ratio": 1}  # from here on


def _draw_findings(figure, ax, layers, size):
    """A line for each layer's channels, from the first to the last, with a mark at each finding."""
    from matplotlib.lines import Line2D

    kinds = []
    for y, m in enumerate(layers):
        ax.plot([0, 1], [y, y], color="0.85", lw=3, zorder=0)
        texts = []
        for finding in m.findings:
            indices = [_flat(c, m.mean.shape) for c in finding.channels]
            if finding.kind in MARKS and indices:
                marker, color = MARKS[finding.kind]
                at = np.array(indices) / max(1, m.mean.size - 1)
                ax.plot(at, np.full(len(at), y), marker, color=color, ms=size * 0.8, mew=0)
                kinds.append(finding.kind)
            first = ", ".join(map(str, finding.channels[:3]))
            more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
            texts.append(f"{finding.kind} {first}{more}".strip())
        text = "; ".join(texts) or "nothing found"
        text = text if len(text) < 75 else f"{text[:72]}..."
        ax.text(1.03, y, text, fontsize=size, va="center", color="black" if texts else "0.6")
    ax.set_xlim(-0.02, 2.1)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    names = [f"{_name(m)} ({m.mean.size})" for m in layers]
    ax.set_yticks(range(len(layers)), names, fontsize=size)
    ax.set_xticks([0, 1], ["first\nchannel", "last\nchannel"], fontsize=7)
    ax.set_title("what was found, at which channels", fontsize=9)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    handles = [
        Line2D([], [], ls="", marker=MARKS[kind][0], color=MARKS[kind][1], label=kind)
        for kind in MARKS
        if kind in kinds
    ]
    bars = f"bars: smallest to largest channel, tick: median; {'orange' if kinds else 'blue'}"
    bars += ": a layer with a warning" if kinds else ": a layer without a warning"
    handles.append(Line2D([], [], color=COLORS["without" if kinds else "jbn"], lw=2, label=bars))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)


def _flat(channel, shape):
    """The position of a channel in the features laid out in a row."""
    return int(np.ravel_multi_index(np.atleast_1d(channel), shape))


def _known(values, finite):
    """The values in a row: 0 / 0 is no distance, and x / 0 a very large one, if x is a number."""
    values = np.nan_to_num(np.ravel(values), nan=0, posinf=1e6, neginf=-1e6)
    return np.where(np.ravel(finite), values, 0)


def before_after(
    x: ArrayLike | Sequence[Any],
    params: Params,
    state: State | None = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    channels: int = 8,
) -> Any:
    """The distribution of each channel before and after a layer.

    Args:
        x: the input of the layer.
        params: scale and bias.
        state: the running statistics to normalize by, as in evaluation; None for those of x, as in
            training.
        axis, eps: as in `jbn.batch_norm_train`.
        channels: how many to draw, the first ones; of several feature axes, as they lie in a row.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError, TypeError: as `jbn.batch_norm_train`.  ModuleNotFoundError: matplotlib is
            missing.
    """
    values = jnp.asarray(x)
    axes, channels = validate.axis(axis, values.ndim), validate.positive(channels, "channels")
    if state is None:
        fresh = functional.init([values.shape[a] for a in axes])[1]
        y, _ = functional.batch_norm_train(values, params, fresh, axis=axes, eps=eps)
    else:
        y = functional.batch_norm_eval(values, params, state, axis=axes, eps=eps)
    figure = _figure(10, 4.2)
    mode = "statistics of the batch" if state is None else "running statistics"
    figure.suptitle(f"Before and after batch norm ({mode})", fontweight="bold")
    for ax, drawn, title, color in zip(
        figure.subplots(1, 2),
        (values, y),
        ("before", "after"),
        (COLORS["without"], COLORS["jbn"]),
        strict=True,
    ):
        columns = np.moveaxis(np.asarray(drawn, np.float64), axes, range(-len(axes), 0))
        features = columns.shape[-len(axes) :]
        columns = columns.reshape(-1, np.prod(features))[:, :channels]
        parts = ax.violinplot(
            columns, positions=range(columns.shape[1]), showmedians=True, showextrema=False
        )
        for body in parts["bodies"]:
            body.set(facecolor=color, alpha=0.6)
        parts["cmedians"].set_color("black")
        ax.axhline(0, color="black", lw=0.6)
        ax.set(
            title=title,
            xlabel="channel (line: median)",
            ylabel="value",
            xticks=range(columns.shape[1]),
        )
    return figure


def history(states: Iterable[State], *, every: int = 1, channels: int = 8) -> Any:
    """The running mean and standard deviation over time.

    Args:
        states: recorded in training, in order; the features may have several axes.
        every: steps between two of them.
        channels: how many to draw, the first ones.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: no states, or of different shapes.  TypeError: other things than states.
        ModuleNotFoundError: matplotlib is missing.
    """
    every, channels = validate.positive(every, "every"), validate.positive(channels, "channels")
    if isinstance(states, State) or not isinstance(states, Iterable):
        raise TypeError(f"states is a {type(states).__name__}, expected a list of jbn.State")
    states = list(states)
    if not states:
        raise ValueError("states is empty, expected the jbn.State of several steps, in order")
    for i, state in enumerate(states):
        if not isinstance(state, State):
            raise TypeError(f"states[{i}] is a {type(state).__name__}, expected a jbn.State")
        if (shape := np.shape(state.mean)) != (first := np.shape(states[0].mean)):
            raise ValueError(
                f"states[{i}].mean has shape {shape}, expected {first}, that of states[0]: the "
                "states of one layer"
            )
    means, variances = (
        np.stack([np.ravel(getattr(s, name)) for s in states])[:, :channels]
        for name in ("mean", "var")
    )
    steps = every * np.arange(len(states))
    figure = _figure(10, 4.2)
    figure.suptitle("Running statistics over time", fontweight="bold")
    curves = (("running mean", means), ("running standard deviation", np.sqrt(variances)))
    axes = figure.subplots(1, 2)
    for ax, (name, values) in zip(axes, curves, strict=True):
        for c, column in enumerate(values.T):
            ax.plot(steps, column, label=f"channel {c}")
        ax.set(xlabel="training step", ylabel=name)
        ax.grid(alpha=0.25)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _layers(report) -> Any:
    if not hasattr(report, "findings"):
        raise TypeError(
            f"report is a {type(report).__name__}, expected what jbn.health.report or "
            "jbn.health.model_report returns"
        )
    return getattr(report, "layers", (report,))


def _name(layer):
    """The layer's name as matplotlib shows it: not as a formula."""
    name = "".join(c if c.isprintable() else "?" for c in layer.layer)
    return name.replace("$", r"\$")


def _figure(width, height):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jbn.plot needs matplotlib: pip install 'jbn[examples]' or 'jbn[bench]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
