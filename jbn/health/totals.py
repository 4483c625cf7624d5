"""The moments of all that one batch norm has read: of real or complex x, masked, and under vmap."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn import functional
from jbn.core import flax_common, validate
from jbn.kernels.seam import accumulator
from jbn.types import Moments


def empty(mean: Array) -> Moments:
    """Moments of nothing, one value per value of the running mean (stacked where it is)."""
    zeros = jnp.zeros(mean.shape, accumulator(mean.real.dtype))
    return Moments(zeros, jnp.zeros(mean.shape, jnp.promote_types(zeros.dtype, mean.dtype)), zeros)


def record(total: Moments, norm: Any, function: Callable, args: tuple, kwargs: dict) -> Moments:
    """The moments read so far with those of one call, which reads x and mask as the norm does.

    Args:
        total: the moments read so far.
        norm: the layer.
        function: its `__call__`, whose signature tells which argument is x.
        args, kwargs: of the call.
    """
    x, mask = _read_arguments(function, norm, args, kwargs)
    x = validate.jax_array(x)
    if not x.size:
        return total
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    axis = flax_common.feature_axes(norm.axis, x.ndim)
    weights = None if mask is None else validate.weights(jnp.asarray(mask).astype(bool), x)
    if not axis:  # the whole array is one feature
        axis, x, weights = -1, x[..., None], None if weights is None else weights[..., None]
    moments = functools.partial(functional.moments, axis=axis, weights=weights)
    m = moments(x.real)
    if jnp.iscomplexobj(x):
        imaginary = moments(x.imag)
        m = Moments(m.count, lax.complex(m.mean, imaginary.mean), m.m2 + imaginary.m2)
    # Of the types of the total, which may be what a loop carries. Nothing is differentiated.
    m = lax.stop_gradient(jax.tree.map(lambda v: v.reshape(total.mean.shape), m))
    wide = np.result_type(total.mean.dtype, np.complex64 if jnp.iscomplexobj(x) else np.float32)
    m = Moments(m.count.astype(total.count.dtype), m.mean.astype(wide), m.m2.astype(total.m2.dtype))
    if getattr(norm, "skip_nonfinite", False):
        finite = jnp.isfinite(m.mean).all() & jnp.isfinite(m.m2).all()
        m = jax.tree.map(lambda v: jnp.where(finite, v, jnp.zeros_like(v)), m)
    return _add(lax.stop_gradient(total), m)


def _read_arguments(function, layer, args, kwargs):
    """The x and mask of a call, by position or by name."""
    given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
    _, x = list(given.values())[:2]
    return given.get("x", x), given.get("mask")


def merge(a: Moments, b: Moments) -> Moments:
    """`jbn.merge_moments`, for complex means too."""
    if not (jnp.iscomplexobj(a.mean) or jnp.iscomplexobj(b.mean)):
        return functional.merge_moments(a, b)
    wide = np.result_type(a.mean.dtype, b.mean.dtype)
    a, b = (v._replace(mean=v.mean.astype(wide)) for v in (a, b))
    return _pool(jax.tree.map(lambda v, w: jnp.stack(jnp.broadcast_arrays(v, w)), a, b))


def _pool(m):
    """The moments of the union over the leading axis; the mean may be complex."""
    count, weight = m.count.sum(0), m.count.astype(m.mean.dtype)
    divisor = jnp.where(count > 0, count, 1).astype(m.mean.dtype)
    mean = m.mean[0] + (weight * (m.mean - m.mean[:1])).sum(0) / divisor
    return Moments(count, mean, (m.m2 + m.count * jnp.square(jnp.abs(m.mean - mean[None]))).sum(0))


@jax.custom_batching.custom_vmap
def _add(total, m):
    """`merge`. Where vmap maps what a shared layer reads, the layer has the moments of it all."""
    return merge(total, m)


@_add.def_vmap
def _add_mapped(axis_size, in_batched, total, m):
    every = lambda tree, mapped: jax.tree.map(
        lambda v, is_mapped: v if is_mapped else jnp.broadcast_to(v, (axis_size, *v.shape)),
        tree,
        mapped,
    )
    total_mapped, m_mapped = in_batched
    m = every(m, m_mapped)
    if any(jax.tree.leaves(total_mapped)):
        merged, is_mapped = _add(every(total, total_mapped), m), True
    else:
        merged, is_mapped = _add(total, _pool(m)), False
    return merged, jax.tree.map(lambda _: is_mapped, merged)
