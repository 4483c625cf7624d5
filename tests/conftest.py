"""The environment of every test: 8 host devices, and JAX at its strictest around jbn's own calls.

Markers (registered in pyproject.toml): x64 turns on float64; optimized turns LLVM's passes on;
third_party leaves promotion as lenient as other libraries need; aot(modules) needs wheels that
compile for an accelerator; grid is deselected unless asked for (-m grid), and so are slow and
program, which take long.
"""

import contextlib
import importlib.util
import os
import zlib

import hypothesis
import jax
import jaxlib
import pytest

AOT_MODULES = ("libtpu", "jax_cuda13_plugin")

# No deadline: the first example compiles. Derandomized: a failure is everybody's, not one run's.
hypothesis.settings.register_profile(
    "jbn", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("jbn")


def pytest_addoption(parser):
    parser.addoption(
        "--thin",
        action="store_true",
        help="of a parametrized test its first case and about an eighth of the others, unless it "
        "compiles for an accelerator: for a second environment",
    )


def pytest_configure(config):
    """What the backends read from the environment, once, when the first of them is made."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = {"--xla_force_host_platform_device_count": "8"}
    if jaxlib.__version__.startswith("0.10."):
        # XLA's older emitters compile for CPU in half the time. Later versions have only the newer
        # ones, and would end the process over a flag that they do not know.
        flags["--xla_cpu_use_fusion_emitters"] = "false"
        flags["--xla_cpu_parallel_codegen_split_count"] = "1"
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{name}={value}" for name, value in flags.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


@pytest.hookimpl(trylast=True)  # of what -m has left: the first case may be a slow one
def pytest_collection_modifyitems(config, items):
    if not config.getoption("thin"):
        return
    kept, dropped, seen = [], [], set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        whole = test not in seen or item.get_closest_marker("aot")
        # Not every eighth one, which might leave one value of a parameter out.
        (kept if whole or zlib.crc32(item.nodeid.encode()) % 8 == 0 else dropped).append(item)
        seen.add(test)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(autouse=True)
def _quickly_compiled(request):
    """Without LLVM's passes, as most tests compile far longer than they compute; XLA's passes stay.
    The main comparisons with float64, and what is for an accelerator, get both."""
    optimized = any(map(request.node.get_closest_marker, ("optimized", "aot")))
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _strict(request):
    """Strict dtype promotion, no rank promotion, and float64 for tests marked x64."""
    marked = lambda name: request.node.get_closest_marker(name) is not None
    with contextlib.ExitStack() as stack:
        if not marked("third_party"):
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        if marked("x64"):
            stack.enter_context(jax.enable_x64(True))
        yield


def pytest_runtest_setup(item):
    """@pytest.mark.aot("libtpu"), or without arguments all the wheels of the aot extra: skipped by
    name where missing."""
    for marker in item.iter_markers("aot"):
        missing = [
            name for name in marker.args or AOT_MODULES if importlib.util.find_spec(name) is None
        ]
        if missing:
            pytest.skip(f"needs {', '.join(missing)} of the aot extra: pip install 'jbn[aot]'")
