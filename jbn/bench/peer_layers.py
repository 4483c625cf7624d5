"""One batch-norm layer of each JAX library, as pure functions.

The activation and the residual are added as users of that library do.  Each function takes a
problem and returns a `Layer`.  x has the layout of the case; the output has x's dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jbn import linen
from jbn.bench.cases import Problem
from jbn.kernels.backends import Implementation

MOMENTUM, EPS = 0.9, 1e-5


class Layer(NamedTuple):
    """Functions of (params, stats, x, residual): train returns (y, stats), evaluate returns y."""

    params: Any
    stats: Any
    train: Callable
    evaluate: Callable


def flax_linen(problem: Problem) -> Layer:
    norm = nn.BatchNorm(axis=problem.case.axis, momentum=MOMENTUM, epsilon=EPS, dtype=problem.dtype)
    return _of_linen(norm, problem, lambda y, residual: after(problem, y, residual))


def jbn_linen(problem: Problem, *, implementation: Implementation | None = None) -> Layer:
    norm = linen.BatchNorm(
        axis=problem.case.axis,
        momentum=MOMENTUM,
        epsilon=EPS,
        dtype=problem.dtype,
        activation=jax.nn.relu if problem.relu else None,
        implementation=implementation,
    )
    return _of_linen(norm, problem, None)


def _of_linen(norm, problem, then):
    """then: what follows the norm; None if the norm adds the residual itself."""
    axis = problem.case.axis % len(problem.case.shape)
    small = tuple(n if a == axis else 1 for a, n in enumerate(problem.case.shape))
    variables = norm.init(
        jax.random.key(0), jnp.zeros(small, problem.dtype), use_running_average=True
    )
    params, stats = variables["params"], variables["batch_stats"]

    def apply(params, stats, x, residual, **options):
        extra = {} if then else {"residual": residual}
        out = norm.apply({"params": params, "batch_stats": stats}, x, **extra, **options)
        y, new = out if isinstance(out, tuple) else (out, {})
        return then(y, residual) if then else y, new.get("batch_stats")

    return Layer(
        params,
        stats,
        lambda *args: apply(*args, use_running_average=False, mutable=["batch_stats"]),
        lambda *args: apply(*args, use_running_average=True)[0],
    )


def flax_nnx(problem: Problem) -> Layer:
    norm = nnx.BatchNorm(
        problem.case.features,
        axis=problem.case.axis,
        momentum=MOMENTUM,
        epsilon=EPS,
        dtype=jnp.dtype(problem.dtype),
        rngs=nnx.Rngs(0),
    )
    graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def train(params, stats, x, residual):
        norm = nnx.merge(graph, params, stats, copy=True)
        y = norm(x, use_running_average=False)
        return after(problem, y, residual), nnx.split(norm, nnx.Param, nnx.BatchStat)[2]

    def evaluate(params, stats, x, residual):
        return after(
            problem, nnx.merge(graph, params, stats)(x, use_running_average=True), residual
        )

    return Layer(params, stats, train, evaluate)


def haiku(problem: Problem) -> Layer:
    import haiku as hk  # pyright: ignore[reportMissingImports]: of the extra `peers`

    def forward(x, residual, is_training):
        norm = hk.BatchNorm(
            True,
            True,
            MOMENTUM,
            eps=EPS,
            data_format="N...C" if problem.case.channels_last else "NC...",
        )
        return after(problem, norm(x, is_training), residual).astype(problem.dtype)

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    x = jnp.zeros(problem.case.shape, problem.dtype)
    params, stats = model.init(jax.random.key(0), x, x if problem.adds else None, True)
    return Layer(
        params,
        stats,
        lambda params, stats, x, residual: model.apply(params, stats, x, residual, True),
        lambda params, stats, x, residual: model.apply(params, stats, x, residual, False)[0],
    )


def equinox(problem: Problem) -> Layer:
    """Its layer takes one example, channels first, inside vmap.

    A channels-last x is transposed, as a user would have to do.
    """
    import equinox as eqx  # pyright: ignore[reportMissingImports]: of the extra `peers`

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        problem.case.features,
        axis_name="batch",
        eps=EPS,
        momentum=MOMENTUM,
        mode="batch",
        dtype=jnp.float32,
    )
    params, static = eqx.partition(norm, eqx.is_inexact_array)
    channels_last = problem.case.channels_last

    def apply(params, state, x, residual, *, inference):
        layer = eqx.combine(params, static)

        def example(x, state):
            y, state = layer(
                jnp.moveaxis(x, -1, 0) if channels_last else x, state, inference=inference
            )
            return (jnp.moveaxis(y, 0, -1) if channels_last else y).astype(x.dtype), state

        y, state = jax.vmap(example, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )
        return after(problem, y, residual), state

    return Layer(
        params,
        state,
        lambda *args: apply(*args, inference=False),
        lambda *args: apply(*args, inference=True)[0],
    )


def after(problem: Problem, y, residual):
    """What follows a norm that does not do it itself: the residual is added, then relu."""
    y = y if residual is None else y + residual
    return jax.nn.relu(y) if problem.relu else y
