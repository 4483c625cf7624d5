"""The code of the README and of the guides runs, and what they name exists.

Every python block is executed in a namespace of its own. A block after `<!-- continues -->` runs
after the block before it, in one namespace; a block after `<!-- continues the first -->` runs after
the first block of its page. A bash block runs in the repository's root if `<!-- run -->` stands
before it; the others are skipped by name. A block in any other language must say `text`, so that
no code escapes by a missing or misspelt name.
"""

import importlib
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from jbn.health.findings import REMEDIES

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "examples").glob("*.md")))
FENCE = re.compile(
    r"(?:^<!-- *(?P<mark>[^\n]*?) *-->\n+)?^ *```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")


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
    """The python blocks, each with those that it continues in front of it."""
    groups = []
    for block in (b for b in found if b.language == "python"):
        before = {"continues": groups[-1:], "continues the first": groups[:1]}.get(block.mark, [])
        groups.append([*(b for group in before for b in group), block])
    return groups


def run(group, page=README):
    """Run the blocks, padded so that a traceback shows the lines of the page."""
    namespace = {"__name__": "__main__"}
    for block in group:
        exec(compile("\n" * (block.line - 1) + block.code, page.name, "exec"), namespace)
    return namespace


FOUND = {page: blocks(page.read_text()) for page in PAGES}
# tests/examples/test_questions.py runs the programs of questions.md, which are functions there.
PYTHON = [
    pytest.param(page, group, id=f"{page.name}-line-{group[-1].line}")
    for page in PAGES
    if page.name != "questions.md"
    for group in scripts(FOUND[page])
]
BASH = [
    pytest.param(page, block, id=f"{page.name}-line-{block.line}")
    for page in PAGES
    for block in FOUND[page]
    if block.language == "bash"
]


@pytest.mark.third_party
@pytest.mark.parametrize(("page", "group"), PYTHON)
def test_python_block_runs(page, group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(group, page)


@pytest.mark.parametrize(("page", "block"), BASH)
def test_bash_block_runs(page, block):
    if block.mark != "run":
        pytest.skip(f"{page.name} line {block.line}: not marked <!-- run -->")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    unknown = [
        (b.line, b.language) for b in FOUND[page] if b.language not in ("python", "bash", "text")
    ]
    assert not unknown, f"blocks (line, language) that are neither python, bash nor text: {unknown}"
    fences = len(re.findall(r"^ *```", page.read_text(), re.M))
    assert fences == 2 * len(FOUND[page]), "a fence is not closed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, f"{page.name} links to {link}, no heading of {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_name_of_jbn_exists(page):
    """What stands in backquotes: a path of the repository, or jbn.something."""
    for word in re.findall(r"`([^`\n]+)`", page.read_text()):
        if re.fullmatch(r"(jbn|kernels|tests|examples)/[\w./]*", word):
            assert (ROOT / word).exists(), f"{page.name} names {word}, which is not there"
        name = re.match(r"jbn((?:\.[A-Za-z_]\w*)+)", word)
        if name:
            here = importlib.import_module("jbn")
            for part in name[1].strip(".").split("."):
                assert hasattr(here, part), f"{page.name} names {word}; no {part} in {here}"
                here = getattr(here, part)


def test_readme_is_short_and_begins_with_two_commands():
    assert len(README.read_text().splitlines()) < 150
    first = next(block for block in FOUND[README] if block.language == "bash")
    assert len(first.code.splitlines()) == 2  # .ci/run runs them
    first_link = LINK.search(README.read_text())
    assert first_link
    assert first_link[1] == "examples/questions.md"


def test_everything_in_jbn_is_named():
    """Every file and folder directly in jbn/ stands in the README or in jbn/__init__.py."""
    text = README.read_text() + (ROOT / "jbn" / "__init__.py").read_text()
    named = set(re.findall(r"\w+", text))
    files = {path.stem for path in (ROOT / "jbn").iterdir() if not path.name.startswith(("_", "."))}
    assert {"types", "functional", "linen", "nnx", "core", "bench"} <= files
    assert files - {"py"} <= named | {"py"}, f"named nowhere: {files - named}"


def test_every_example_is_in_the_index():
    index = (ROOT / "examples" / "README.md").read_text()
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    guides = {page.name for page in PAGES if page is not README} - {"README.md"}
    parts = re.compile("(questions|networks)_|image_data|resnet")  # of other programs
    programs = {name for name in programs if not parts.match(name)}
    missing = {name for name in programs | guides if f"]({name})" not in index}
    assert not missing


def test_every_warning_of_health_is_explained():
    text = (ROOT / "examples" / "troubleshooting.md").read_text()
    (table,) = re.findall(r"^\| warning \|.*?\n\n", text, re.M | re.S)
    explained = re.findall(r"^\| ([a-z -]+?)(?: \(`Monitor`\))? \|", table, re.M)[1:]
    assert explained == list(REMEDIES)


SAMPLE = """
```python
x = 1
```
words
<!-- continues -->
```python
x += 1
```
<!-- continues the first -->
```python
x += 10
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
        ("python", "continues the first"),
        ("bash", None),
        ("bash", "run"),
        ("python", None),
    ]
    assert [(b.language, b.mark) for b in found] == kinds
    first, second, third, fourth = scripts(found)
    assert [run(group)["x"] for group in (first, second, third)] == [1, 2, 11]
    with pytest.raises(ZeroDivisionError) as error:
        run(fourth)
    assert error.traceback[-1].lineno + 1 == SAMPLE.splitlines().index("1 / 0") + 1
    assert "x" not in {name for block in fourth for name in block.code}
