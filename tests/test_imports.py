"""Imports point one way, in the order of the design; every other arrow fails here."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module may import those to its left. `linear` is the primitive beneath autodiff.
ORDER = (
    *("types", "validate", "stats", "running", "dispatch", "partition", "linear", "autodiff"),
    *("ghost", "functional", "renorm", "flax_common", "linen", "nnx"),
)
# Each of these stands on the core, and is imported by nobody.
TOOLS = ("fold", "recalibrate", "convert", "health", "plot", "bench")
# Whoever may import jbn.kernels: dispatch runs them; seam alone, which holds the shared formulas, is open to the core.
SEAM = "jbn.kernels.seam"


def imported(path, package):
    """Absolute names of the modules that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, node.module] if node.module else parents)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules_of(folder, package):
    return [pytest.param(path, package, id=f"{package}.{path.stem}") for path in sorted(folder.glob("*.py"))]


def forbidden(path, package):
    """The imports of one file that point the wrong way."""
    names = imported(path, package)
    if package == "jbn.kernels":
        allowed = {"jax", "numpy", *sys.stdlib_module_names}
        return {n for n in names if n.split(".")[0] not in allowed and not n.startswith("jbn.kernels")}
    wrong = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "jbn" and not _may_import(path.stem, *parts[1:2], is_seam=name.startswith(SEAM)):
            wrong.add(name)
    return wrong


def _may_import(stem, module=None, *, is_seam):
    """Whether jbn/<stem>.py may import jbn.<module>."""
    if module == "kernels":
        return is_seam or stem == "dispatch"
    if stem in ORDER:
        return module in ORDER[: ORDER.index(stem)]
    # python -m jbn.health --plot; convert_model is the second half of convert.
    return module not in TOOLS or (stem, module) in (("health", "plot"), ("convert_model", "convert"))


@pytest.mark.parametrize(("path", "package"), modules_of(ROOT / "jbn", "jbn") + modules_of(ROOT / "kernels", "jbn.kernels"))
def test_imports_point_one_way(path, package):
    if path.stem == "__init__" and package == "jbn":
        tools = {n for n in imported(path, package) if n.startswith("jbn.") and n.split(".")[1] not in ORDER}
        assert not tools, f"jbn/__init__.py imports {tools}: the tools are imported by nobody"
        return
    assert not forbidden(path, package)


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("stats.py", "jbn", "from jbn import autodiff"),
        ("validate.py", "jbn", "import jbn.functional"),
        ("autodiff.py", "jbn", "from jbn.kernels import xla"),
        ("partition.py", "jbn", "def f():\n    from jbn.kernels.xla import fwd_stats"),
        ("running.py", "jbn", "from jbn import plot"),
        ("functional.py", "jbn", "from .linen import BatchNorm"),
        ("health.py", "jbn", "import jbn.kernels.triton"),
        ("plot.py", "jbn", "from jbn import health"),
        ("stats.py", "jbn", "import jbn"),
        ("xla.py", "jbn.kernels", "from jbn import stats"),
        ("xla.py", "jbn.kernels", "import flax"),
        ("xla.py", "jbn.kernels", "from ..stats import merge"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, name, package, source):
    path = tmp_path / name
    path.write_text(source)
    assert forbidden(path, package)


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("autodiff.py", "jbn", "from jbn import partition, stats\nfrom jbn.kernels.seam import Affine"),
        ("dispatch.py", "jbn", "from jbn.kernels import xla"),
        ("xla.py", "jbn.kernels", "import math\nimport jax\nfrom jbn.kernels.seam import read\nfrom .seam import wide"),
    ],
)
def test_a_right_arrow_passes(tmp_path, name, package, source):
    path = tmp_path / name
    path.write_text(source)
    assert not forbidden(path, package)


def test_only_dispatch_asks_for_devices():
    asking = ("devices", "local_devices", "default_backend", "device_count")
    for path in sorted((ROOT / "jbn").glob("*.py")):
        if path.stem == "dispatch":
            continue
        calls = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not calls & set(asking), f"{path.name} asks for {calls & set(asking)}"
