"""Damaged and hostile checkpoints, and impossible paths, end with exit code 2 and one line."""

import os
import random
import shutil
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from flax import serialization

from jbn.health import __main__ as command
from jbn.health import checkpoints

TREE = {
    "params": {"bn": {"scale": np.ones(3, np.float32)}},
    "batch_stats": {"bn": {"mean": np.full(3, 0.5, np.float32), "var": np.full(3, 2, np.float32)}},
}
GOOD = serialization.to_bytes(TREE)
pytestmark = pytest.mark.third_party


def nested(depth):
    tree = TREE
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def ended(capsys, *arguments):
    """The exit code and the lines of the error."""
    try:
        code = command.main([str(a) for a in arguments])
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 10,
        GOOD[:-5],
        GOOD[: len(GOOD) // 2],
        GOOD.replace(b"float32", b"floatXX"),
        GOOD.replace(b"float32", b"objects"),
        b"\x81\xa1a" * 500 + b"\xc0",
        b"\x81\xa1a" * 5000 + b"\xc0",
        msgpack.packb([1, 2, 3]),
    ],
    ids=[
        "empty",
        "noise",
        "truncated",
        "half",
        "dtype",
        "object",
        "nested500",
        "nested5000",
        "list",
    ],
)
def test_a_damaged_file(content, tmp_path, capsys):
    (tmp_path / "file").write_bytes(content)
    code, lines = ended(capsys, tmp_path / "file")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("python -m jbn.health: error: ")


def test_files_with_changed_bytes_are_read_or_refused(tmp_path, capsys):
    rng = random.Random(0)
    codes = set()
    for _ in range(200):
        content = bytearray(GOOD)
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "file").write_bytes(bytes(content))
        code, lines = ended(capsys, tmp_path / "file")
        codes.add(code)
        assert len(lines) == (1 if code == 2 else 0)
    assert codes == {0, 1, 2}


def test_a_deep_tree_is_searched_to_its_end():
    (name,) = checkpoints.find(nested(3000))[0]
    assert name == "/".join(["a"] * 3000 + ["bn"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import orbax.checkpoint as ocp

    path = tmp_path_factory.mktemp("orbax") / "good"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, TREE)
    return path


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "missing"])
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
def test_a_damaged_folder(folder, tmp_path, capsys, file, damage):
    shutil.copytree(folder, tmp_path / "copy")
    target = tmp_path / "copy" / file
    content = {"truncated": target.read_bytes()[:-20], "empty": b"", "other": b'{"a": [1]}'}
    target.unlink()
    if damage in content:
        target.write_bytes(content[damage])
    code, lines = ended(capsys, tmp_path / "copy")
    assert code == 2
    assert len(lines) == 1


def test_a_damaged_folder_prints_one_line_as_a_command(folder, tmp_path):
    """Orbax's log and the tracebacks of its threads do not reach the user."""
    shutil.copytree(folder, tmp_path / "copy")
    target = next((tmp_path / "copy" / "d").iterdir())
    target.write_bytes(target.read_bytes()[:-40])
    run = [sys.executable, "-m", "jbn.health", str(tmp_path / "copy")]
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--plot", "--html"])
def test_paths_that_cannot_be_written(tmp_path, capsys, option):
    (tmp_path / "good").write_bytes(GOOD)
    for path in (tmp_path / "none" / "out.png", tmp_path, tmp_path / "good" / "out.png"):
        code, lines = ended(capsys, tmp_path / "good", option, path)
        assert code == 2
        assert len(lines) == 1
    if option == "--plot":
        assert ended(capsys, tmp_path / "good", option, tmp_path / "out.xyz")[0] == 2


@pytest.mark.skipif(shutil.which("xelatex") is not None, reason="here LaTeX would draw it")
def test_a_format_that_needs_what_is_not_installed(tmp_path, capsys):
    (tmp_path / "good").write_bytes(GOOD)
    code, lines = ended(capsys, tmp_path / "good", "--plot", tmp_path / "out.pgf")
    assert code == 2
    assert len(lines) == 1


def test_control_characters_of_names_are_escaped(tmp_path, capsys):
    layer = {"mean": np.full(2, np.nan, np.float32), "var": np.ones(2, np.float32)}
    file = tmp_path / "names"
    file.write_bytes(serialization.msgpack_serialize({"batch_stats": {"b\x1b[2J\nn": layer}}))
    assert command.main([str(file)]) == 1
    printed = capsys.readouterr().out
    assert printed.count(r"b\x1b[2J\nn") == 2
    assert "\x1b" not in printed


def test_items_of_a_step_are_one_tree(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (2, 10):
            items = {name: ocp.args.StandardSave(tree) for name, tree in TREE.items()}
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    trees = checkpoints.load(tmp_path / "run")
    assert list(trees) == ["2", "10"]
    for tree in trees.values():
        layers, damaged = checkpoints.find(tree)
        assert not damaged
        np.testing.assert_array_equal(layers["bn"].scale, np.ones(3))
        np.testing.assert_array_equal(layers["bn"].var, np.full(3, 2))


def test_several_files_side_by_side(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(GOOD)
    assert ended(capsys, tmp_path / "a", tmp_path / "b", "--html", tmp_path / "o.html") == (0, [])
    text = (tmp_path / "o.html").read_text()
    assert "<th class=number>a</th><th class=number>b</th>" in text


def test_the_help_says_what_it_does_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Report on every batch norm of a checkpoint" in text
    assert "exit codes: 0 no warnings, 1 warnings (in the last checkpoint), 2 nothing" in text
