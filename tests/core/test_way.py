"""The way of a call: how few frames, primitives and lines of program it takes."""

import inspect
import os
import pathlib
import subprocess
import sys
import traceback

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jbn
import jbn.linen
from jbn.core import linear
from jbn.kernels import backends, xla

PACKAGE = pathlib.Path(jbn.__file__).parent
PARAMS, STATE = jbn.init(7)


class Reached(Exception):
    """The kernel was called."""


def frames_of_jbn(monkeypatch, kernel, call):
    """The functions of jbn on the stack where `call` reaches a kernel."""

    def stop(*_, **__):
        raise Reached

    monkeypatch.setattr(xla, kernel, stop)
    with pytest.raises(Reached) as reached:
        call()
    frames = traceback.extract_tb(reached.value.__traceback__)
    return [frame.name for frame in frames if PACKAGE in pathlib.Path(frame.filename).parents]


def training_loss(x):
    return jnp.sum(jbn.batch_norm_train(x, PARAMS, STATE, activation=jax.nn.relu)[0] ** 2)


@pytest.mark.parametrize(
    ("kernel", "rows", "call"),
    [
        ("fwd_stats", 31, lambda x: jbn.batch_norm_train(x, PARAMS, STATE)),
        ("fwd_apply", 32, lambda x: jbn.batch_norm_train(x, PARAMS, STATE)),
        ("fwd_apply", 33, lambda x: jbn.batch_norm_eval(x, PARAMS, STATE)),
        ("bwd_stats", 34, jax.grad(training_loss)),
        ("bwd_apply", 35, jax.grad(training_loss)),
        ("bwd_apply", 36, jax.jit(jax.grad(training_loss))),
    ],
)
def test_few_frames_from_the_call_to_the_kernel(kernel, rows, call, monkeypatch):
    """Each with a shape of its own, as JAX lowers an equal call only once."""
    frames = frames_of_jbn(monkeypatch, kernel, lambda: call(jnp.ones((rows, 7))))
    assert 3 <= len(frames) <= 9, frames


def test_two_primitives():
    """How a layer is differentiated, and what is decided at lowering; all others are JAX's."""
    assert linear._linear.name == "jbn_linear"
    jaxpr = jax.make_jaxpr(jax.linearize(training_loss, jnp.ones((8, 7)))[1])(jnp.ones((8, 7)))
    forward = jax.make_jaxpr(lambda x: jbn.batch_norm_train(x, PARAMS, STATE))(jnp.ones((8, 7)))
    names = {name for name in primitives(jaxpr) | primitives(forward) if name.startswith("jbn")}
    assert names == {"jbn", "jbn_linear"}


def primitives(jaxpr):
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
                names |= primitives(getattr(value, "jaxpr", value))
    return names


class Block(nn.Module):
    """As in ResNets, with a norm that flax's and jbn's both are."""

    norm: type

    @nn.compact
    def __call__(self, x):
        norm = lambda: self.norm(use_running_average=False)
        y = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        return nn.relu(norm()(nn.Conv(8, (3, 3))(y)) + x)


def test_the_program_is_no_longer_than_flax_makes_it():
    """Of repeated layers each shape is lowered once."""

    def lines(norm):
        blocks = [Block(norm) for _ in range(4)]
        x = jnp.ones((2, 4, 4, 8))
        variables = [block.init(jax.random.key(0), x) for block in blocks]

        def loss(variables, x):
            for block, own in zip(blocks, variables, strict=True):
                x, _ = block.apply(own, x, mutable=["batch_stats"])
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(variables, x).as_text().count("\n")

    assert lines(jbn.linen.BatchNorm) <= lines(nn.BatchNorm)


# JAX's own tools.


@pytest.mark.slow
def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.jit(jax.grad(training_loss))(jnp.ones((9, 7)))
        jax.vmap(lambda x: jbn.moments(x).mean)(jnp.ones((2, 9, 7)))
        jax.jit(jax.hessian(training_loss))(jnp.ones((2, 7)))


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda", "tpu"]])
@pytest.mark.parametrize("name", ["train", "gradient", "moments"])
def test_export_with_a_symbolic_batch(name, platforms):
    function = {
        "train": lambda x: jbn.batch_norm_train(x, PARAMS, STATE),
        "gradient": jax.grad(training_loss),
        "moments": jbn.moments,
    }[name]
    shape = export.symbolic_shape("batch, 7")
    exported = export.export(jax.jit(function), platforms=platforms)(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    for rows in (5, 40):
        x = jax.random.normal(jax.random.key(rows), (rows, 7)) * 3 + 1
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
            exported.call(x),
            function(x),
        )


SCRIPT = """
import jax, jax.numpy as jnp, sys, jbn
from jax._src import monitoring
from jax.sharding import AxisType, NamedSharding, PartitionSpec
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
monitoring.register_event_listener(lambda event, **_: events.append(event))
mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
x = jnp.arange(512.0).reshape(16, 4, 8)
x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
params, state = jbn.init(8)
loss = lambda x: (jbn.batch_norm_train(x, params, state, activation=jax.nn.relu)[0] ** 2).sum()
compiled = jax.jit(jax.grad(loss)).lower(x).compile()
print(float(jnp.abs(compiled(x)).sum()), "/jax/compilation_cache/cache_hits" in events)
"""


@pytest.mark.slow
def test_the_persistent_cache_hits_in_another_process(tmp_path):
    """On 8 automatically sharded devices, where custom_partitioning writes an id into the
    program."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    run = lambda: subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout.split()
    (first, missed), (second, hit) = run(), run()
    assert (missed, hit) == ("False", "True")
    assert first == second


def test_results_are_typed_as_they_are():
    """What the primitive says before lowering is what every placement returns."""
    x = jnp.ones((6, 7), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: jbn.batch_norm_train(x, PARAMS, STATE)[0])(x)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_the_backends_are_named_once():
    """What implementation= takes is what help() and type checkers say, and what PLATFORMS lists."""
    names = backends.PLATFORMS
    assert set(backends.IMPLEMENTATIONS) == {"xla", *names, *(f"{n}/interpret" for n in names)}
    annotation = str(inspect.signature(jbn.batch_norm_train))
    assert all(repr(name) in annotation for name in backends.IMPLEMENTATIONS)
