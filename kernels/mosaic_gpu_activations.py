"""The fused activations and their derivatives, in operations that Mosaic GPU lowers on every JAX.

jax.nn.relu and others are custom_jvp functions, which Mosaic cannot lower before JAX 0.12, and no
version lowers the add_any by which JAX sums tangents.  Values and derivatives are those of jax.nn.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

_LEAK = 0.01  # jax.nn.leaky_relu's default slope, and jax.nn.gelu's default is the tanh formula
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def apply(activation: Callable | None, z: Array) -> Array:
    """activation(z)."""
    return z if activation is None else _VALUES[activation](z)


def transposed(activation: Callable | None, point: Array, dy: Array) -> Array:
    """activation'(point) * dy.

    A product with a derivative of zero would be NaN where dy is not finite; relu, as in jax.nn,
    selects instead.
    """
    return dy if activation is None else _COTANGENTS[activation](point, dy)


def _relu(z):
    return jnp.maximum(z, 0.0)


def _relu_cotangent(z, dy):
    return jnp.where(z > 0, dy, 0.0)


def _leaky_relu(z):
    return jnp.where(z >= 0, z, _LEAK * z)


def _leaky_relu_cotangent(z, dy):
    return jnp.where(z >= 0, dy, _LEAK * dy)


def _relu6(z):
    return jnp.minimum(jnp.maximum(z, 0.0), 6.0)


def _relu6_cotangent(z, dy):
    at_kink = (z == 0.0) | (z == 6.0)
    return jnp.where((z < 0.0) | (z > 6.0), 0.0, jnp.where(at_kink, 0.5 * dy, dy))


def _silu(z):
    return z * lax.logistic(z)


def _silu_cotangent(z, dy):
    sigmoid = lax.logistic(z)
    return dy * (sigmoid * (1 + z * (1 - sigmoid)))


def _gelu(z):
    return 0.5 * z * (1 + jnp.tanh(_gelu_inner(z)))


def _gelu_cotangent(z, dy):
    tanh = jnp.tanh(_gelu_inner(z))
    inner_derivative = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * (z * z))
    return dy * (0.5 * (1 + tanh) + 0.5 * z * (1 - tanh * tanh) * inner_derivative)


def _gelu_inner(z):
    return _GELU_SCALE * (z + _GELU_CUBIC * (z * z * z))


_VALUES = {
    jax.nn.relu: _relu,
    jax.nn.leaky_relu: _leaky_relu,
    jax.nn.relu6: _relu6,
    jax.nn.silu: _silu,
    jax.nn.gelu: _gelu,
}
_COTANGENTS = {
    jax.nn.relu: _relu_cotangent,
    jax.nn.leaky_relu: _leaky_relu_cotangent,
    jax.nn.relu6: _relu6_cotangent,
    jax.nn.silu: _silu_cotangent,
    jax.nn.gelu: _gelu_cotangent,
}
