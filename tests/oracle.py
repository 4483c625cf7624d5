"""Batch normalization in NumPy float64, in two passes: what every test compares with.

It imports nothing of jbn.  `axis` is the tuple of feature axes (negative ones allowed); everything
else is reduced.  A per-channel vector has the shape of the feature axes.  Activations go by the
names they have in jax.nn.  weights broadcast to x.  An element of weight zero that is not finite is
not read: it is normalized as if it were the mean, and influences no gradient.
"""

from typing import Any, NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Sum of the weights, mean, and sum of weight * (x - mean)^2 of each channel; 0, 0, 0 where
    nothing was counted."""

    count: Any
    mean: Any
    m2: Any


class Gradients(NamedTuple):
    """Cotangents of the arguments of `forward` or `normalize`; mean and var are None where the
    statistics were the batch's."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    residual: np.ndarray
    eps: np.ndarray
    mean: Any = None
    var: Any = None


class State(NamedTuple):
    """Running statistics and the number of batches they have seen."""

    mean: Any
    var: Any
    count: Any


def moments(x, axis=(-1,), weights=None):
    """Two passes: the mean, then the squares about it."""
    x, axis, weights = _float64(x), _ascending(axis, np.ndim(x)), _weights(weights, x)
    reduced = _reduced(x.ndim, axis)
    x = np.where(weights > 0, x, 0)
    count = weights.sum(reduced)
    divisor = np.where(count > 0, count, 1)
    mean = (weights * x).sum(reduced) / divisor
    m2 = (weights * (x - _wide(mean, x.ndim, axis)) ** 2).sum(reduced)
    return Moments(count, mean, m2)


def variance(m, unbiased=False):
    """m2 / count; unbiased: m2 / (count - 1) where at least two were counted."""
    divisor = np.where(m.count >= 2, m.count - 1, m.count) if unbiased else m.count
    return m.m2 / np.where(m.count > 0, divisor, 1)


def merge(a, b):
    """Moments of the union (Chan, Golub & LeVeque 1979)."""
    count = a.count + b.count
    divisor = np.where(count > 0, count, 1)
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + delta * b.count / divisor,
        a.m2 + b.m2 + delta**2 * a.count * b.count / divisor,
    )


def forward(
    x, scale=None, bias=None, *, axis=(-1,), eps=1e-5, weights=None, residual=None, activation=None
):
    """(y, moments of the batch): y = activation((x - mean) / sqrt(var + eps) * scale + bias +
    residual)."""
    m = moments(x, axis, weights)
    z = _pre_activation(x, m.mean, variance(m), scale, bias, axis, eps, weights, residual)
    return activate(z, activation), m


def normalize(
    x, mean, var, scale=None, bias=None, *, axis=(-1,), eps=1e-5, residual=None, activation=None
):
    """y by given statistics."""
    return activate(
        _pre_activation(x, mean, var, scale, bias, axis, eps, None, residual), activation
    )


def backward(
    x,
    dy,
    scale=None,
    bias=None,
    *,
    axis=(-1,),
    eps=1e-5,
    weights=None,
    residual=None,
    activation=None,
    dmean: Any = 0.0,
    dvar: Any = 0.0,
):
    """Cotangents through `forward`, given those of y and of the batch's mean and biased variance.

    A zero-weight element whose dz is not finite sends nothing back.
    """
    m = moments(x, axis, weights)
    through = _backward_given(
        x, dy, m.mean, variance(m), scale, bias, axis, eps, weights, residual, activation
    )
    dx = through.x + _moments_backward(
        x, m, axis, weights, through.mean + dmean, through.var + dvar
    )
    return through._replace(x=dx, mean=None, var=None)


def normalize_backward(
    x, dy, mean, var, scale=None, bias=None, *, axis=(-1,), eps=1e-5, residual=None, activation=None
):
    """Cotangents through `normalize`, those of mean and var among them."""
    return _backward_given(x, dy, mean, var, scale, bias, axis, eps, None, residual, activation)


def groups_forward(
    x, size, scale=None, bias=None, *, axis=(-1,), weights=None, residual=None, **options
):
    """Virtual batches: `size` consecutive examples of axis 0 are normalized apart; (y, moments of
    the whole batch)."""
    parts = _groups(x, size, weights, residual)
    y = [
        forward(x, scale, bias, axis=axis, weights=w, residual=r, **options)[0] for x, w, r in parts
    ]
    return np.concatenate(y), moments(x, axis, weights)


def groups_backward(
    x,
    dy,
    size,
    scale=None,
    bias=None,
    *,
    axis=(-1,),
    weights=None,
    residual=None,
    dmean: Any = 0.0,
    dvar: Any = 0.0,
    **options,
):
    """Cotangents through `groups_forward`; dmean and dvar are those of the whole batch's mean and
    biased variance."""
    dys = [dy for dy, _, _ in _groups(dy, size, None, None)]
    parts = [
        backward(x, dy, scale, bias, axis=axis, weights=w, residual=r, **options)
        for dy, (x, w, r) in zip(dys, _groups(x, size, weights, residual), strict=True)
    ]
    m = moments(x, axis, weights)
    dx = np.concatenate([part.x for part in parts]) + _moments_backward(
        x, m, axis, weights, dmean, dvar
    )
    dresidual = np.concatenate([part.residual for part in parts])
    total = lambda name: np.sum([getattr(part, name) for part in parts], axis=0)
    return Gradients(dx, total("scale"), total("bias"), dresidual, total("eps"))


def running(state, m, momentum=0.99, unbiased=False, skip_nonfinite=False):
    """The state after a batch: momentum weighs the OLD value, None averages over the batches seen.

    A channel that counted nothing keeps its values; if none counted anything, the number of batches
    stays too.
    """
    var = variance(m, unbiased)
    if not np.any(m.count > 0) or (
        skip_nonfinite and not (np.isfinite(m.mean).all() and np.isfinite(var).all())
    ):
        return state
    keep = state.count / (state.count + 1) if momentum is None else momentum
    counted = m.count > 0
    average = lambda old, new: np.where(counted, keep * _float64(old) + (1 - keep) * new, old)
    return State(average(state.mean, m.mean), average(state.var, var), state.count + 1)


def activate(z, activation):
    """None, relu, leaky_relu (slope 0.01), relu6, silu, or gelu by its tanh approximation."""
    if activation is None:
        return z
    if activation == "relu":
        return np.where(z > 0, z, 0)
    if activation == "leaky_relu":
        return np.where(z >= 0, z, 0.01 * z)
    if activation == "relu6":
        return np.clip(z, 0, 6)
    if activation == "silu":
        return z * _sigmoid(z)
    if activation == "gelu":
        return z * (1 + np.tanh(_gelu_argument(z))) / 2
    raise ValueError(f"the oracle knows no activation {activation!r}")


def activation_derivative(z, activation):
    """d activate / dz."""
    if activation is None:
        return np.ones_like(z)
    if activation == "relu":
        return np.where(z > 0, 1.0, 0.0)
    if activation == "leaky_relu":
        return np.where(z >= 0, 1.0, 0.01)
    if activation == "relu6":
        return np.where((z > 0) & (z < 6), 1.0, 0.0)
    if activation == "silu":
        return _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))
    if activation == "gelu":
        tanh = np.tanh(_gelu_argument(z))
        inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
        return (1 + tanh) / 2 + z * (1 - tanh**2) * inner / 2
    raise ValueError(f"the oracle knows no activation {activation!r}")


def _pre_activation(x, mean, var, scale, bias, axis, eps, weights, residual):
    """z: the normalized x, scaled and shifted, plus the residual."""
    ndim, axis = np.ndim(x), _ascending(axis, np.ndim(x))
    z = _centered(x, mean, axis, weights) / np.sqrt(_wide(_float64(var), ndim, axis) + eps)
    if scale is not None:
        z = z * _wide(_float64(scale), ndim, axis)
    if bias is not None:
        z = z + _wide(_float64(bias), ndim, axis)
    return z if residual is None else z + _float64(residual)


def _backward_given(x, dy, mean, var, scale, bias, axis, eps, weights, residual, activation):
    """Cotangents with mean and var held apart from x."""
    axis, features = _ascending(axis, np.ndim(x)), np.shape(mean)
    ndim, reduced = np.ndim(x), _reduced(np.ndim(x), axis)
    scale = np.ones(features) if scale is None else _float64(scale)
    rstd = 1 / np.sqrt(_float64(var) + eps)
    z = _pre_activation(x, mean, var, scale, bias, axis, eps, weights, residual)
    dz = activation_derivative(z, activation) * _float64(dy)
    dz = np.where((_weights(weights, x) <= 0) & ~np.isfinite(dz) | _unread(x, weights), 0, dz)
    centered = _centered(x, mean, axis, weights)
    sum_dz_xc = (dz * centered).sum(reduced)
    dvar = -scale * rstd**3 / 2 * sum_dz_xc
    return Gradients(
        x=_wide(scale * rstd, ndim, axis) * dz,
        scale=rstd * sum_dz_xc,
        bias=dz.sum(reduced),
        residual=dz,
        eps=dvar.sum(),
        mean=-scale * rstd * dz.sum(reduced),
        var=dvar,
    )


def _moments_backward(x, m, axis, weights, dmean, dvar):
    """What the batch's mean and biased variance send back to x."""
    ndim, axis = np.ndim(x), _ascending(axis, np.ndim(x))
    divisor = np.where(m.count > 0, m.count, 1)
    dmean, dvar = (
        _wide(np.broadcast_to(ct, np.shape(m.mean)) / divisor, ndim, axis) for ct in (dmean, dvar)
    )
    return _weights(weights, x) * (dmean + 2 * dvar * _centered(x, m.mean, axis, weights))


def _centered(x, mean, axis, weights):
    """x - mean; 0 for an element that is not read."""
    return np.where(_unread(x, weights), 0, _float64(x) - _wide(_float64(mean), np.ndim(x), axis))


def _unread(x, weights):
    return (_weights(weights, x) <= 0) & ~np.isfinite(_float64(x))


def _groups(x, size, weights, residual):
    """(x, weights, residual) of each group of `size` consecutive examples."""
    starts = range(0, len(x), size)
    weights = None if weights is None else _weights(weights, x)
    cut = lambda array, start: None if array is None else array[start : start + size]
    return [(cut(x, start), cut(weights, start), cut(residual, start)) for start in starts]


def _weights(weights, x):
    return (
        np.ones(np.shape(x)) if weights is None else np.broadcast_to(_float64(weights), np.shape(x))
    )


def _float64(array):
    return np.asarray(array).astype(np.float64)


def _ascending(axis, ndim):
    return tuple(sorted(a % ndim for a in axis))


def _reduced(ndim, axis):
    return tuple(a for a in range(ndim) if a not in axis)


def _wide(vector, ndim, axis):
    """A per-channel vector made broadcastable against an array of rank ndim."""
    return np.expand_dims(vector, _reduced(ndim, axis))


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _gelu_argument(z):
    return np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
