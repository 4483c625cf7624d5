"""The benchmark: every peer computes the same, clocks are read right, and a hang costs one row."""

import contextlib
import functools
import importlib
import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.bench import __main__ as bench
from jbn.bench import (
    cases,
    device,
    kernel_checks,
    networks,
    op,
    parts,
    peer_layers,
    peers,
    pictures,
    report,
    resnet,
    timing,
    traffic,
)
from jbn.plot import COLORS

CASES = {
    "channels_last": cases.Case("images", (4, 6, 6, 8)),
    "channels_first": cases.Case("images", (4, 8, 6, 6), axis=1),
    "dense": cases.Case("dense", (64, 8)),
}


def _expected(problem, x, residual, dy):
    """(y, dx) in float64 for scale 1 and bias 0."""
    axes = tuple(a for a in range(x.ndim) if a != problem.case.axis % x.ndim)
    x, residual, dy = (np.asarray(a, np.float64) for a in (x, residual, dy))
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + peer_layers.EPS)
    xhat = (x - mean) * rstd
    z = xhat + residual if problem.adds else xhat
    dz = dy * (z > 0) if problem.relu else dy
    dx = rstd * (dz - dz.mean(axes, keepdims=True) - xhat * (dz * xhat).mean(axes, keepdims=True))
    return np.maximum(z, 0) if problem.relu else z, dx


# --- every peer computes what the problem says ---


@pytest.mark.third_party
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "library",
    [
        "jbn_linen",
        "haiku",
        "equinox",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flax_linen", "flax_nnx")),
    ],
)
def test_jax_peers_agree_with_float64(library, case):
    if library in ("haiku", "equinox") and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library} of the peers extra")
    operation = "bn" if case is CASES["dense"] else "bn_add_relu"
    problem = cases.Problem(case, operation, "forward_backward", "float32")
    layer = getattr(peer_layers, library)(problem)
    ((x, residual, dy),) = peers.arrays(problem, 1)
    out = jax.jit(peers.jax_function(problem, layer))(layer.params, layer.stats, x, residual, dy)
    y, dx = _expected(problem, x, residual, dy)
    # 144 rows, mean 1/4 of the deviation: a few roundings of float32.
    np.testing.assert_allclose(out[0], y, atol=1e-5)
    np.testing.assert_allclose(out[2][1], dx, atol=1e-5)
    if problem.adds:
        np.testing.assert_allclose(out[2][2], np.asarray(dy) * (y > 0), atol=1e-6)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_torch_agrees_with_float64(operation):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    import torch

    from jbn.bench import peers_torch

    problem = cases.Problem(CASES["channels_first"], operation, "forward_backward", "float32")
    ((x, residual, dy),) = peers.arrays(problem, 1)
    tensors = [torch.tensor(np.asarray(a)) for a in (x, residual, dy)]
    leaves = [t.requires_grad_() for t in (*tensors[:2], torch.ones(8), torch.zeros(8))]
    mean, var = torch.zeros(8), torch.ones(8)
    y, grads = peers_torch.function(problem)(
        leaves[0], leaves[1], tensors[2], leaves[2], leaves[3], mean, var
    )
    expected_y, expected_dx = _expected(problem, x, residual, dy)
    np.testing.assert_allclose(y.detach(), expected_y, atol=1e-5)
    np.testing.assert_allclose(grads[0], expected_dx, atol=1e-5)
    # The same momentum as the others: the old mean, 0, keeps 0.9 of its weight.
    np.testing.assert_allclose(mean, 0.1 * np.asarray(x).mean((0, 2, 3)), rtol=1e-4)


@pytest.mark.third_party
@pytest.mark.slow
def test_both_norms_of_the_model_have_one_tree_and_one_loss():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    (init, step), (other_init, other_step) = (
        networks.training(norm, blocks=(1,), dtype=jnp.float32) for norm in resnet.norms().values()
    )
    assert jax.eval_shape(init, jax.random.key(0), images) == jax.eval_shape(
        other_init, jax.random.key(0), images
    )
    state = jax.jit(init)(jax.random.key(0), images)
    loss, other_loss = (
        float(jax.jit(fn)(state, images, jnp.arange(4))[1]) for fn in (step, other_step)
    )
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert loss == pytest.approx(np.log(1000), rel=0.2)  # nothing learned yet


# --- clocks ---


class _Clock:
    """A machine whose time passes only while contestants run."""

    def __init__(self):
        self.now, self.slowness, self.order = 0.0, 1.0, []  # order: (name, input set) of each call

    def contestant(self, name, seconds):
        def run(i):
            self.order.append((name, i))
            self.now += seconds * self.slowness
            return i

        return timing.Contestant(name, run, lambda result: None)


def test_rounds_are_interleaved_and_ratios_survive_a_slow_spell(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    contestants = [
        clock.contestant("a", 0.5),
        clock.contestant("b", 1.0),
        clock.contestant("c", 2.0),
    ]
    one, rounds = timing._one, iter(range(100))

    def disturbed(*args):
        clock.slowness = (
            10.0 if next(rounds) // 3 % 3 == 1 else 1.0
        )  # every third round, for everybody
        return one(*args)

    monkeypatch.setattr(timing, "_one", disturbed)
    samples = timing.measure(contestants, rounds=9, seconds=1.0)
    assert timing.ratio(samples["c"], samples["b"]) == 2
    assert timing.ratio(samples["a"], samples["b"]) == 0.5
    assert samples["b"].quartiles == (1, 1, 10)
    calls = clock.order[9:]  # after two of warm-up and one of calibration for each
    found = [
        calls[start : start + 7] for start in range(0, len(calls), 7)
    ]  # a: 1 + 2, b and c: 1 + 1, the first untimed
    assert [set(each) for each in found] == [{(name, r) for name in "abc"} for r in range(9)]
    assert (
        len(set(map(tuple, found))) > 3
    )  # more than a rotation, in which the same one always comes before


def _profile(*planes):
    event = lambda start, name, stats: types.SimpleNamespace(
        start_ns=start, name=name, stats=stats.items(), duration_ns=start
    )
    made = [
        types.SimpleNamespace(
            name=plane,
            lines=[
                types.SimpleNamespace(name=n, events=[event(*e) for e in events])
                for n, events in lines.items()
            ],
        )
        for plane, lines in planes
    ]
    return types.SimpleNamespace(planes=made)


def test_profiles_of_gpu_and_tpu_are_read():
    kernels = [
        (3e9, "k3", {"hlo_module": "jit_b"}),
        (1e9, "k1", {"hlo_module": "jit_a"}),
        (2e9, "memset", {}),
    ]
    gpu = ("/device:GPU:0", {"Stream #1": kernels, "XLA Ops": kernels})
    host = ("/host:CPU", {"python": kernels})
    assert timing.module_seconds(_profile(gpu, host)) == {"jit_a": [1.0], "jit_b": [3.0]}
    tpu = (
        "/device:TPU:0",
        {
            "XLA Modules": [(4e9, "jit_a(123)", {})],
            "XLA Ops": [(1e9, "fusion", {"hlo_module": "jit_a"})],
        },
    )
    assert timing.module_seconds(_profile(tpu)) == {"jit_a": [4.0]}


def test_device_times_belong_to_rounds():
    # 2 rounds of 1 + 2 calls of 2 kernels; the first call of a round is not counted.
    events = [9, 9, 1, 2, 3, 4, 9, 9, 5, 5, 6, 6]
    assert timing._per_round(events, 2, 3) == [5, 11]
    assert timing._per_round(events[:-1], 2, 3) == []
    assert timing._per_round([], 2, 3) == []


_TRACED = """
import pathlib, sys
import jax, jax.numpy as jnp
from jbn.bench import peers, timing
run = peers.jit_as("jbn_traced", lambda x: jnp.sin(x) * 2)
x = jnp.ones((512, 512))
run(x).block_until_ready()
with jax.profiler.trace(sys.argv[1]):
    for _ in range(3):
        run(x).block_until_ready()
(path,) = pathlib.Path(sys.argv[1]).rglob("*.xplane.pb")
profile = jax.profiler.ProfileData.from_file(str(path))
found = timing.module_seconds(profile, plane="/host:CPU")["jit_jbn_traced"]
assert len(found) >= 3 and min(found) > 0, found
"""


def test_a_real_profile_names_our_module(tmp_path):
    # In a process of its own: under pytest, jaxlib 0.12.0.1 aborts while it reads the profile.
    subprocess.run([sys.executable, "-c", _TRACED, str(tmp_path)], check=True, timeout=120)


# --- a planted slowdown ---


def _slower(make_layer, passes):
    """The layer with passes over y that nothing needs.

    y is made to depend on a sum of y, so that no fusion holds both.
    """

    def make(problem, **options):
        layer = make_layer(problem, **options)

        def train(params, stats, x, residual):
            y, new = layer.train(params, stats, x, residual)
            for _ in range(passes):
                y = y + 1e-6 * jnp.cos(y.sum(0, keepdims=True))
            return y, new

        return layer._replace(train=train)

    return make


def test_an_extra_pass_shows_in_traffic():
    problem = cases.Problem(cases.Case("dense", (4096, 256)), "bn_relu", "forward", "float32")
    plain, slow = (
        traffic.layer_row("cpu", problem, make)
        for make in (peer_layers.jbn_linen, _slower(peer_layers.jbn_linen, 1))
    )
    assert slow["moved_T"] > plain["moved_T"] + 0.9


def test_extra_passes_show_in_op():
    problem = cases.Problem(cases.Case("dense", (8192, 256)), "bn_relu", "forward", "float32")
    plain = peers.jax_peer("flax.linen", "", peer_layers.jbn_linen)  # under the reference's name
    slow = peers.jax_peer("jbn", "slow", _slower(peer_layers.jbn_linen, 4))
    (rows,) = op.measure([problem], [plain, slow], rounds=9, seconds=0.002)
    assert rows[1]["implementation"] == "slow"
    assert rows[1]["ratio_vs_flax"] > 1.3


# --- traffic ---


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda a, b: a + b, 0),
        (lambda a, b: a * b, 2 * 4000),  # each is the other's factor
        (lambda a, b: jnp.sin(a) + b, 4000),  # cos(a)
        (lambda a, b: a * b + a * b, 2 * 4000),  # kept once, used twice
        (lambda a, b: a.astype(jnp.bfloat16) * b.astype(jnp.bfloat16), 2 * 2000),
    ],
    ids=["linear", "product", "sin", "shared", "bfloat16"],
)
def test_saved_bytes_of_known_functions(function, kept):
    x = jax.ShapeDtypeStruct((10, 100), jnp.float32)
    assert traffic.saved_bytes(lambda a, b: (function(a, b), None), x, x) == kept


@pytest.mark.third_party
def test_saved_residuals():
    problem = cases.Problem(
        cases.Case("dense", (4096, 256)), "bn_relu", "forward_backward", "bfloat16"
    )
    jbn, flax = (
        traffic.layer_row("cpu", problem, make)["saved_T"]
        for make in (peer_layers.jbn_linen, peer_layers.flax_linen)
    )
    assert 1 <= jbn < 1.1  # x and vectors
    assert flax > 4


# --- parts and their processes ---


def test_parts_suit_the_platform():
    assert parts.names("cpu")[:3] == ["copy", "correctness xla", "speed xla"]
    assert "correctness triton" in parts.names("gpu")
    assert all(list(parts.items(name, backend="cpu")) for name in parts.names("cpu"))
    sweep = [name for name in parts.names("gpu") if name.startswith("sweep")]
    assert sweep
    for name in sweep:
        module, constants = kernel_checks.SWEEPS[name.split()[1]]
        assert all(hasattr(importlib.import_module(module), constant) for constant in constants)


@pytest.mark.parametrize("name", list(kernel_checks.PASSES))
def test_the_check_of_a_function_passes_the_right_and_fails_the_wrong(name):
    for dtype, with_residual in (("float32", False), ("bfloat16", name != "fwd_stats")):
        inputs = kernel_checks.inputs(256, 24, dtype, with_residual=with_residual)
        right = jax.jit(kernel_checks.function("xla", name))(inputs)
        assert kernel_checks.error(name, inputs, right) <= kernel_checks.tolerance(name, dtype)
        wrong = jax.tree.map(lambda a: a.at[..., 3].multiply(1.02), right)
        assert kernel_checks.error(name, inputs, wrong) > kernel_checks.tolerance(name, dtype)
        poisoned = jax.tree.map(lambda a: a.at[..., 3].set(jnp.nan), right)
        assert kernel_checks.error(name, inputs, poisoned) == np.inf


_CHILD = """
import json, os, sys, time
name, first, path = sys.argv[1:]
with open(path, "a", buffering=1) as file:
    for number in range(int(first), 4):
        file.write(json.dumps({"begin": number, "label": f"item {number}"}) + "\\n")
        if number == 1: time.sleep(100)
        if number == 2: os.abort()
        file.write(json.dumps({"row": {"part": name, "case": f"item {number}"}}) + "\\n")
        file.write(json.dumps({"end": number}) + "\\n")
"""


def test_a_hang_and_a_crash_cost_one_row_each(monkeypatch):
    monkeypatch.setattr(
        device, "_child", lambda *arguments: [sys.executable, "-c", _CHILD, *arguments]
    )
    rows = device.run_part("speed x", device.Limits(part=60, item=1.5))
    assert [row["case"] for row in rows] == ["item 0", "item 1", "item 2", "item 3"]
    assert [row.get("status", "").split(":")[0] for row in rows] == [
        "",
        "hung",
        "ended with -6",
        "",
    ]


def test_a_part_ends_when_its_time_is_up_and_when_it_cannot_begin(monkeypatch):
    monkeypatch.setattr(
        device, "_child", lambda *arguments: [sys.executable, "-c", _CHILD, *arguments]
    )
    rows = device.run_part("speed x", device.Limits(part=2, item=60))
    assert [row.get("status") for row in rows] == [None, "time is up: 2 s"]
    monkeypatch.setattr(
        device, "_child", lambda *arguments: [sys.executable, "-c", "import nowhere"]
    )
    (row,) = device.run_part("speed x", device.Limits(part=60, item=60))
    assert row["status"] == "ended with 1: ModuleNotFoundError: No module named 'nowhere'"


# --- what is printed ---

_ROW = {
    "case": "bn/a",
    "mode": "eval",
    "dtype": "float32",
    "implementation": "",
    "peer": "flax.linen",
    "ratio_vs_flax": 1.0,
}
_ROW |= {"median_ms": 2.0, "times_roofline": 1.25, "part": "op"}
_ROWS = [
    _ROW,
    _ROW
    | {
        "peer": "jbn",
        "implementation": "default",
        "ratio_vs_flax": 0.51234,
        "times_roofline": 0.75,
    },
]


def test_table_is_aligned_and_json_comes_back(tmp_path):
    lines = report.table(_ROWS, ("case", "peer", "ratio_vs_flax")).splitlines()
    assert lines == [
        "case  peer        ratio_vs_flax",
        "bn/a  flax.linen              1",
        "      jbn                0.5123",
    ]
    assert report.markdown(_ROWS, ("case", "ratio_vs_flax")).splitlines()[-1] == "| bn/a | 0.5123 |"
    report.write_json(tmp_path / "rows.jsonl", _ROWS)
    assert report.read_json(tmp_path / "rows.jsonl") == _ROWS


def test_pictures_and_pages_are_written(tmp_path):
    speeds = [
        {
            "part": f"speed {name}",
            "case": "fwd_stats 8x8",
            "dtype": "bfloat16",
            "implementation": name,
            "GB_per_s": 5.0,
        }
        for name in ("xla", "triton")
    ]
    rows = [
        row | {"device": "cpu: 2 cores", "jax": "0", "date": "today"} for row in [*_ROWS, *speeds]
    ]
    device.write(tmp_path, rows)
    assert "| bn/a | eval |" in (tmp_path / "results.md").read_text()
    assert report.read_json(tmp_path / "results.jsonl") == rows
    for name in ("op", "kernels"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def _drawn(monkeypatch):
    """The texts of every picture that is drawn from here on."""
    texts = []
    figure = pictures.figure

    @contextlib.contextmanager
    def watched(*args):
        with figure(*args) as axes:
            yield axes
            texts.append(
                [axes.get_title(), *(label.get_text() for label in axes.get_yticklabels())]
            )

    monkeypatch.setattr(pictures, "figure", watched)
    return texts


_STEP = {"case": "MobileNetV2 8x32x32", "mode": "train step", "dtype": "bfloat16"}
_TRAFFIC = {"target": "h200", "case": "bn_add_relu/wide", "mode": "forward_backward"}
_TRAFFIC |= {"dtype": "bfloat16", "bound_T": 11}


@pytest.mark.parametrize(
    ("plot", "facts", "value", "label", "title"),
    [
        (
            pictures.plot_ratios,
            {"case": "bn_add_relu/stage4_wide", "mode": "forward_backward", "dtype": "float32"}
            | {"times_roofline": 1.2},
            "ratio_vs_flax",
            "stage4 wide\nBN + add + ReLU, forward and backward, float32",
            "jbn takes 0.50 of flax.linen's time",
        ),
        (
            pictures.plot_ratios,
            _STEP,
            "ratio_vs_flax",
            "MobileNetV2 8x32x32\ntrain step, bfloat16",
            "jbn takes 0.50 of flax.linen's time",
        ),
        (
            pictures.plot_traffic,
            _TRAFFIC | {"moved_T": 9.0},
            "ratio_vs_flax",
            "h200: wide\nBN + add + ReLU, forward and backward, bfloat16",
            "jbn moves 0.50 of flax.linen's bytes",
        ),
        (
            pictures.plot_traffic,
            _STEP | {"target": "v5e", "ratio_of": "estimated_cycles"},
            "ratio_vs_flax",
            "v5e: MobileNetV2 8x32x32\ntrain step, bfloat16",
            "jbn costs 0.50 of flax.linen",
        ),
    ],
    ids=["op", "model", "traffic of a layer", "traffic of a model"],
)
def test_pictures_say_what_was_found(plot, facts, value, label, title, tmp_path, monkeypatch):
    texts = _drawn(monkeypatch)
    rows = [facts | {"peer": "flax.linen", value: 1.0}, facts | {"peer": "jbn", value: 0.5}]
    plot(tmp_path / "picture.png", rows, "on a machine")
    assert texts == [[f"{title}\non a machine", label]]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_one_palette():
    colors = {name: pictures._color(name, 1, 4) for name in ("jbn", "jbn default", "jbn xla")}
    assert set(colors.values()) == {pictures.JBN}
    for name in ("flax.linen", "flax.nnx"):
        assert pictures._color(name, 1, 4) == COLORS["peer"]
    for name in ("torch eager", "xla"):
        float(pictures._color(name, 1, 4))  # a shade of grey
    assert COLORS["jbn"] == pictures.JBN
    assert pictures._color("jbn triton", 1, 4) == pictures._color("triton", 3, 4)


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_other_load_is_told(spread):
    row = {"median_ms": 10.0, "q1_ms": 10.0, "q3_ms": 10.0 * (1 + spread)}
    warning = bench._warning([row | {"q3_ms": 10.0}, row, {"case": "not timed"}])
    assert (warning is None) == (spread == 0.1)
    if warning:
        assert "50% of the median" in warning


@pytest.mark.third_party
def test_op_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    words = "bn_relu/stage4_narrow eval float32 jbn"
    assert (
        bench.main(["op", "--batch", "1", "--repeats", "3", "--filter", words, "--json", str(path)])
        == 0
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["peer"] for row in rows] == ["flax.linen", "jbn"]
    fields = {
        "case",
        "mode",
        "dtype",
        "implementation",
        "peer",
        "median_ms",
        "q1_ms",
        "q3_ms",
        "ratio_vs_flax",
        "times_roofline",
    }
    assert all(fields | {"device", "jax", "date"} <= row.keys() for row in rows)
    assert rows[0]["ratio_vs_flax"] == 1
    assert "bn_relu/stage4_narrow" in capsys.readouterr().out
    assert bench.main(["op", "--filter", "nonsense"]) == 2


@pytest.mark.slow
@pytest.mark.third_party
def test_model_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A network of two blocks on small images: every column is there, and a picture."""
    name, model = networks.NETWORKS["mobilenet_v2"]
    short = functools.partial(model, stages=((1, 8, 1, 2, 3), (2, 8, 1, 1, 3)))
    monkeypatch.setitem(networks.NETWORKS, "mobilenet_v2", (name, short))
    picture, path = tmp_path / "model.png", tmp_path / "model.jsonl"
    words = ["model", "--network", "mobilenet_v2", "--batch", "2", "--side", "32", "--repeats", "2"]
    assert bench.main([*words, "--plot", str(picture), "--json", str(path)]) == 0
    rows = report.read_json(path)
    assert [row["peer"] for row in rows] == ["flax.linen", "jbn"]
    assert all(row["case"] == "MobileNetV2 2x32x32" for row in rows)
    assert all(min(row[k] for k in ("trace_s", "lower_s", "compile_s")) > 0 for row in rows)
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "compile_s" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["op", "traffic", "model", "device"])
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([command, "--help"])
    assert ended.value.code == 0
    described = capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0" in listed
    (summary,) = [a.description for a in _commands() if a.prog.endswith(command)]
    assert summary in " ".join(described.split())
    assert summary in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("op --batch 0", "'0', expected a whole number >= 1"),
        ("op --repeats -1", "'-1', expected a whole number >= 1"),
        ("model --side a", "'a', expected a whole number >= 1"),
        ("op --json /nowhere/rows.jsonl", "expected a file in a folder that exists"),
        ("traffic --plot .", "expected a file in a folder that exists"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_measured(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def _commands():
    (actions,) = [a for a in bench._parser()._actions if isinstance(a.choices, dict)]
    return actions.choices.values()


@pytest.mark.third_party
def test_traffic_from_the_command_line(capsys, tmp_path):
    assert (
        bench.main(
            ["traffic", "--target", "cpu", "--quick", "--plot", str(tmp_path / "traffic.png")]
        )
        == 0
    )
    assert (tmp_path / "traffic.png").exists()
    out = capsys.readouterr().out
    assert "moved_T" in out
    assert "jbn" in out
