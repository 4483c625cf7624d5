"""The README's code runs.

Every python block is executed in a namespace of its own; one after a line `<!-- continues -->` runs
after the block before
it, in one namespace.  A bash block is executed in the repository's root if `<!-- run -->` stands
before it; the others are
listed as skipped.  A block in any other language must say `text`, so that no code escapes by a
missing or misspelt name.
"""

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(
    r"(?:^<!-- *(?P<mark>[^\n]*?) *-->\n+)?^ *```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)


class Block(NamedTuple):
    line: int
    language: str
    mark: str | None
    code: str


def blocks(text):
    """The fenced blocks of a Markdown text."""
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(line, match["language"].strip(), match["mark"], match["code"]))
    return found


def scripts(found):
    """The python blocks, each with those that it continues in front; padded, so that tracebacks show the README's lines."""
    groups = []
    for block in (b for b in found if b.language == "python"):
        before = groups[-1] if block.mark == "continues" else []
        groups.append([*before, block])
    return groups


def run(group):
    namespace = {"__name__": "__main__"}
    for block in group:
        exec(compile("\n" * (block.line - 1) + block.code, README.name, "exec"), namespace)
    return namespace


FOUND = blocks(README.read_text()) if README.exists() else []
NOTHING = pytest.param(None, marks=pytest.mark.skip(reason="README.md holds no such block"))


def parameters(groups, line):
    return [pytest.param(group, id=f"line-{line(group)}") for group in groups] or [NOTHING]


@pytest.mark.third_party
@pytest.mark.parametrize("group", parameters(scripts(FOUND), lambda group: group[-1].line))
def test_python_block_runs(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(group)


@pytest.mark.parametrize(
    "block", parameters([b for b in FOUND if b.language == "bash"], lambda block: block.line)
)
def test_bash_block_runs(block):
    if block.mark != "run":
        pytest.skip(f"README.md line {block.line}: not marked <!-- run -->")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
    )


def test_every_block_says_what_it_is():
    unknown = [(b.line, b.language) for b in FOUND if b.language not in ("python", "bash", "text")]
    assert not unknown, f"blocks (line, language) that are neither python, bash nor text: {unknown}"
    text = README.read_text() if README.exists() else ""
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(FOUND), "a fence is not closed"


SAMPLE = """
```python
x = 1
```
words
<!-- continues -->
```python
x += 1
```
```bash
exit 1
```
<!-- run -->

```bash
true
```
```python
y = 1
1 / 0
```
"""


def test_blocks_are_found_and_run_as_documented():
    found = blocks(SAMPLE)
    kinds = [
        ("python", None),
        ("python", "continues"),
        ("bash", None),
        ("bash", "run"),
        ("python", None),
    ]
    assert [(b.language, b.mark) for b in found] == kinds
    first, second, third = scripts(found)
    assert run(first)["x"] == 1
    assert run(second)["x"] == 2
    with pytest.raises(ZeroDivisionError) as error:
        run(third)
    assert error.traceback[-1].lineno + 1 == SAMPLE.splitlines().index("1 / 0") + 1
    assert "x" not in {name for block in third for name in block.code}
