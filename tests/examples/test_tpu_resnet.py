"""examples/tpu_resnet.py on 8 simulated devices, and compiled for TPUs that are not here."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
STEPS = 50
# With --dist loadgroup all of them meet the same worker, and the same cache.
pytestmark = pytest.mark.xdist_group("tpu_resnet")


def _start(arguments, cache):
    """The example on its own, as a user starts it; programs compiled once are kept in `cache`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(EXAMPLES / "tpu_resnet.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Arguments of a small run, and where compiled programs are kept."""
    folder = tmp_path_factory.mktemp("resnet")
    generator = np.random.default_rng(0)
    labels = np.arange(320) % 4
    tiles = generator.integers(256, size=(4, 16, 16, 3))
    images = np.clip(tiles[labels] + generator.normal(0, 30, (320, 16, 16, 3)), 0, 255).astype(
        np.uint8
    )
    np.savez(folder / "images.npz", images=images, labels=labels)
    size = ["--blocks", 1, 1, "--width", 8, "--image-size", 16, "--batch-size", 4]
    run = [
        "--fake-devices",
        8,
        "--steps",
        STEPS,
        "--data",
        folder / "images.npz",
        "--save-every",
        5,
        "--log-every",
        1,
    ]
    return size + run, folder


@pytest.mark.program
def test_killed_and_resumed_run_ends_with_the_same_bits(training):
    """Killed by a signal that cannot be caught, after a checkpoint and before the end."""
    arguments, folder = training
    whole = _finish(_start([*arguments, "--checkpoints", folder / "whole"], folder / "cache"))
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", whole)]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses

    interrupted = [*arguments, "--checkpoints", folder / "interrupted"]
    process = _start(interrupted, folder / "cache")
    while not (folder / "interrupted" / "10").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = _finish(_start(interrupted, folder / "cache"))
    first = re.search(r"from step (\d+) to", resumed)
    assert first is not None
    assert 10 <= int(first.group(1)) < STEPS
    digests = [
        re.findall(rf"state after step {STEPS}: sha256 (\w+)", output)
        for output in (whole, resumed)
    ]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]


@pytest.mark.program
def test_an_interrupt_saves_the_step_it_names_and_ends_with_one_line(training):
    arguments, folder = training
    saved = folder / "stopped"
    arguments = [*arguments, "--checkpoints", saved]
    # So many steps that it still trains when the signal arrives, however busy the machine is.
    process = _start([*arguments, "--steps", 100 * STEPS], folder / "cache")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 3: loss" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    stopped = re.search(r"stopped after step (\d+): saved", rest)
    assert stopped, rest
    assert rest.rstrip().endswith("saved; the same command goes on from here")
    assert int(stopped[1]) >= 3
    assert (saved / stopped[1]).is_dir()
    total = int(stopped[1]) + 2
    resumed = _finish(_start([*arguments, "--steps", total], folder / "cache"))
    assert f"from step {stopped[1]} to {total}" in resumed


@pytest.mark.program
def test_the_evaluation_after_a_trial_is_as_short_as_the_trial(training):
    """Two steps of 8 images in the first epoch, so two batches of the test images."""
    arguments, folder = training
    steps = arguments.index("--steps") + 1
    trial = [*arguments[:steps], 2, *arguments[steps + 1 :], "--batch-size", 1]
    output = _finish(_start(trial, folder / "cache"))
    assert re.search(r"epoch 1: test accuracy [\d.]+ of 16 images", output), output


def test_image_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import image_data

    colors = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, color in colors.items():
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (20 + i, 10), color).save(tmp_path / name / f"{i}.png")
    (tmp_path / "red" / "notes.txt").write_text("no image")
    (tmp_path / ".DS_Store").write_bytes(b"nor this")
    with pytest.warns(UserWarning, match=r"notes\.txt.*DS_Store"):
        train, test = image_data.load(str(tmp_path), 8)
    assert (len(train.labels), len(test.labels)) == (18, 2)
    for batch in image_data.batches(train, 6, seed=0):
        expected = np.array([(-1, -1, 1), (1, -1, -1)], np.float32)[batch["label"]]
        np.testing.assert_array_equal(
            batch["image"], np.broadcast_to(expected[:, None, None], (6, 8, 8, 3))
        )
    (filled,) = image_data.batches(test, 8, seed=None)
    assert (filled["label"] == -1).sum() == 6
    epochs = [
        [b["label"] for b in image_data.batches(train, 6, seed=0, epoch=epoch)] for epoch in (0, 1)
    ]
    later = [b["label"] for b in image_data.batches(train, 6, seed=0, epoch=0, skip=1)]
    np.testing.assert_array_equal(later, epochs[0][1:])
    assert not np.array_equal(epochs[0], epochs[1])
    with (
        pytest.warns(UserWarning, match="red"),
        pytest.raises(ValueError, match="holds 0 images"),
    ):
        image_data.load(str(tmp_path / "red"), 8)


@pytest.mark.aot("libtpu")
@pytest.mark.program
def test_compile_only(tmp_path):
    """On 256 chips the only collectives are all-reduces, none larger than all parameters."""
    arguments = [
        "--compile-only",
        "v5e:16x16",
        "--blocks",
        1,
        1,
        "--batch-size",
        16,
        "--image-size",
        64,
    ]
    output = _finish(_start(arguments, tmp_path))
    assert "v5e:16x16, 256 chips, jbn" in output
    assert float(re.search(r"([\d.]+) M estimated cycles", output).group(1)) > 0
    found = re.findall(r"(\d+) (all-\w+|\w+-\w+) of (\d+) bytes", output)
    assert found
    assert {kind for _, kind, _ in found} == {"all-reduce"}, output
