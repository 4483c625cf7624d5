"""Imports point one way, in the order of the design; every other arrow fails here."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module may import those before it.
CORE = (
    *("config", "validate", "sharding", "stats", "running", "op", "linear", "passes", "autodiff"),
    *("ghost", "marking", "renorm", "layer", "complex_numbers", "flax_common", "switch"),
)
ORDER = ("types", *(f"core.{name}" for name in CORE), "functional", "fusing", "linen", "nnx")
# Each of these stands on the modules above. Another tool may use one only where ALLOWED says so.
TOOLS = ("fold", "recalibrate", "convert", "health", "plot", "policy", "bench")
ALLOWED = {
    ("health", "plot"),  # python -m jbn.health --plot
    ("convert", "fold"),  # the pairs of torch's models by name
    ("recalibrate", "health"),  # the moments of what each norm reads
}
# Whoever may import jbn.kernels: op runs them. The shared formulas and the list of the backends are
# open to all.
OPEN = ("jbn.kernels.seam", "jbn.kernels.backends")


def imported(path, package):
    """Absolute names of the modules that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*parents, node.module] if node.module else parents)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def module_name(path):
    """jbn.core.stats for jbn/core/stats.py, and jbn.kernels.xla for kernels/xla.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("jbn", *parts) if parts[0] == "kernels" else parts)


def forbidden(name, path, *, is_package=False):
    """The imports of one file that point the wrong way."""
    package = name if is_package else name.rpartition(".")[0]
    names = imported(path, package)
    if name.startswith("jbn.kernels"):
        allowed = {"jax", "numpy", *sys.stdlib_module_names}
        return {
            n for n in names if n.split(".")[0] not in allowed and not n.startswith("jbn.kernels")
        }
    own = name.removeprefix("jbn.")
    return {
        n
        for n in names
        if n.split(".")[0] == "jbn" and not _may_import(own, n.removeprefix("jbn."))
    }


def _may_import(own, other):
    """Whether jbn.<own> may import jbn.<other>, a module or a name in one."""
    if other == "kernels" or other.startswith("kernels."):
        return f"jbn.{other}".startswith(OPEN) or own == "core.op" or own.startswith("bench")
    if own in ORDER:
        return any(
            other == module or other.startswith(f"{module}.")
            for module in ORDER[: ORDER.index(own)]
        )
    tool, target = own.split(".")[0], other.split(".")[0]
    return target not in TOOLS or target == tool or tool == "bench" or (tool, target) in ALLOWED


FILES = sorted(
    path
    for folder in ("jbn", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if "jbn/kernels" not in str(path)
)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    if name == "jbn":  # TYPE_CHECKING names the tools, which are imported at first use
        return
    assert not forbidden(name, path, is_package=path.stem == "__init__")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core.stats", "from jbn.core import autodiff"),
        ("core.validate", "import jbn.functional"),
        ("core.autodiff", "from jbn.kernels import xla"),
        ("core.passes", "def f():\n    from jbn.kernels.xla import fwd_stats"),
        ("core.running", "from jbn import plot"),
        ("functional", "from .linen import BatchNorm"),
        ("health.reports", "import jbn.kernels.triton"),
        ("plot", "from jbn import health"),
        ("fold.linear", "from jbn.convert import layers"),
        ("core.stats", "import jbn"),
        ("kernels.xla", "from jbn.core import stats"),
        ("kernels.xla", "import flax"),
        ("kernels.xla", "from ..core.stats import merge"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, name, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert forbidden(f"jbn.{name}", path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "core.autodiff",
            "from jbn.core import passes, stats\nfrom jbn.kernels.seam import Affine",
        ),
        ("core.op", "from jbn.kernels import xla"),
        ("health.reports", "from jbn.health.findings import Finding\nfrom jbn import functional"),
        (
            "kernels.xla",
            "import math\nimport jax\nfrom jbn.kernels.seam import read\nfrom .seam import wide",
        ),
    ],
)
def test_a_right_arrow_passes(tmp_path, name, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert not forbidden(f"jbn.{name}", path)


def test_only_the_list_of_backends_asks_for_devices():
    """And what measures: jbn.bench."""
    asking = ("devices", "local_devices", "default_backend", "device_count")
    for path in FILES:
        if module_name(path).startswith(("jbn.bench", "jbn.kernels.backends")):
            continue
        calls = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert not calls & set(asking), f"{path.name} asks for {calls & set(asking)}"
