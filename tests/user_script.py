"""A user's script, which pyright and mypy check in a folder of its own: every name has its type."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jbn

x: jax.Array = jnp.ones((8, 4))
params, state = jbn.init(4)
assert_type(params, jbn.Params)
y, state = jbn.batch_norm_train(x, params, state, activation=jax.nn.relu)
assert_type(y, jax.Array)
assert_type(state, jbn.State)
assert_type(jbn.batch_norm_eval(x, params, state, implementation="xla"), jax.Array)
assert_type(jbn.moments(x), jbn.Moments)
layer = jbn.linen.BatchNorm(use_running_average=False)
report = jbn.health.report(params, state)
assert_type(report, jbn.health.LayerReport)
