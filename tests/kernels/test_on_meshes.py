"""Every placement of XLA's functions, and the kernels, where x is split over a mesh of any kind."""

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jbn
from jbn.core import op
from jbn.kernels import triton, xla_gpu, xla_tpu

KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "automatic": (AxisType.Auto, AxisType.Auto),
    "both": (AxisType.Auto, AxisType.Explicit),
}


@pytest.fixture
def placed_on_cpu(request, monkeypatch):
    """The functions for another platform, run on this one."""
    monkeypatch.setitem(op.PLACEMENTS, "cpu", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


def _check(run, mesh, spec, shape=(4, 8, 32)):
    """Compare run(x, residual, dy) -> (y, dx, dresidual) with the oracle, all three arrays split.

    Channels by 4 make shards of 8, of which the mask of relu is packed on GPU.
    """
    x, residual, dy = np.random.default_rng(0).normal(1, 1, (3, *shape)).astype(np.float32)
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, residual, dy)]
        got = jax.jit(run)(*split)
    known = {"residual": residual, "activation": "relu"}
    want = oracle.backward(x, dy, **known)
    for a, b in zip(got, (oracle.forward(x, **known)[0], want.x, want.residual), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def _layer(x, residual, dy, **options):
    known = {"activation": jax.nn.relu, **options}
    layer = lambda x, residual: jbn.batch_norm_train(
        x, *jbn.init(x.shape[-1]), residual=residual, **known
    )[0]
    y, vjp = jax.vjp(layer, x, residual)
    return y, *vjp(dy)


@pytest.mark.parametrize("placed_on_cpu", [xla_gpu, xla_tpu], indirect=True, ids=["gpu", "tpu"])
@pytest.mark.parametrize("spec", [("a", None, "b"), (None, "b", "a")], ids=str)
@pytest.mark.parametrize("kinds", KINDS)
def test_split_by_jit(placed_on_cpu, kinds, spec):
    _check(_layer, jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS[kinds]), PartitionSpec(*spec))


@pytest.mark.parametrize("placed_on_cpu", [xla_gpu, xla_tpu], indirect=True, ids=["gpu", "tpu"])
@pytest.mark.parametrize("spec", [("a", "b", None), ("a", None, "b")], ids=str)
@pytest.mark.parametrize("kinds", KINDS)
def test_split_inside_shard_map(placed_on_cpu, kinds, spec):
    """One axis of the mesh is manual, and the other is what it was."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS[kinds])
    specs = {"in_specs": PartitionSpec("a"), "out_specs": PartitionSpec("a")}
    layer = lambda *arrays: _layer(*arrays, axis_name="a")
    _check(jax.shard_map(layer, mesh=mesh, axis_names={"a"}, **specs), mesh, PartitionSpec(*spec))


# A shard may be too small for a kernel that takes the whole.


def test_explicit_shard_that_a_kernel_refuses():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    run = lambda *arrays: _layer(*arrays, implementation="mosaic_gpu/interpret")
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu/interpret' takes .* 1 rows of 12"):
        _check(run, mesh, PartitionSpec("a"), (8, 12))


def test_automatic_shard_that_a_kernel_refuses(monkeypatch):
    """Only the compiler knows the shard, and nobody can raise an error there: XLA takes over."""
    asked = []

    def unsupported(shape, dtype, axis):
        asked.append(shape)
        return "takes at least two rows" if shape[0] < 2 else None

    def checked(kernel):
        def run(**arguments):
            assert len(arguments["x"]) > 1, "this kernel cannot take the shard"
            return kernel(**arguments)

        return run

    monkeypatch.setattr(triton, "unsupported", unsupported)
    for name in ("fwd_stats", "fwd_apply", "bwd_stats", "bwd_apply"):
        monkeypatch.setattr(triton, name, checked(getattr(triton, name)))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    run = lambda *arrays: _layer(*arrays, implementation="triton/interpret")
    _check(run, mesh, PartitionSpec("a"), (8, 16))
    assert (1, 16) in asked
