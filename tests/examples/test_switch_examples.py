"""examples/switch.py, crossq.py and whole_life.py; and the four networks, flax's and switched."""

import importlib
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.health
import jbn.nnx

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
pytestmark = pytest.mark.third_party
NAMES = ("ResNet-50", "EfficientNet-B0", "U-Net", "DenseNet-121")
# Parameters of torchvision's models; of the U-Net with batch norms, two classes and 64 channels.
PARAMETERS = dict(zip(NAMES, (25_557_032, 5_288_548, 31_037_698, 7_978_856), strict=True))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loaded = []

    def load(name):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in (*loaded, "networks_linen", "networks_nnx"):
        sys.modules.pop(name, None)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", NAMES)
def test_the_networks_are_the_papers(example, name):
    linen, nnx_ = example("networks_linen"), example("networks_nnx")
    kind = {
        "ResNet-50": "ResNet50",
        "EfficientNet-B0": "EfficientNetB0",
        "U-Net": "UNet",
        "DenseNet-121": "DenseNet121",
    }[name]
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = lambda x: getattr(linen, kind)().init(jax.random.key(0), x, train=False)
    assert size(jax.eval_shape(init, x)["params"]) == PARAMETERS[name]
    model = nnx.eval_shape(lambda: getattr(nnx_, kind)(rngs=nnx.Rngs(0)))
    assert size(nnx.state(model, nnx.Param)) == PARAMETERS[name]
    norms = [m for _, m in nnx.iter_modules(jbn.nnx.replace(model)) if isinstance(m, nnx.BatchNorm)]
    assert all(type(norm) is jbn.nnx.BatchNorm for norm in norms)
    assert len(norms) == {"ResNet-50": 53, "EfficientNet-B0": 49, "U-Net": 18}.get(name, 121)


def _networks():
    """One network of each system; `-m grid` compares the others."""
    marks = {("DenseNet-121", "linen"): pytest.mark.slow, ("U-Net", "nnx"): pytest.mark.slow}
    return [
        pytest.param(name, system, marks=marks.get((name, system), pytest.mark.grid))
        for name, system in itertools.product(NAMES, ("linen", "nnx"))
    ]


@pytest.mark.parametrize(("name", "system"), _networks())
def test_a_switched_network_is_as_accurate_as_flaxs(example, name, system):
    """Evaluation, training, gradients, statistics and three steps, each against float64."""
    switch = example("switch")
    model = getattr(switch, f"networks_{system}").tiny()[name]
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    row = switch.compare(getattr(switch, f"{system}_program"), model, x, steps=3, rounds=1)
    for what, error in row["jbn"].items():
        # Flax's own rounding says how well-conditioned the quantity is; below 1e-6 both are luck.
        assert error < 4 * row["flax"][what] + 1e-6, what
        assert 0 < row["flax"][what] < 1e-3, what


def test_the_comparison_finds_a_norm_that_computes_something_else(example):
    switch = example("switch")
    model = switch.networks_nnx.ConvNorm(3, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    def wrong(model, x, switched):
        program = switch.nnx_program(model, x, switched)
        if switched:
            jbn.nnx.replace(model, epsilon=1e-2)
            program = switch.nnx_program(model, x, switched)
        return program

    row = switch.compare(wrong, model, x, steps=2, rounds=1)
    assert row["jbn"]["training"] > 1e-4
    assert row["flax"]["training"] < 1e-6
    assert switch.table({"one": row}).splitlines()[-1].count(" / ") == 5


@pytest.mark.slow
def test_crossq(example, tmp_path, capsys):
    example("crossq").main(["--steps", "600", "--seeds", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("batch renorm", "batch norm", "none"))
    assert (tmp_path / "crossq.png").stat().st_size > 5000


def test_the_pendulum_is_gymnasiums(example):
    """One step by hand: g 10, mass and length 1, 0.05 s, a torque of 2."""
    angle, speed = 0.5, -1.0
    state, reward = example("crossq").dynamics(jnp.array([angle, speed]), 2.0)
    new_speed = speed + (3 * 10 / 2 * np.sin(angle) + 3 * 2.0) * 0.05
    np.testing.assert_allclose(state, [angle + new_speed * 0.05, new_speed], rtol=1e-6)
    np.testing.assert_allclose(reward, -(angle**2 + 0.1 * speed**2 + 0.001 * 4), rtol=1e-6)


@pytest.mark.skipif(not hasattr(jbn.health, "Monitor"), reason="needs jbn.health.Monitor")
@pytest.mark.slow
def test_whole_life(example, tmp_path, capsys):
    example("whole_life").main(["--steps", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("2 norms folded") == 2
    for name in ("linen", "nnx"):
        text = (tmp_path / f"{name}.mlir").read_text()
        assert "stablehlo.convolution" in text
        assert "rsqrt" not in text, "a norm is left"
