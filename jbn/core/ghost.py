"""Virtual ("ghost") batches: consecutive examples along axis 0 are normalized by moments of their
own.

The batch axis becomes (groups, examples), and the groups become one more feature axis: this is a
layer of groups * features channels, whose scale and bias repeat.  A group that lies on one device
takes no communication.  The running state is updated with the moments of all examples.

Reference: Hoffer, Hubara & Soudry 2017, section 4.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jbn.core import autodiff, sharding, stats
from jbn.core.config import Config
from jbn.core.passes import Operands
from jbn.kernels.seam import Stats


def _recomputes_reshapes(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: keep everything but what a reshape gives."""
    return primitive.name != "reshape"


# What is kept of x is then x itself rather than its grouped copy.
@functools.partial(jax.checkpoint, policy=_recomputes_reshapes, prevent_cse=False, static_argnums=0)
def batch_norm(
    config: Config, operands: Operands, weights: Array | None, guess: Array
) -> tuple[Array, Stats]:
    """As `autodiff.batch_norm`, by the moments of each `config.virtual_batch_size` examples.

    The statistics returned are those of all examples.
    """
    x, scale, bias, residual, eps = operands
    groups = x.shape[0] // config.virtual_batch_size
    x, residual, weights = (_grouped(array, groups) for array in (x, residual, weights))
    axis = (0, *(a + 1 for a in config.axis))
    repeat = lambda vector: jnp.broadcast_to(vector, (groups, *vector.shape))
    vectors = tuple(map(repeat, (scale, bias, guess)))
    scale, bias, guess = sharding.split_alike(vectors, x, axis)
    local = config._replace(axis=axis, axis_name=None, axis_index_groups=None)
    operands = Operands(x, scale, bias, residual, eps)
    y, each = autodiff.batch_norm(local, operands, weights, guess)
    each = sharding.split_alike(each, x, axis)  # the counts, which come split over nothing
    pooled = stats.psum_stats(stats.pool(each), config.axis_name, config.axis_index_groups)
    return _ungrouped(y), pooled


def _grouped(array, groups) -> Any:
    """[examples, ...] to [groups, size, ...]; an axis of size 1 is broadcast and stays so."""
    if array is None:
        return None
    examples, *rest = array.shape
    shape = (1, 1, *rest) if examples == 1 else (groups, examples // groups, *rest)
    return _reshape(array, shape, lambda first, *others: (first, None, *others))


def _ungrouped(array):
    return _reshape(
        array,
        (array.shape[0] * array.shape[1], *array.shape[2:]),
        lambda first, _, *others: (first, *others),
    )


def _reshape(array, shape, split):
    """On an explicit mesh the shards of the batch axis become those of the group axis."""
    mesh, spec = jax.typeof(array).sharding.mesh, jax.typeof(array).sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return array.reshape(shape)
    spec = split(*sharding.padded(spec, array.ndim))
    shards = math.prod(mesh.shape[name] for name in jax.tree.leaves(spec[0]))
    if shape[0] % shards:
        raise NotImplementedError(
            f"virtual_batch_size {shape[1]} over {shards} shards of x on an explicit mesh: a group "
            f"would span devices, expected the number of groups, {shape[0]}, to be a multiple of "
            f"{shards}: use axis_types of AxisType.Auto"
        )
    return lax.reshape(array, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))
