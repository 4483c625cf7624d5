"""Pictures of batch-norm layers, as matplotlib figures: `plot.drift(report).savefig("drift.png")`. Matplotlib is an extra."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from jbn import functional
from jbn.types import Params, State

# The colours of every picture of jbn: jbn itself, another library, a network without batch norm,
# and whatever else is compared.
COLORS = {"jbn": "#0b6fb8", "peer": "#8a8a8a", "without": "#d1581c", "other": "#3c9a5f"}


def drift(report: Any) -> Any:
    """How far training and running statistics lie apart: a heat map, one row per layer, one column
    per channel.

    Args:
        report: of `jbn.health`, of a layer or a model, made with the moments of a batch.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: no layer of the report has moments.  ModuleNotFoundError: matplotlib is missing.
    """
    rows = {m.layer: m.drift for m in _layers(report) if m.drift is not None}
    if not rows:
        raise ValueError(
            "the report holds no drift, expected one made with moments: report(params, state, jbn.moments(x))"
        )
    figure = _figure(10, 1.8 + 0.35 * len(rows))
    figure.suptitle("Drift of the batch from the running statistics", fontweight="bold")
    _heat_map(
        figure,
        figure.subplots(),
        rows,
        "drift of the mean,\nrunning standard deviations",
        limits=(-3, 3),
    )
    return figure


def overview(report: Any) -> Any:
    """All numbers of a report as heat maps, one row per layer, one column per channel; drift only
    where it is known.

    Args:
        report: of `jbn.health`, of a layer or a model.

    Returns:
        A matplotlib Figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    layers = _layers(report)
    rows = {
        name: {m.layer: getattr(m, name) for m in layers}
        for name in ("drift", "signal", "ratio", "one_sided", "scale")
    }
    rows["signal"] = {name: 1 - values for name, values in rows["signal"].items()}
    rows["ratio"] = {name: _log(values) for name, values in rows["ratio"].items()}
    panels = [
        (
            "drift",
            "Drift: how far the batch's mean lies from the running mean",
            "running std",
            (-3, 3),
        ),
        (
            "signal",
            "Dead: 0 in a working channel, 1 where the input does not vary",
            "1 - √(var/(var+eps))",
            (0, 1),
        ),
        (
            "ratio",
            "Cancellation: at 2 the mean is 100 standard deviations",
            "log10 |mean| / std",
            (0, 2),
        ),
        (
            "one_sided",
            "Output: 0 is centred, beyond 4 on either side it hardly ever crosses zero",
            "mean / std",
            (-4, 4),
        ),
        ("scale", "Scale: 0 can be pruned", "scale", (-2, 2)),
    ]
    panels = [panel for panel in panels if any(v is not None for v in rows[panel[0]].values())]
    figure = _figure(10, len(panels) * (1.3 + 0.25 * len(layers)))
    figure.suptitle(
        "Batch norms, one row per layer (grey: no such channel or not known, cross: not a number)",
        fontweight="bold",
    )
    for ax, (name, title, unit, limits) in zip(
        np.atleast_1d(figure.subplots(len(panels), 1)), panels, strict=True
    ):
        _heat_map(figure, ax, rows[name], unit, limits=limits)
        ax.set_title(title, fontsize=10, loc="left")
    return figure


def before_after(
    x: Array,
    params: Params,
    state: State | None = None,
    *,
    axis: int = -1,
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
        channels: how many to draw, the first ones.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError, TypeError: as `jbn.batch_norm_train`.  ModuleNotFoundError: matplotlib is
            missing.
    """
    if state is None:
        y, _ = functional.batch_norm_train(
            x, params, functional.init(x.shape[axis])[1], axis=axis, eps=eps
        )
    else:
        y = functional.batch_norm_eval(x, params, state, axis=axis, eps=eps)
    figure = _figure(10, 4.2)
    mode = "statistics of the batch" if state is None else "running statistics"
    figure.suptitle(f"Before and after batch norm ({mode})", fontweight="bold")
    for ax, values, title, color in zip(
        figure.subplots(1, 2), (x, y), ("before", "after"), (COLORS["without"], COLORS["jbn"]), strict=True
    ):
        columns = np.moveaxis(np.asarray(values, np.float64), axis, -1)
        columns = columns.reshape(-1, columns.shape[-1])[:, :channels]
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


def history(states: Sequence[State], *, every: int = 1, channels: int = 8) -> Any:
    """The running mean and standard deviation over time.

    Args:
        states: recorded in training, in order; the features may have several axes.
        every: steps between two of them.
        channels: how many to draw, the first ones.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: no states.  ModuleNotFoundError: matplotlib is missing.
    """
    if not states:
        raise ValueError("states is empty, expected the jbn.State of several steps, in order")
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


def _layers(report):
    return getattr(report, "layers", (report,))


def _log(values):
    return np.log10(np.maximum(values, 1))  # below 1 nothing cancels


def _figure(width, height):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jbn.plot needs matplotlib: pip install 'jbn[examples]' or 'jbn[bench]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _heat_map(figure, ax, rows, unit, *, limits):
    """Blue below zero, white at zero, red above."""
    known = {layer: values for layer, values in rows.items() if values is not None}
    table = np.full((len(rows), max(values.size for values in known.values())), np.nan)
    for y, (layer, row) in enumerate(zip(rows, table, strict=True)):
        values = np.ravel(known.get(layer, ()))
        row[: values.size] = values
        broken = np.flatnonzero(~np.isfinite(values))
        ax.plot(broken, np.full(broken.size, y), "x", color="black")
    colormap = "RdBu_r" if limits[0] < 0 else "Reds"
    colors = ax.imshow(
        np.ma.masked_invalid(table), aspect="auto", interpolation="nearest", cmap=colormap
    )
    colors.set_clim(*limits)
    ax.set_facecolor("0.8")
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ax.set_xlabel("channel")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(colors, ax=ax, label=unit, extend="both" if limits[0] < 0 else "max")
