"""Params and State through checkpoints, and runs that are killed and go on."""

import os
import pathlib
import random
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

pytestmark = pytest.mark.third_party
SCRIPT = pathlib.Path(__file__).with_name("resumable.py")
STEPS, KILLS = 800, 10


def layer(dtype=jnp.float32, use_bias=True):
    """A layer whose every number is its own."""
    params, state = jbn.init((3, 4), param_dtype=dtype, use_bias=use_bias)
    leaves, tree = jax.tree.flatten((params, state))
    rng = np.random.default_rng(0)
    return tree.unflatten(
        [jnp.asarray(rng.uniform(1, 100, leaf.shape), leaf.dtype) for leaf in leaves]
    )


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_flax_serialization_keeps_everything(dtype, use_bias):
    saved, target = layer(dtype, use_bias), jax.tree.map(jnp.zeros_like, layer(dtype, use_bias))
    same(flax.serialization.from_bytes(target, flax.serialization.to_bytes(saved)), saved)
    as_dict = flax.serialization.to_state_dict(saved[1])
    assert set(as_dict) == {"mean", "var", "count"}
    same(flax.serialization.from_state_dict(target[1], as_dict), saved[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_orbax_keeps_everything(tmp_path, dtype, use_bias):
    orbax = pytest.importorskip(
        "orbax.checkpoint", reason="needs orbax: pip install 'jbn[examples]'"
    )
    saved, target = layer(dtype, use_bias), jax.tree.map(jnp.zeros_like, layer(dtype, use_bias))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", saved)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "layer", target), saved)


def start(folder):
    """The run in a process of its own, one thread, as several share the machine."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(SCRIPT), str(folder), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


def finished(folder):
    """Run to the end: (the step it resumed at, the digest of all that was learned)."""
    process = start(folder)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    lines = out.split("\n")
    return int(lines[0].removeprefix("resumed at ")), lines[-2]


@pytest.mark.program
def test_a_run_killed_ten_times_ends_in_the_same_bits(tmp_path):
    """Ten times kill -9 at a random step: each run resumes where a whole checkpoint stands."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    began, expected = finished(tmp_path / "whole")
    assert began == 0
    rng = random.Random(0)
    last = 0
    for kill in range(1, KILLS + 1):
        process = start(tmp_path / "killed")
        at = rng.randint(
            STEPS // 2 * (kill - 1) // KILLS + 1, STEPS // 2 * kill // KILLS
        )  # well before the end
        resumed = int(process.stdout.readline().removeprefix("resumed at "))
        assert resumed >= last, "a checkpoint was lost"
        for line in process.stdout:
            step = int(line.removeprefix("step "))
            if step >= at:
                break
        process.kill()
        process.wait()
        last = max(at, resumed)
    resumed, found = finished(tmp_path / "killed")
    assert last <= resumed < STEPS
    assert found == expected
