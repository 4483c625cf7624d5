"""The cases both Flax modules are compared with flax in, and how near they must come."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

SHAPE = (6, 4, 3, 5)

# Arguments of flax's constructors, which must mean the same here.
OPTIONS = [
    {},
    {"axis": 1},
    {"axis": -2},
    {"axis": 0},
    {"momentum": 0.0},
    {"momentum": 0.5},
    {"momentum": 1.0},
    {"epsilon": 0.1},
    {"epsilon": 0.0},
    {"use_scale": False},
    {"use_bias": False},
    {"use_scale": False, "use_bias": False},
    {"scale_init": initializers.uniform(), "bias_init": initializers.normal()},
    {"use_fast_variance": False},
]

# (dtype of x, dtype, param_dtype, use_scale)
DTYPES = [
    (jnp.float32, jnp.bfloat16, jnp.float32, True),
    (jnp.float32, None, jnp.bfloat16, True),
    (jnp.bfloat16, None, jnp.float32, True),
    (jnp.bfloat16, None, jnp.bfloat16, True),
    (jnp.bfloat16, None, jnp.float32, False),
    (jnp.bfloat16, jnp.bfloat16, jnp.float32, True),
    (jnp.bfloat16, jnp.float32, jnp.bfloat16, True),
    (jnp.float16, None, jnp.float16, True),
]

# Masks for x of SHAPE: by example, by element, by position and channel, of zeros and ones.
MASKS = [
    np.array([1, 1, 0, 1, 0, 1], bool).reshape(6, 1, 1, 1),
    np.random.default_rng(1).random(SHAPE) < 0.7,
    np.random.default_rng(2).random((6, 4, 3, 1)) < 0.5,
    np.eye(3, 5, dtype=bool) | (np.arange(5) > 1),
]

# Options that no input could make right: the error names the value.
BAD_OPTIONS = [
    ({"momentum": None}, ValueError, "momentum is None"),
    ({"momentum": 5.0}, ValueError, "momentum is 5.0"),
    ({"momentum": -0.1}, ValueError, "momentum is -0.1"),
    ({"momentum": "0.9"}, TypeError, "momentum is '0.9'"),
    ({"momentum": jnp.ones(5)}, ValueError, r"momentum has shape \(5,\)"),
    ({"epsilon": -1.0}, ValueError, "-1.0"),
    ({"epsilon": None}, TypeError, "epsilon is None"),
    ({"implementation": "cudnn"}, ValueError, "cudnn"),
    ({"activation": "relu"}, TypeError, "relu"),
    ({"axis": 4}, ValueError, "axis 4"),
    ({"axis_name": "nowhere"}, ValueError, "nowhere"),
    ({"virtual_batch_size": 4}, ValueError, "virtual_batch_size is 4"),
    ({"virtual_batch_size": 2.5}, TypeError, "2.5"),
]

# Options that only the statistics of a batch need, and only where they are stored: in inference,
# and in initialization, they may be anything.
OF_BATCH_STATISTICS = [
    {"axis_name": "nowhere"},
    {"axis_name": ("nowhere", "either"), "axis_index_groups": [[0]]},
    {"axis_index_groups": "none"},
    {"virtual_batch_size": 4},
    {"virtual_batch_size": "all"},
]
OF_THE_UPDATE = [{"momentum": None}, {"momentum": 5.0}, {"momentum": "fast"}]

# Shapes without a value, of 4 or of no channels.
EMPTY = [(0, 4), (2, 0, 4), (8, 0), (0, 0)]


def options_id(options):
    """A test's name, without addresses: pytest-xdist wants the same names in every worker."""
    return str(
        {
            key: getattr(value, "__name__", "function") if callable(value) else value
            for key, value in options.items()
        }
    )


def data(shape=SHAPE, dtype=np.float32, seed=0, mean=0.5, std=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, shape), dtype)


@contextlib.contextmanager
def strict():
    """What conftest sets around jbn's own calls, for tests that call flax too."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def close(ours, theirs, factor=64):
    """Trees equal in structure, dtypes and shapes, and in value to `factor` roundings of the
    coarsest dtype among them.

    64 is for sums of up to 360 products of order 1 in float32, in an order of their own.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        tolerance = factor * max(float(jnp.finfo(a.dtype).eps), 2.0**-23)
        if a.dtype == jnp.bfloat16:
            tolerance = 4 * 2.0**-8  # computed in float32 by both, rounded once or twice
        wide = lambda v: np.asarray(v).astype(np.complex128 if np.iscomplexobj(v) else np.float64)
        np.testing.assert_allclose(wide(a), wide(b), rtol=tolerance, atol=tolerance)


def same(ours, theirs):
    """Trees equal to the last bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
