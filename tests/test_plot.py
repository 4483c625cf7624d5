"""Pictures: what is drawn are the numbers that were given; a missing matplotlib is named with the extra."""

import builtins

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn
from jbn import health, plot

X = np.random.default_rng(0).normal([0, 5, -2, 1], [1, 2, 0.5, 1], (64, 4)).astype(np.float32)


def two_layers():
    """A healthy layer of four channels and one of three, with a NaN; only the first has moments."""
    params, state = jbn.init(4)
    _, state = jbn.batch_norm_train(jnp.asarray(X), params, state, momentum=0.5)
    broken = jbn.State(jnp.array([0.0, jnp.nan, 1.0]), jnp.ones(3), jnp.int32(3))
    return {"a": (params, state), "b": (jbn.init(3)[0], broken)}


def table(ax):
    """The numbers of a heat map, NaN where nothing is drawn."""
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def is_png(figure, path):
    figure.savefig(path)
    return path.read_bytes().startswith(b"\x89PNG")


def test_drift_map_shows_the_drift(tmp_path):
    model = two_layers()
    report = health.model_report(model, {"a": jbn.moments(jnp.asarray(X))})
    figure = plot.drift(report)
    ax = figure.axes[0]
    mean, var = np.float64(model["a"][1].mean), np.float64(model["a"][1].var)
    np.testing.assert_allclose(
        table(ax), ((oracle.moments(X).mean - mean) / np.sqrt(var))[None], rtol=1e-5, atol=1e-6
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a"]
    assert is_png(figure, tmp_path / "drift.png")


def test_drift_map_without_moments_says_what_to_pass():
    with pytest.raises(ValueError, match=r"expected one made with moments"):
        plot.drift(health.model_report(two_layers()))


def test_overview_leaves_out_what_is_not_known_and_marks_what_is_not_finite(tmp_path):
    report = health.model_report(two_layers())
    figure = plot.overview(report)
    titles = [ax.get_title(loc="left").split(":")[0] for ax in figure.axes if ax.images]
    assert titles == ["Dead", "Cancellation", "Output", "Scale"]
    scale = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("Scale"))
    np.testing.assert_array_equal(table(scale), [[1, 1, 1, 1], [1, 1, 1, np.nan]])
    output = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("Output"))
    crosses = [(x, y) for line in output.lines for x, y in line.get_xydata()]
    assert crosses == [(1.0, 1.0)]
    assert np.isnan(table(output)[1, 1])
    assert is_png(figure, tmp_path / "overview.png")
    with_drift = plot.overview(
        health.model_report(two_layers(), {"a": jbn.moments(jnp.asarray(X))})
    )
    assert with_drift.axes[0].get_title(loc="left").startswith("Drift")


def test_overview_of_a_single_layer_report():
    params, state = jbn.init(3, use_scale=False)
    figure = plot.overview(health.report(params, state))
    assert len([ax for ax in figure.axes if ax.images]) == 3


@pytest.mark.parametrize("axis", [-1, 0])
def test_before_and_after_draw_the_medians(axis, tmp_path):
    params, state = jbn.init(4)
    x = np.moveaxis(X, -1, axis)
    batch = plot.before_after(jnp.asarray(x), params, axis=axis, channels=3)
    running = plot.before_after(jnp.asarray(x), params, state, axis=axis)
    y, _ = oracle.forward(X)
    for figure, values in (
        (batch, (X[:, :3], y[:, :3])),
        (running, (X, oracle.normalize(X, np.zeros(4), np.ones(4)))),
    ):
        for ax, expected in zip(figure.axes, values, strict=True):
            medians = [segment[0, 1] for segment in ax.collections[-1].get_segments()]
            np.testing.assert_allclose(medians, np.median(expected, 0), rtol=1e-4, atol=1e-4)
    assert is_png(batch, tmp_path / "before_after.png")


def test_history_draws_every_recorded_step(tmp_path):
    params, state = jbn.init(4)
    states = [state]
    for _ in range(5):
        states.append(jbn.batch_norm_train(jnp.asarray(X), params, states[-1], momentum=0.5)[1])
    figure = plot.history(states, every=10, channels=2)
    mean, std = figure.axes
    assert len(mean.lines) == len(std.lines) == 2
    steps, values = mean.lines[1].get_data()
    np.testing.assert_array_equal(steps, [0, 10, 20, 30, 40, 50])
    np.testing.assert_allclose(
        values, X[:, 1].astype(float).mean() * (1 - 0.5 ** np.arange(6)), rtol=1e-5
    )
    spread = np.sqrt(1 + (X[:, 1].astype(float).var() - 1) * (1 - 0.5 ** np.arange(6)))
    np.testing.assert_allclose(std.lines[1].get_ydata(), spread, rtol=1e-5)
    assert is_png(figure, tmp_path / "history.png")
    with pytest.raises(ValueError, match="states is empty"):
        plot.history([])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jbn\[examples\]'"):
        plot.history([jbn.init(2)[1]])
