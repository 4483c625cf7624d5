"""Pictures: what is drawn are the numbers given; a missing matplotlib is named with the extra."""

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


def titles(figure):
    return [ax.get_title().replace("\n", " ") for ax in figure.axes]


def marks(ax):
    """The (channel position, row, marker) of all findings of an overview."""
    return [
        (float(x), int(y), line.get_marker())
        for line in ax.lines
        if line.get_marker() not in ("None", "|")
        for x, y in line.get_xydata()
    ]


def bars(ax):
    """{row: (smallest, largest)} of one column of an overview."""
    lines = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "-"]
    return {int(points[0][1]): (points[0][0], points[-1][0]) for points in lines}


def test_overview_marks_findings_and_shows_the_range_of_every_number(tmp_path):
    model = two_layers()
    report = health.model_report(model)
    figure = plot.overview(report)
    assert titles(figure)[1:] == [
        *("gamma (scale)", "running variance", "|mean| / std of the input"),
        "mean / std of the output",
    ]
    assert "1 warning in 1 of them" in figure.get_suptitle()
    found, scale, var = figure.axes[:3]
    assert marks(found) == [(0.5, 1, plot.MARKS["not finite"][0])]
    texts = [text.get_text() for text in found.texts]
    assert texts == ["nothing found", "not finite 1"]
    assert bars(scale) == {0: (1, 1), 1: (1, 1)}
    expected = np.asarray(model["a"][1].var)
    np.testing.assert_allclose(bars(var)[0], (expected.min(), expected.max()), rtol=1e-6)
    assert is_png(figure, tmp_path / "overview.png")
    moments = {"a": jbn.moments(jnp.asarray(X))}
    with_drift = plot.overview(health.model_report(two_layers(), moments))
    assert titles(with_drift)[-1] == "drift, in running std"
    assert set(bars(with_drift.axes[-1])) == {0}


def test_scale_zero_and_variance_zero_are_numbers():
    """They are marked for what they are, pruned and dead, and not as broken."""
    params = jbn.Params(jnp.array([0.0, 1.0, 1.0]), jnp.zeros(3))
    state = jbn.State(jnp.zeros(3), jnp.array([1.0, 0.0, 1.0]), jnp.int32(500))
    moments = jbn.Moments(
        jnp.full(3, 100.0), jnp.array([0.0, 1.0, 0.0]), jnp.array([100.0, 0, 100])
    )
    report = health.report(params, state, moments)
    found = plot.overview(report).axes[0]
    kinds = {marker: x for x, _, marker in marks(found)}
    assert kinds == {plot.MARKS["prunable"][0]: 0.0} | {plot.MARKS["dead"][0]: 0.5}
    ax = plot.drift(report).axes[0]
    assert not [line for line in ax.lines if line.get_xydata().size]
    assert np.isfinite(table(ax)).all()
    assert table(ax)[0, 1] > 1e3


def test_drift_map_crosses_what_is_not_finite():
    params, state = jbn.init(3)
    state = state._replace(mean=jnp.array([0.0, jnp.nan, 0.0]), count=jnp.int32(9))
    moments = jbn.Moments(jnp.full(3, 100.0), jnp.zeros(3), jnp.full(3, 100.0))
    ax = plot.drift(health.report(params, state, moments)).axes[0]
    assert [tuple(point) for line in ax.lines for point in line.get_xydata()] == [(1, 0)]
    assert np.isnan(table(ax)[0, 1])


@pytest.mark.parametrize(("number", "rows"), [(53, 53), (200, 60)])
def test_an_overview_fits_one_screen(number, rows):
    """ResNet-50 has 53 batch norms; of more than 60 those with findings are shown."""
    params, state = jbn.init(64)
    state = state._replace(count=jnp.int32(500), mean=jnp.ones(64))
    broken = state._replace(var=state.var.at[5].set(jnp.inf))
    layers = {f"layer{k}": (params, broken if k % 50 == 49 else state) for k in range(number)}
    figure = plot.overview(health.model_report(layers))
    width, height = figure.get_size_inches()
    assert width <= 16
    assert height <= 10
    found = figure.axes[0]
    names = [label.get_text() for label in found.get_yticklabels()]
    assert len(names) == rows
    assert {f"layer{k} (64)" for k in range(49, number, 50)} <= set(names)
    assert len(marks(found)) == number // 50
    drift = plot.drift(
        health.model_report(
            {name: layers[name] for name in list(layers)[:53]},
            {
                f"layer{k}": jbn.Moments(*(jnp.full(64, v) for v in (9.0, 1.0, 1.0)))
                for k in range(53)
            },
        )
    )
    assert drift.get_size_inches()[1] <= 10


@pytest.mark.parametrize(
    ("least", "most"), [(0.3, 3), (1e-3, 0.05), (2, 90), (1e-6, 1e3), (1, 1e8), (7, 7)]
)
def test_every_column_of_an_overview_has_ticks(least, most):
    """Over less than two decades a logarithmic axis had one, or numbers such as -3.6e-3."""
    var = jnp.geomspace(least, most, 16)
    moments = {"a": jbn.Moments(jnp.full(16, 9.0), var, 9 * jnp.ones(16))}
    layers = {"a": (jbn.init(16)[0], jbn.State(jnp.zeros(16), var, jnp.int32(1)))}
    figure = plot.overview(health.model_report(layers, moments))
    figure.draw_without_rendering()
    for ax in figure.axes[1:4]:
        low, high = ax.get_xlim()
        seen = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert 2 <= len(seen) <= 6
        if ax.get_xscale() == "symlog":
            assert all(tick == 0 or np.isclose(np.log10(abs(tick)) % 1, 0) for tick in seen)


def test_overview_of_a_single_layer_report():
    params, state = jbn.init(3, use_scale=False)
    figure = plot.overview(health.report(params, state))
    assert titles(figure)[1:] == [
        *("running variance", "|mean| / std of the input"),
        "mean / std of the output",
    ]


def test_the_colour_bar_of_a_drift_map_is_whole():
    """Nothing of the label lies outside the picture, however few layers there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    params, state = jbn.init(4)
    figure = plot.drift(health.report(params, state, jbn.moments(jnp.asarray(X))))
    FigureCanvasAgg(figure).draw()
    box = figure.axes[1].get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height


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


def test_before_and_after_of_several_axes_and_of_a_list():
    x = X[:48].reshape(8, 2, 3, 4)
    figure = plot.before_after(x.tolist(), jbn.init((2, 4))[0], axis=(1, 3), channels=5)
    columns = x.swapaxes(1, 2).reshape(-1, 8)[:, :5]
    for ax, expected in zip(figure.axes, (columns, oracle.forward(columns)[0]), strict=True):
        medians = [segment[0, 1] for segment in ax.collections[-1].get_segments()]
        np.testing.assert_allclose(medians, np.median(expected, 0), rtol=1e-4, atol=1e-4)


def test_arguments_of_the_wrong_kind():
    params, state = jbn.init(4)
    for kind in (plot.drift, plot.overview):
        with pytest.raises(TypeError, match="report is a dict, expected what"):
            kind({"report": health.report(params, state)})
    with pytest.raises(ValueError, match="axis 7 is out of range for x of rank 2"):
        plot.before_after(X, params, axis=7)
    with pytest.raises(ValueError, match="channels is 0, expected at least 1"):
        plot.before_after(X, params, channels=0)
    for states in (state, 3, [3]):
        with pytest.raises(TypeError, match="expected a"):
            plot.history(states)
    with pytest.raises(ValueError, match=r"states\[1\].mean has shape \(2,\), expected \(4,\)"):
        plot.history([state, jbn.init(2)[1]])
    for option in ("every", "channels"):
        with pytest.raises(ValueError, match=f"{option} is 0, expected at least 1"):
            plot.history([state], **{option: 0})


def test_a_layer_name_is_no_formula(tmp_path):
    params, state = jbn.init(4)
    report = health.report(params, state, jbn.moments(jnp.asarray(X)), layer="a$\\b$\x1b")
    for kind in (plot.drift, plot.overview):
        assert is_png(kind(report), tmp_path / "name.png")


def test_history_draws_every_recorded_step(tmp_path):
    params, state = jbn.init(4)
    states = [state]
    for _ in range(5):
        states.append(jbn.batch_norm_train(jnp.asarray(X), params, states[-1], momentum=0.5)[1])
    figure = plot.history(iter(states), every=10, channels=2)
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
