"""The questions people bring to batch normalization, each answered by running it.

python examples/questions.py              print all the answers, draw the pictures
python examples/questions.py 1 3          only these
python examples/questions.py --write      write examples/questions.md and its pictures again

Every claim of an answer is checked as it runs: if one is false, the script fails and says which. An
answer is a function in one of the files questions_*.py: its docstring is the text, into which the
measured numbers are filled, and the function beside it, NAME_in_short, is the code of the page.
"""

import argparse
import inspect
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import questions_depth as depth
import questions_layer as layer
import questions_output as output
import questions_parameters as parameters
import questions_use as use
from questions_common import one_line
from tqdm import tqdm

HERE = Path(__file__).parent
QUESTIONS = {
    "What the layer computes": (
        (layer.undo, layer.undo_in_short),
        (layer.high, layer.high_in_short),
        (layer.per_channel, layer.per_channel_in_short),
        (layer.one_pair, layer.one_pair_in_short),
        (output.sigmoid, output.sigmoid_in_short),
        (output.decorrelate, output.decorrelate_in_short),
        (output.output_changes, output.output_changes_in_short),
    ),
    "How gamma and beta are trained": (
        (parameters.rescaling, parameters.rescaling_in_short),
        (parameters.original_moments, parameters.original_moments_in_short),
        (parameters.created, parameters.created_in_short),
        (parameters.updated, parameters.updated_in_short),
        (parameters.weight_scale, parameters.weight_scale_in_short),
    ),
    "Inference, and where to put the layer": (
        (use.running_averages, use.running_averages_in_short),
        (use.second_pass, use.second_pass_in_short),
        (use.output_layer, use.output_layer_in_short),
    ),
    "Deep networks, and why it works": (
        (depth.exploding, depth.exploding_in_short),
        (depth.higher_order, depth.higher_order_in_short),
        (depth.unsettled, depth.unsettled_in_short),
    ),
}
ALL = tuple(pair for pairs in QUESTIONS.values() for pair in pairs)

INTRODUCTION = """# Questions about batch normalization, answered by running them

The layer computes, for every channel,

```text
normalized = (x - mean) / √(variance + eps)
output     = gamma · normalized + beta
```

In training, mean and variance are those of the batch. Gamma and beta are learned; jbn calls gamma
`scale` and beta `bias`, as Flax does. The small constant eps, 1e-5, keeps the division safe.

The measured numbers and the pictures come from
[`python examples/questions.py --write`](questions.py), which also checks every claim that rests on
them. The data are the 1797 handwritten digits of scikit-learn, 8 by 8 pixels each. "A digit" below
is one such image. Where a network is trained, it has two hidden layers of 32 channels, and learns
from the first 1400 digits by gradient descent with momentum; the other 397 are for testing.
Every short program starts from here:

```python
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jbn

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)  # [1797, 64], [1797]
```
"""


def parts(question):
    """(question, answer, experiment) of the docstring, the last with places for numbers."""
    return [one_line(part) for part in inspect.getdoc(question).split("\n\n")]


def code(in_short):
    """The body of a function, as a program of its own."""
    source = inspect.getsource(in_short)
    lines, inside, result = (
        textwrap.dedent(source.partition("\n")[2]).strip().split("\n"),
        False,
        [],
    )
    for line in lines:
        if line and not line.startswith(" "):
            # A program of its own has two empty lines before and after a function.
            if result and not result[-1] and (inside or line.startswith(("def ", "@"))):
                result.append("")
            inside = line.startswith(("def ", "@"))
        result.append(line)
    return "\n".join(result)


def section(number, question, in_short, answer):
    """One answer of the page, in Markdown."""
    asked, short, experiment = parts(question)
    experiment = experiment.format(**answer.numbers, **answer.trained)
    title = answer.figure.get_suptitle()
    wrapped = [textwrap.fill(text, 100, break_on_hyphens=False) for text in (short, experiment)]
    return "\n".join(
        [
            f"\n### {number}. {asked}\n",
            f"{wrapped[0]}\n",
            f"{wrapped[1]}\n",
            f"![{title}](results/questions/{question.__name__}.png)\n",
            "<!-- continues the first -->",
            f"```python\n{code(in_short)}\n```",
        ]
    )


def anchor(number, asked):
    """How GitHub names the heading of a question."""
    kept = "".join(c for c in f"{number}. {asked}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def contents():
    lines, number = [], 0
    for heading, pairs in QUESTIONS.items():
        lines.append(f"\n**{heading}**\n")
        for question, _ in pairs:
            number += 1
            asked = parts(question)[0]
            lines.append(f"{number}. [{asked}](#{anchor(number, asked)})")
    return "\n".join(lines)


def page(sections):
    """The whole text of questions.md."""
    sections, text = iter(sections), [INTRODUCTION, contents()]
    for heading, pairs in QUESTIONS.items():
        text.append(f"\n\n## {heading}")
        text += [next(sections) for _ in pairs]
    return "\n".join(text).strip() + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = range(1, len(ALL) + 1)
    temporary = Path(tempfile.gettempdir()) / "questions"
    which = f"the questions to answer, of 1 to {len(ALL)}; default: all"
    parser.add_argument("numbers", nargs="*", type=int, help=which)
    parser.add_argument("--write", action="store_true", help="write questions.md and its pictures")
    parser.add_argument("--out", type=Path, help=f"folder for the pictures; default: {temporary}")
    steps = "training steps where a question trains, at least 20"
    parser.add_argument("--steps", type=int, default=300, help=steps)
    arguments = parser.parse_args(argv)
    chosen = arguments.numbers or list(every)
    if not set(chosen) <= set(every) or arguments.steps < 20:
        limits = f"questions are numbered 1 to {len(ALL)}, and --steps is at least 20"
        parser.error(f"{limits}; got {arguments.numbers} and {arguments.steps}")
    if arguments.write and arguments.numbers:
        parser.error(f"--write writes the whole page: leave out the numbers {arguments.numbers}")
    folder = HERE / "results" / "questions" if arguments.write else temporary
    folder = arguments.out or folder
    folder.mkdir(parents=True, exist_ok=True)
    sections, start = [], time.process_time()
    bar = tqdm(chosen, unit="answer", file=sys.stderr)
    for number in bar:
        question, in_short = ALL[number - 1]
        bar.set_description(question.__name__)
        answer = question(arguments.steps)
        in_short()
        path = folder / f"{question.__name__}.png"
        answer.figure.savefig(path, dpi=100)
        sections.append(section(number, question, in_short, answer))
        if not arguments.write:
            asked, *texts = parts(question)
            texts = [t.format(**answer.numbers, **answer.trained) for t in texts]
            filled = [textwrap.indent(textwrap.fill(t, 96), "   ") for t in texts]
            bar.write("\n".join([f"{number}. {asked}", *filled, f"   {path}\n"]), sys.stdout)
    if arguments.write:
        (HERE / "questions.md").write_text(page(sections))
        print(f"wrote {HERE / 'questions.md'} in {time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
