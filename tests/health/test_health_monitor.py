"""Monitor names layer, kind and step of planted faults, and says nothing of a healthy run."""

import importlib.util
import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jbn import health

_SPEC = importlib.util.spec_from_file_location(
    "example_watch", Path(__file__).parents[2] / "examples" / "watch.py"
)
watch = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(watch)
HEALTHY = {"signal": 0.99, "dead": 0.0, "one_sided": 0.0, "nonfinite": 0.0, "ratio": 1.0}


def fed(series, monitor=None):
    """The events of a run whose metrics of one layer are HEALTHY but for some series."""
    monitor = monitor or health.Monitor()
    length = max(map(len, series.values()))
    for step in range(length):
        values = HEALTHY | {key: v[step] for key, v in series.items()}
        monitor.update(step, {f"bn/{key}": np.float32(v) for key, v in values.items()})
    return [(e.step, e.kind, e.back) for e in monitor.events]


@pytest.mark.third_party  # optax counts its steps in int32
def test_planted_faults_are_named_within_20_steps():
    """Half the units die at 200, the learning rate is too high at 300, the data change at 400."""
    monitor, variables = watch.watch(430, faults=True, progress=iter)
    first = {}
    for event in monitor.events:
        if not event.back:
            first.setdefault((event.layer, event.kind, event.step // 100), event.step)
    for layer, kind, step in (
        ("BatchNorm_1", "dead", 172),
        ("BatchNorm_0", "learning rate", 258),
        ("BatchNorm_0", "input scale", 344),
    ):
        assert step <= first[layer, kind, step // 100] < step + 20
    assert min(event.step for event in monitor.events) == 172
    page = monitor.to_html(health.model_report(variables))
    for words in (">dead<", ">learning rate<", ">input scale<", "Remedy: lower the learning rate"):
        assert words in page


@pytest.mark.third_party
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_healthy_run_gives_no_warning(seed):
    monitor, _ = watch.watch(400, faults=False, seed=seed, progress=iter)
    assert monitor.events == []
    steps, values = monitor.series("BatchNorm_1/drift")
    assert steps.tolist() == list(range(400))
    assert np.isfinite(values).all()
    assert "Nothing crossed a limit" in monitor.to_html()


@pytest.mark.parametrize(
    ("key", "bad", "kind"),
    [
        ("dead", 0.1, "dead"),
        ("nonfinite", 2.0, "not finite"),
        ("one_sided", 0.1, "one-sided"),
        ("signal", 0.5, "variance near eps"),
        ("ratio", 101.0, "cancellation"),
        ("std", 1e20, "overflow"),
        ("update", 0.6, "learning rate"),
        ("missing", 1.0, "missing"),
    ],
)
def test_a_fixed_limit_counts_from_the_first_update_and_ends(key, bad, kind):
    good = {"std": 1.1, "update": 1e-3, "missing": 0.0, **HEALTHY}[key]
    events = fed({key: [bad, bad, good, good, good, good]})
    assert events == [(0, kind, False), (4, kind, True)]


def test_a_number_that_flickers_is_told_once():
    assert fed({"dead": [0.1, 0, 0.1, 0, 0, 0.1]}) == [(0, "dead", False)]


def test_a_share_that_grows_is_told_again():
    assert fed({"dead": [0.1, 0.2, 0.4, 0.5]}) == [(0, "dead", False), (2, "dead", False)]


def test_drift_is_compared_with_the_run():
    noise = list(0.6 + 0.1 * np.random.default_rng(0).uniform(size=100))
    one = [1.0] * 102
    drift = {"spread": one, "input_std": one}
    assert fed({"drift": [*noise, 1.9, 0.6], **drift}) == []  # three times the largest is 2.1
    assert fed({"drift": [*noise, 2.2, 2.2], **drift}) == [(100, "drift", False)]
    assert fed({"drift": [9.0] * 102, **drift}) == []  # nothing smaller to compare with


def test_a_limit_does_not_follow_a_number_that_grows_slowly():
    grows = [0.4] * 80 + [0.4 * 1.08**i for i in range(80)]
    ones = [1.0] * 160
    events = fed({"drift": grows, "spread": ones, "input_std": ones})
    # 1.08^i is beyond 3 times what it was 20 updates before, or at the start, at i = 15.
    assert events == [(95, "drift", False)]


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_a_dying_layer_shows_in_the_decay_of_its_running_variance(momentum):
    rng, var, std = np.random.default_rng(0), np.float32(1), []
    for step in range(220):
        batch = 0 if step >= 200 else 2 + 0.1 * rng.normal()
        var = np.float32(momentum * var + (1 - momentum) * batch)
        std.append(math.sqrt(var))
    events = [e for e in fed({"std": std}) if e[1] == "dead"]
    assert events
    assert 200 <= events[0][0] <= 205


def test_the_decay_of_the_initial_variance_is_no_death():
    var = [0.99**i + (1 - 0.99**i) * 1e-3 for i in range(300)]
    assert [e for e in fed({"std": np.sqrt(var)}) if e[1] == "dead"] == []


def test_scale_of_the_input_with_and_without_the_batch():
    batch = [1.0] * 100 + [1.6] * 3
    ones = [1.0] * 103
    assert fed({"drift": ones, "spread": ones, "input_std": batch})[0] == (
        100,
        "input scale",
        False,
    )
    running = [1.0001] * 100 + [math.sqrt(0.99**i + (1 - 0.99**i) * 9) for i in range(1, 21)]
    ((step, kind, _),) = fed({"std": running})
    assert kind == "input scale"
    assert 100 < step < 120


def test_statistics_never_updated():
    assert fed({"std": [1.0] * 60}) == [(49, "never updated", False)]
    assert fed({"std": [1.5] * 60}) == []


def test_scales_that_fall_to_zero():
    assert fed({"scale": [1.0, 1.0, 1e-4]}) == [(2, "prunable", False)]
    assert fed({"scale": [0.0, 0.0, 1e-4]}) == []  # a residual branch that starts at 0


def test_a_jump_of_the_scales_is_a_learning_rate():
    calm = [1 + 1e-3 * i for i in range(60)]
    assert fed({"scale": [*calm, 1.5]}) == [(60, "learning rate", False)]
    assert fed({"scale": [*calm, 1.064]}) == []


def test_what_is_kept_and_what_it_refuses():
    monitor = health.Monitor(keep=100)
    for step in range(150):
        monitor.update(step, {"bn/dead": np.float32(0), "loss": math.nan})
    assert monitor.series("loss")[0].tolist() == list(range(50, 150))
    decoded = json.loads(monitor.to_json(), parse_constant=pytest.fail)
    assert decoded["series"]["loss"]["values"] == [None] * 100
    with pytest.raises(ValueError, match="step is 3 after step 149"):
        monitor.update(3, {})
    with pytest.raises(TypeError, match="metric 'a' is "):
        monitor.update(150, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="keep is 10, expected at least 100"):
        health.Monitor(keep=10)
    assert (
        health.Monitor(keep=10, changes=health.Changes(warmup=5, history=10, steps=4)).active == ()
    )


@pytest.mark.parametrize(
    ("step", "metrics", "words"),
    [
        ("a", {}, "step is 'a', expected an int"),
        (1.5, {}, "step is 1.5, expected an int"),
        (0, None, "metrics is None, expected a dict from names to scalars"),
        (0, {3: 1.0}, "metrics is {3: 1.0}, expected a dict"),
        *((0, {"loss": 1.0, "a": v}, "metric 'a' is ") for v in (None, "x", [1.0], 1j)),
    ],
)
def test_what_is_no_metric_is_refused_whole(step, metrics, words):
    monitor = health.Monitor()
    with pytest.raises(TypeError, match=re.escape(words)):
        monitor.update(step, metrics)
    assert monitor.names == ()


def test_metrics_of_every_scalar_type_and_without_their_companions():
    monitor = health.Monitor()
    values = {"a": jnp.bfloat16(2), "b": 3, "c": True, "bn/drift": 0.1, "bn/std": 1.5}
    for _ in range(60):  # several updates of one step
        assert monitor.update(jnp.int32(3), values) == []
    assert [monitor.series(name)[1][-1] for name in "abc"] == [2, 3, 1]
    assert monitor.series("a")[0].tolist() == [3] * 60


def test_options_of_the_wrong_kind():
    for option in ("limits", "changes", "keep"):
        with pytest.raises(TypeError, match=f"{option} is "):
            health.Monitor(**{option: {}})


def test_events_say_where_and_when():
    monitor = health.Monitor()
    (event,) = monitor.update(7, {"block/bn/dead": np.float32(0.5)})
    assert (event.layer, event.kind, event.step, event.back) == ("block/bn", "dead", 7, False)
    assert str(event).startswith("step 7: block/bn: dead: the input of 50% of the channels")
    assert monitor.active == (event,)
    for step in range(8, 11):
        events = monitor.update(step, {"block/bn/dead": np.float32(0)})
    assert (
        str(events[0]) == "step 10: block/bn: dead: back within the limit that it crossed at step 7"
    )
    assert monitor.active == ()
