"""Real processes: examples/multihost.py with two of them, and with one that has as many devices."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "multihost.py"


def run(processes, devices, path):
    """What it printed, also as errors, and the parameters and states after 20 steps."""
    size = ["--processes", str(processes), "--devices", str(devices)]
    command = [sys.executable, EXAMPLE, *size, "--save", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    with np.load(path) as saved:
        return result.stdout, result.stderr, [saved[name] for name in saved.files]


@pytest.mark.program
def test_two_processes_agree_and_equal_one(tmp_path):
    output, errors, leaves = run(2, 2, tmp_path / "two.npz")
    digests = re.findall(r"process (\d) of 2, 4 devices: loss [\d.]+, digest (\w+)", output)
    assert {index for index, _ in digests} == {"0", "1"}
    assert len({digest for _, digest in digests}) == 1
    assert "all 2 processes agree" in output
    assert len(output.splitlines()) == 3
    assert "[Gloo]" not in output + errors
    *_, of_one = run(1, 4, tmp_path / "one.npz")
    assert len(leaves) == len(of_one) == 3 + 2 * 2 + 2 * 3
    for two, one in zip(leaves, of_one, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max())
    # It learned something, so the comparison is not of two initializations.
    assert float(re.search(r"loss ([\d.]+)", output)[1]) < 0.5
