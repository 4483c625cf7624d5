"""Batch normalization of complex x, in plain JAX.

The mean is complex, the variance E|x - mean|^2 is real.
"""

import jax.numpy as jnp
from jax import lax

from jbn.core import layer, running, stats
from jbn.types import Moments, State


def any_complex(*values):
    """Whether any of these arrays or dtypes is complex."""
    return any(
        v is not None and jnp.issubdtype(getattr(v, "dtype", v), jnp.complexfloating)
        for v in values
    )


def evaluate(x, params, state, *, config, eps, residual):
    """`layer.evaluate` in plain JAX."""
    if config.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation {config.implementation!r} does not take complex values, "
            "expected None or 'xla'"
        )
    wide = (
        jnp.complex128
        if any(d in (jnp.float64, jnp.complex128) for d in (x.dtype, config.dtype))
        else jnp.complex64
    )
    reduced = tuple(a for a in range(x.ndim) if a not in config.axis)
    expand = lambda v: jnp.expand_dims(v.astype(wide), reduced)
    y = (x.astype(wide) - expand(state.mean)) * expand(lax.rsqrt(state.var.real + eps))
    y = y if params.scale is None else y * expand(params.scale)
    y = y if params.bias is None else y + expand(params.bias)
    y = y if residual is None else y + residual.astype(wide)
    y = y if config.activation is None else config.activation(y)
    return y.astype(config.dtype)


def train(x, params, state, *, config, momentum, eps, weights, residual, limits):
    """`layer.train` in plain JAX."""
    if limits is not None:
        raise NotImplementedError(
            f"batch renormalization does not take complex values, x is {x.dtype}"
        )
    if config.virtual_batch_size is not None:
        raise NotImplementedError(
            f"virtual_batch_size {config.virtual_batch_size} does not take complex values, "
            "expected None"
        )
    parts = [layer.moments(part, axis=config.axis, weights=weights) for part in (x.real, x.imag)]
    if config.axis_name is not None:
        parts = [
            stats.psum_moments(part, config.axis_name, config.axis_index_groups) for part in parts
        ]
    real, imag = parts
    batch = Moments(real.count, lax.complex(real.mean, imag.mean), real.m2 + imag.m2)
    if weights is not None:  # a masked element that is not finite is read as the mean
        mean = jnp.expand_dims(batch.mean, tuple(a for a in range(x.ndim) if a not in config.axis))
        x = jnp.where(~weights & ~jnp.isfinite(x), mean.astype(x.dtype), x)
    used = State(batch.mean, stats.variance(batch), state.count)
    y = evaluate(x, params, used, config=config, eps=eps, residual=residual)
    return y, _update(
        state,
        batch,
        momentum=momentum,
        unbiased=config.unbiased,
        skip_nonfinite=config.skip_nonfinite,
    )


def _update(state, batch, *, momentum, **options):
    """`update_state` with both parts of the mean side by side.

    So a batch that is not finite is refused as a whole.
    """
    twice = lambda v: jnp.stack([v, v])
    parts = lambda v: jnp.stack([v.real, v.imag])
    old = State(parts(state.mean), twice(state.var.real), state.count)
    new = running.update(
        old,
        Moments(twice(batch.count), parts(batch.mean), twice(batch.m2)),
        decay=running.decay(momentum),
        **options,
    )
    return State(lax.complex(*new.mean), new.var[0], new.count)
