"""Virtual batches: each group by its own moments, in global order, whatever the number of
devices."""

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_over_devices import collectives

import jbn

ROWS, SIZE = 256, 32
# 32 rows a group: sums of 32 terms, and rstd near 1.
TOLERANCE = 2e-5


class Case:
    """Groups of different means; the gradient is that of sum(y * dy) + sum of the new mean."""

    def __init__(self, shape=(ROWS, 16), size=SIZE, weights=None, residual=False):
        rng = np.random.default_rng(0)
        drift = np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)) / shape[0]
        self.x = (rng.normal(size=shape) + drift).astype(np.float32)
        self.dy = rng.normal(size=shape).astype(np.float32)
        self.residual = rng.normal(size=shape).astype(np.float32) if residual else None
        self.params = jbn.Params(
            *(rng.normal(size=shape[-1:]).astype(np.float32) for _ in range(2))
        )
        self.state = jbn.State(
            np.zeros(shape[-1:], np.float32), np.ones(shape[-1:], np.float32), np.int32(0)
        )
        self.size, self.weights = size, weights
        given = {"weights": weights, "residual": self.residual}
        self.y, self.moments = oracle.groups_forward(self.x, size, *self.params, **given)
        self.gradients = oracle.groups_backward(
            self.x, self.dy, size, *self.params, dmean=1.0, **given
        )
        self.new_state = oracle.running(
            oracle.State(self.state.mean, self.state.var, 0), self.moments, momentum=0.0
        )

    def step(self, x, dy, params, state, weights=None, **options):
        def loss(x, params):
            y, new_state = jbn.batch_norm_train(
                x,
                params,
                state,
                momentum=0.0,
                virtual_batch_size=self.size,
                weights=weights,
                **options,
            )
            return (y * dy).sum() + new_state.mean.sum(), (y, new_state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    def check(self, result):
        (dx, dparams), (y, state) = result
        close = lambda actual, expected: np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            expected,
            rtol=0,
            atol=TOLERANCE * max(1, np.abs(expected).max()),
        )
        close(y, self.y)
        close(state.mean, self.new_state.mean)
        close(state.var, self.new_state.var)
        close(dx, self.gradients.x)
        close(dparams.scale, self.gradients.scale)
        close(dparams.bias, self.gradients.bias)

    @property
    def arguments(self):
        return self.x, self.dy, self.params, self.state

    def place(self, mesh, spec):
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        return put(self.x, spec), put(self.dy, spec), put(self.params, P()), put(self.state, P())


def device_mesh(devices, kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("shape", [(ROWS, 16), (24, 3, 5, 6)])
def test_values_and_gradients(shape):
    case = Case(shape, size=shape[0] // 8, residual=True)
    case.check(case.step(*case.arguments, residual=case.residual))


def test_one_group_is_the_whole_batch():
    case = Case(size=ROWS)
    y, m = oracle.forward(case.x, *case.params)
    result = jax.jit(case.step)(*case.arguments)
    case.check(result)
    np.testing.assert_allclose(result[1][0], y, atol=TOLERANCE * 10)
    np.testing.assert_allclose(result[1][1].var, oracle.variance(m), rtol=TOLERANCE)


@pytest.mark.parametrize("channel", [False, True], ids=["of-examples", "of-elements"])
def test_weights(channel):
    """One group counts nothing at all: its examples are normalized by mean 0 and variance 0, and
    its gradients stay finite."""
    rng = np.random.default_rng(1)
    weights = (rng.uniform(size=(ROWS, 16 if channel else 1)) < 0.6).astype(np.float32)
    weights[SIZE : 2 * SIZE] = 0
    case = Case(weights=weights)
    (dx, dparams), (y, state) = jax.jit(case.step)(*case.arguments, weights)
    counted = np.r_[0:SIZE, 2 * SIZE : ROWS]
    np.testing.assert_allclose(y[counted], case.y[counted], atol=TOLERANCE * 5)
    np.testing.assert_allclose(dx[counted], case.gradients.x[counted], atol=TOLERANCE * 5)
    np.testing.assert_allclose(state.mean, case.new_state.mean, atol=TOLERANCE)
    np.testing.assert_allclose(state.var, case.new_state.var, atol=TOLERANCE)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves((dx, dparams, y, state)))


def test_the_same_on_any_number_of_devices():
    """Every group is computed from the same numbers, but XLA sums its rows in another order where a
    device holds fewer groups.

    Measured on CPU: y differs by up to 1e-6, which is 4 units in the last place of values up to 4.
    """
    case = Case()
    results = [
        jax.jit(case.step)(*case.place(device_mesh(devices, kind), P("data")))
        for devices, kind in (
            (1, AxisType.Auto),
            (2, AxisType.Auto),
            (4, AxisType.Auto),
            (8, AxisType.Auto),
            (8, AxisType.Explicit),
        )
    ]
    (dx, dparams), (y, state) = results[0]
    # 32 rows in another order: sqrt(32) roundings; 256 for the parameters' gradients and the state.
    close = lambda terms: (
        lambda actual, expected: np.testing.assert_allclose(
            actual, expected, rtol=0, atol=terms**0.5 * 6e-8 * max(4, np.abs(expected).max())
        )
    )
    for (other_dx, other_dparams), (other_y, other_state) in results[1:]:
        jax.tree.map(close(SIZE), (other_y, other_dx), (y, dx))
        jax.tree.map(close(ROWS), (other_dparams, other_state), (dparams, state))
    case.check(results[-1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_groups_within_shards_take_no_communication(kind):
    case = Case()
    x, _, params, state = case.place(device_mesh(8, kind), P("data"))
    forward = jax.jit(lambda *a: jbn.batch_norm_train(*a, virtual_batch_size=SIZE)[0])
    assert collectives(forward.lower(x, params, state).compile()) == []
    backward = jax.jit(
        jax.grad(lambda *a: (jbn.batch_norm_train(*a, virtual_batch_size=SIZE)[0] ** 3).sum())
    )
    assert all(
        elements == 1 for _, elements in collectives(backward.lower(x, params, state).compile())
    )


def test_groups_that_span_devices():
    """64 rows over 32 of a shard: two devices share a group; no activation moves."""
    case = Case(size=64)
    arguments = case.place(device_mesh(8), P("data"))
    compiled = jax.jit(case.step).lower(*arguments).compile()
    case.check(compiled(*arguments))
    assert {name for name, _ in collectives(compiled)} == {"all-reduce"}
    assert all(elements <= 2 * 16 for _, elements in collectives(compiled))


def test_groups_that_span_devices_of_an_explicit_mesh():
    case = Case(size=64)
    with pytest.raises(
        NotImplementedError, match=r"virtual_batch_size 64 over 8 shards .* AxisType.Auto"
    ):
        jax.jit(case.step)(*case.place(device_mesh(8, AxisType.Explicit), P("data")))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    case = Case()

    def step(x, dy, params, state):
        def train(x, params, state):
            return jbn.batch_norm_train(
                x, params, state, momentum=0.0, virtual_batch_size=SIZE, axis_name="data"
            )

        mapped = jax.shard_map(
            train,
            mesh=device_mesh(8),
            in_specs=(P("data"), P(), P()),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )

        def loss(x, params):
            y, new_state = mapped(x, params, state)
            return (y * dy).sum() + new_state.mean.sum(), (y, new_state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    case.check(jax.jit(step)(*case.arguments))


def test_group_larger_than_the_local_batch():
    case = Case(size=64)
    train = lambda x: jbn.batch_norm_train(
        x, case.params, case.state, virtual_batch_size=64, axis_name="data"
    )[0]
    with pytest.raises(
        ValueError, match=r"virtual_batch_size is 64, expected a positive divisor of the batch, 32"
    ):
        jax.shard_map(train, mesh=device_mesh(8), in_specs=P("data"), out_specs=P("data"))(case.x)


def test_vmap():
    case = Case()
    x = np.stack([case.x, 2 * case.x])
    train = lambda x: jbn.batch_norm_train(x, case.params, case.state, virtual_batch_size=SIZE)[0]
    y = jax.vmap(train)(x)
    np.testing.assert_allclose(y[0], case.y, atol=TOLERANCE * 5)
    np.testing.assert_allclose(
        y[1], oracle.groups_forward(2 * case.x, SIZE, *case.params)[0], atol=TOLERANCE * 5
    )


def test_kernels_are_refused():
    case = Case()
    with pytest.raises(NotImplementedError, match="implementation=None"):
        case.step(*case.arguments, implementation="triton/interpret")
