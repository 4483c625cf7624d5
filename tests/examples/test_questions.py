"""examples/questions.py: every answer holds, and questions.md is what the script writes.

The answers run once, with few steps. Numbers that do not depend on the training are then compared
with those of the page; the slow test runs everything as it was written and compares them all.
"""

import inspect
import pathlib
import re
import string
import sys

import numpy as np
import pytest

import jbn

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PAGE = EXAMPLES / "questions.md"
pytestmark = pytest.mark.third_party  # an example is written with ordinary promotion
sys.path.insert(0, str(EXAMPLES))

import questions  # noqa: E402
import questions_common  # noqa: E402

ALL = questions.ALL
NAMES = [question.__name__ for question, _ in ALL]
LONG = {"higher_order", "exploding", "unsettled", "rescaling", "one_pair", "updated", "high"}
ROUNDING = 1e-3  # below this a number is a rounding error, of which only the size is compared


def pattern(template):
    """A regular expression that finds the numbers in a filled template."""
    parts = []
    for text, name, spec, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if name is not None:
            form = r"-?[\d.]*\d(?:e[+-]\d+)?%?" if spec else ".+?"
            known = f"(?P<{name}>" in "".join(parts)
            parts.append(f"(?P={name})" if known else f"(?P<{name}>{form})")
    return "".join(parts)


def sections():
    """The sections of the page, each with line breaks as spaces."""
    found = re.split(r"^### \d+\. ", PAGE.read_text(), flags=re.M)[1:]
    return [questions.one_line(text.partition("```python")[0]) for text in found]


def number(text):
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def rounding(text):
    """Half of the last digit."""
    digits, _, exponent = text.rstrip("%").partition("e")
    power = int(exponent or 0) - len(digits.partition(".")[2]) - 2 * text.endswith("%")
    return 0.5 * 10.0**power


def compare(name, section, numbers, *, rtol):
    """The page's numbers against those just measured, formatted in the same way."""
    experiment = questions.parts(dict(zip(NAMES, [q for q, _ in ALL], strict=True))[name])[2]
    found = re.search(pattern(experiment), section)
    assert found, f"{name}: the page does not hold this text: {experiment}"
    for key, value in numbers.items():
        if isinstance(value, str | tuple):
            assert found[key] == str(value)
            continue
        written, measured = number(found[key]), float(value)
        if abs(measured) < ROUNDING:
            assert abs(written) < 100 * ROUNDING, (name, key, written, measured)
        else:
            np.testing.assert_allclose(
                written, measured, rtol=rtol, atol=rounding(found[key]), err_msg=f"{name}: {key}"
            )


def test_the_page_has_every_question_once():
    asked = [questions.parts(question)[0] for question, _ in ALL]
    assert [section.partition(" ")[0] for section in sections()] == [
        text.partition(" ")[0] for text in asked
    ]
    text = PAGE.read_text()
    for k, title in enumerate(asked, 1):
        assert text.count(f"### {k}. {title}\n") == 1
        assert text.count(f"(#{questions.anchor(k, title)})") == 1


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(k, id=name, marks=[pytest.mark.slow] * (name in LONG))
        for k, name in enumerate(NAMES)
    ],
)
def test_answer_holds_and_the_page_tells_it(k, tmp_path):
    question, in_short = ALL[k]
    answer = question(20)  # raises where a claim is false
    in_short()
    section = sections()[k]
    asked, short, _ = questions.parts(question)
    assert section.startswith(asked)
    assert short in section
    # Fifty layers multiply the rounding of a processor to a tenth of the gradient.
    rtol = 0.15 if question.__name__ == "exploding" else 0.05
    compare(question.__name__, section, answer.numbers, rtol=rtol)
    assert f"![{answer.figure.get_suptitle()}](results/questions/" in section
    assert f"```python\n{questions.code(in_short)}\n```" in PAGE.read_text()
    answer.figure.savefig(tmp_path / "picture.png", dpi=20)
    committed = EXAMPLES / "results" / "questions" / f"{question.__name__}.png"
    assert committed.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(ALL)), ids=NAMES)
def test_the_numbers_of_training_are_those_of_the_page(k):
    answer = ALL[k][0](300)
    compare(NAMES[k], sections()[k], {**answer.numbers, **answer.trained}, rtol=0.2)


def test_no_picture_is_left_over():
    pictures = {path.stem for path in (EXAMPLES / "results" / "questions").glob("*.png")}
    assert pictures == set(NAMES)


@pytest.mark.parametrize("k", range(len(ALL)), ids=NAMES)
def test_each_short_program_is_short(k):
    lines = [line for line in questions.code(ALL[k][1]).splitlines() if line.strip()]
    assert 3 <= len(lines) <= 12
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", ["undo", "high", "per_channel", "sigmoid", "weight_scale"])
def test_claims_fail_without_normalization(name, monkeypatch):
    monkeypatch.setattr(jbn, "batch_norm_train", lambda x, params, state, **_: (x, state))
    with pytest.raises(questions_common.NotSo, match="not so: "):
        ALL[NAMES.index(name)][0](20)


def test_a_picture_is_drawn_where_it_was_asked_for(tmp_path, capsys):
    questions.main(["6", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("6. Does batch norm decorrelate the components?")
    assert (tmp_path / "decorrelate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["99"], ["0"], ["1", "--steps", "1"], ["1", "--write"]])
def test_arguments_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        questions.main(arguments)
    assert stopped.value.code == 2
    assert re.search("questions are numbered|leave out the numbers", capsys.readouterr().err)


def test_the_page_starts_with_the_names_the_programs_use():
    """The first block of the page defines what questions_common defines under the same names."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    namespace = {}
    exec(block, namespace)
    for name in ("images", "labels"):
        np.testing.assert_array_equal(namespace[name], getattr(questions_common, name))
    assert {"jax", "jnp", "np", "optax", "jbn"} <= set(namespace)
    assert inspect.ismodule(namespace["jbn"])
