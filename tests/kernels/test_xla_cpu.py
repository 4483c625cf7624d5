"""kernels/xla_cpu.py: sums that share a pass, and what the compiled passes read and write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.bench import hlo
from jbn.kernels import xla, xla_cpu

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8, 6, 4, 5), (3,)),
        ((8, 6, 4, 5), (1,)),
        ((7, 3, 5, 6), (1, 3)),
        ((3, 4, 5), (1, 2)),
        ((6, 64), (0,)),
        ((97, 4), (1,)),
        ((34, 4), (1,)),
        ((2, 3, 8, 8), (1,)),
        ((0, 4), (1,)),
        ((16, 0), (1,)),
        ((4, 3), ()),
    ],
    ids=str,
)
def test_joint_sums_are_the_separate_ones(shape, axis):
    x, dz = (
        jnp.asarray(np.random.default_rng(k).normal(size=shape), jnp.float32) for k in range(2)
    )
    sums = jax.jit(lambda x, dz: xla_cpu.joint_sums(axis, x, jnp.square(x), x * dz))(x, dz)
    reduced = tuple(a for a in range(len(shape)) if a not in axis)
    wide, dz = np.float64(x), np.float64(dz)
    for total, values in zip(sums, (wide, wide * wide, wide * dz), strict=True):
        np.testing.assert_allclose(total, values.sum(reduced), rtol=1e-5, atol=1e-5)


def test_joint_sums_read_their_input_once():
    x = jax.ShapeDtypeStruct((16, 28, 28, 64), jnp.float32)
    read = {}
    for sums in (xla.separate_sums, xla_cpu.joint_sums):
        both = jax.jit(lambda x, sums=sums: sums((3,), x, jnp.square(x)))
        moved = hlo.moved(hlo.operations(both.lower(x).compile().as_text()))
        read[sums.__name__] = moved / (x.size * x.dtype.itemsize)
    # One pass, two sums of each group of 16 rows, written and read.
    assert read == pytest.approx({"separate_sums": 2, "joint_sums": 1 + 4 / 16}, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("activation", "add"), [(None, False), ("relu", False), ("relu", True)])
def test_no_full_size_temporaries(dtype, activation, add):
    """Forward and backward write nothing of the size of x but their results: y, dx and dresidual.

    Beside them there is a float32 sum of each group of 16 rows; of the two that a pass makes, the
    other one lies where a result will.  bfloat16 with relu alone has both.

    What XLA:CPU materializes when separate reductions share their input is 1 to 4 times x.
    """
    x = jax.ShapeDtypeStruct((16, 28, 28, 64), dtype)
    params, state = jbn.init(64)
    function = None if activation is None else getattr(jax.nn, activation)

    def forward(x, residual, params):
        return jbn.batch_norm_train(
            x, params, state, residual=residual if add else None, activation=function
        )

    def both(x, residual, params, dy):
        y, vjp, new = jax.vjp(forward, x, residual, params, has_aux=True)
        return y, vjp(dy), new

    for name, compiled in {
        "forward": jax.jit(forward).lower(x, x, params).compile(),
        "forward and backward": jax.jit(both).lower(x, x, params, x).compile(),
    }.items():
        memory = compiled.memory_analysis()
        assert memory is not None
        temporaries = memory.temp_size_in_bytes / (x.size * x.dtype.itemsize)
        both_sums = (dtype, activation, add) == ("bfloat16", "relu", False) and "back" in name
        limit = 0.005 + (1 + both_sums) * 4 / 16 / x.dtype.itemsize
        assert temporaries < limit, f"{name}: temporaries of {temporaries:.3f} times x"
