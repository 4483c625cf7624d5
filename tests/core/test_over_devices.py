"""Global statistics on 8 devices: values against the unsharded oracle, collectives in the compiled
program."""

import collections
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import opaque
import oracle
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

MESHES = {
    "batch": ((8,), ("data",), P("data"), P()),
    "batch-channel": ((4, 2), ("data", "model"), P("data", None, None, "model"), P("model")),
    "channel": ((8,), ("model",), P(None, None, None, "model"), P("model")),
    "replicated-params": ((4, 2), ("data", "model"), P("data", None, None, "model"), P()),
    "batch-spatial-channel": (
        (2, 2, 2),
        ("data", "space", "model"),
        P("data", "space", None, "model"),
        P("model"),
    ),
    "two-axes": ((4, 2), ("data", "more"), P(("data", "more")), P()),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SHAPE = (16, 4, 6, 8)
# Sums of 384 terms of order 1 in float32, in any order: sqrt(384) roundings, and some room for the
# few operations after.
TOLERANCE = 1e-5


def make_mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def collectives(compiled):
    """(operation, elements of its largest result) of each collective."""
    found = re.findall(
        r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\(",
        compiled.as_text(),
    )
    size = lambda dims: int(np.prod([int(n) for n in dims.split(",") if n]))
    return [
        (name, max(size(dims) for dims in re.findall(r"\[([\d,]*)\]", shapes)))
        for shapes, name in found
    ]


def reductions(compiled, full_size):
    """How many all-reduces of vectors there are; nothing may move an activation, nor anything near
    its size."""
    found = collectives(compiled)
    assert all(elements <= full_size // 32 for _, elements in found), found
    assert {name for name, elements in found if elements > 1} <= {"all-reduce", "all-gather"}, found
    return sum(name == "all-reduce" and elements > 1 for name, elements in found)


class Case:
    """Random arrays and what the oracle says of them; the gradient is that of sum(y * dy) + sum of
    the new mean."""

    def __init__(self, shape=SHAPE, mean=3.0, weights=None, activation=None, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(mean, 1, shape).astype(np.float32)
        self.dy = rng.normal(size=shape).astype(np.float32)
        self.params = jbn.Params(
            *(rng.normal(size=shape[-1:]).astype(np.float32) for _ in range(2))
        )
        self.state = jbn.State(
            np.zeros(shape[-1:], np.float32), np.ones(shape[-1:], np.float32), np.int32(0)
        )
        self.weights, self.activation = weights, activation
        given = {"weights": weights, "activation": activation}
        self.y, self.moments = oracle.forward(self.x, *self.params, **given)
        self.gradients = oracle.backward(self.x, self.dy, *self.params, dmean=0.1, **given)
        self.new_state = oracle.running(
            oracle.State(self.state.mean, self.state.var, 0), self.moments, momentum=0.9
        )

    def train(self, x, params, state, **options):
        activation = None if self.activation is None else getattr(jax.nn, self.activation)
        return jbn.batch_norm_train(
            x, params, state, momentum=0.9, activation=activation, **options
        )

    def step(self, x, dy, params, state, weights=None, **options):
        def loss(x, params):
            y, new_state = self.train(x, params, state, weights=weights, **options)
            return (y * dy).sum() + new_state.mean.sum(), (y, new_state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    def check(self, result, tolerance=TOLERANCE):
        (dx, dparams), (y, state) = result
        close = lambda actual, expected: np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            expected,
            rtol=0,
            atol=tolerance * max(1, np.abs(expected).max()),
        )
        close(y, self.y)
        close(state.mean, self.new_state.mean)
        close(state.var, self.new_state.var)
        assert state.count == self.new_state.count
        close(dx, self.gradients.x)
        close(dparams.scale, self.gradients.scale)
        close(dparams.bias, self.gradients.bias)

    def place(self, mesh, x_spec, vector_spec):
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        vectors = lambda tree: jax.tree.map(
            lambda v: put(v, vector_spec if np.ndim(v) else P()), tree
        )
        return put(self.x, x_spec), put(self.dy, x_spec), vectors(self.params), vectors(self.state)


@pytest.fixture(params=["xla", "kernel"])
def implementation(request, monkeypatch):
    return opaque.install(monkeypatch) if request.param == "kernel" else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", MESHES)
def test_sharded(layout, kind, implementation):
    shape, names, x_spec, vector_spec = MESHES[layout]
    case = Case(activation="relu")
    mesh = make_mesh(shape, names, KINDS[kind])
    x, dy, params, state = case.place(mesh, x_spec, vector_spec)
    with jax.set_mesh(mesh):
        step = (
            jax.jit(lambda *a: case.step(*a, implementation=implementation))
            .lower(x, dy, params, state)
            .compile()
        )
    case.check(step(x, dy, params, state))
    across = layout != "channel"
    assert reductions(step, x.size) == 3 * across
    # Only where the parameters are replicated though the channels are split, vectors of one number
    # per channel are gathered.
    gathered = [elements for name, elements in collectives(step) if name == "all-gather"]
    assert set(gathered) <= ({SHAPE[-1]} if layout == "replicated-params" else set())


def test_without_a_mesh_in_context(implementation):
    """And of the three all-reduces of a step, two are the forward pass's."""
    case = Case()
    arguments = case.place(make_mesh((8,), ("data",)), P("data"), P())
    x, _, params, state = arguments
    forward = (
        jax.jit(lambda *a: case.train(*a, implementation=implementation))
        .lower(x, params, state)
        .compile()
    )
    assert reductions(forward, case.x.size) == 2
    step = (
        jax.jit(lambda *a: case.step(*a, implementation=implementation)).lower(*arguments).compile()
    )
    case.check(step(*arguments))
    # XLA merges the backward pass's with the second of the forward pass: both wait for the first.
    assert reductions(step, case.x.size) == 2


def test_not_jitted(implementation):
    case = Case()
    case.check(
        case.step(
            *case.place(make_mesh((8,), ("data",)), P("data"), P()), implementation=implementation
        )
    )


def test_part_of_a_mesh_axis(implementation):
    """Reshaping a batch split 8 ways to [4, 2, ...] splits it over the halves and the quarters of
    one mesh axis."""
    case = Case(shape=(8, 4, 6, 8))
    x, dy, params, state = case.place(make_mesh((8,), ("data",)), P("data"), P())

    def step(x, dy, params, state):
        split = lambda array: array.reshape(4, 2, *array.shape[1:])
        (dx, dparams), (y, new_state) = case.step(
            split(x), split(dy), params, state, implementation=implementation
        )
        return (dx.reshape(x.shape), dparams), (y.reshape(x.shape), new_state)

    compiled = jax.jit(step).lower(x, dy, params, state).compile()
    case.check(compiled(x, dy, params, state))
    assert reductions(compiled, x.size) == 2


def masks():
    """Of 1024 examples over 8 shards, 128, 100, 7, 0, ... valid ones."""
    valid = np.array([128, 100, 7, 0, 1, 64, 0, 3])
    return (np.arange(128) < valid[:, None]).reshape(1024, 1)


def fractions():
    return np.random.default_rng(1).uniform(size=(1024, 1)).astype(np.float32) * masks()


@pytest.mark.parametrize("weights", [masks(), fractions()], ids=["mask", "fractions"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_differ_between_shards(kind, weights):
    case = Case(shape=(1024, 16), weights=weights)
    mesh = make_mesh((8,), ("data",), KINDS[kind])
    weights = jax.device_put(weights, NamedSharding(mesh, P("data")))
    arguments = (*case.place(mesh, P("data"), P()), weights)
    step = jax.jit(case.step).lower(*arguments).compile()
    case.check(step(*arguments))
    assert reductions(step, case.x.size) == 3


@pytest.mark.parametrize("weights", [None, masks()[:1020]], ids=["plain", "mask"])
def test_uneven_shards(weights, implementation):
    """1020 rows over 8 devices: the last holds 124, and padding that counts nothing."""
    case = Case(shape=(1020, 16), weights=weights, activation="relu")
    mesh = make_mesh((8,), ("data",))

    def step(x, dy, *rest):
        x, dy = (
            lax.with_sharding_constraint(array, NamedSharding(mesh, P("data"))) for array in (x, dy)
        )
        return case.step(x, dy, *rest, weights=weights, implementation=implementation)

    arguments = (case.x, case.dy, case.params, case.state)
    compiled = jax.jit(step).lower(*arguments).compile()
    case.check(compiled(*arguments))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_padding_of_uneven_shards_is_never_read(activation, implementation):
    """What XLA leaves in the padding is not zero after an operation that x went through."""
    check_padding(activation, lambda v: jnp.exp(v) * 50, implementation)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_padding_of_uneven_shards_that_is_not_finite(activation):
    """Nor is it finite after this one: 1 / 0."""
    check_padding(activation, jnp.reciprocal, "xla")


def check_padding(activation, through, implementation):
    mesh = make_mesh((8,), ("data",))
    case = Case(shape=(1020, 16), activation=activation)

    def step(x, dy, residual, params, state):
        place = lambda v: lax.with_sharding_constraint(v, NamedSharding(mesh, P("data")))
        x, dy, residual = (through(place(v)) for v in (x, dy, residual))

        def loss(x, residual, params):
            return (
                case.train(x, params, state, residual=residual, implementation=implementation)[0]
                * dy
            ).sum()

        return jax.grad(loss, (0, 1, 2))(x, residual, params)

    arrays = (case.x, case.dy, case.dy[::-1])
    if through is jnp.reciprocal:
        arrays = tuple(1 + jnp.square(v) for v in arrays)
    arguments = (*arrays, case.params, case.state)
    found = jax.jit(step)(*arguments)
    with jax.default_device(jax.devices()[0]):
        x, dy, residual = map(through, arrays)
        loss = lambda x, residual, params: (
            case.train(x, params, case.state, residual=residual)[0] * dy
        ).sum()
        want = jax.grad(loss, (0, 1, 2))(x, residual, case.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_uneven_spatial_shards_of_every_axis(implementation):
    case = Case(shape=(5, 3, 7, 6), activation="gelu")
    mesh = make_mesh((2, 2, 2), ("data", "space", "model"))

    def step(x, dy, *rest):
        spec = NamedSharding(mesh, P("data", "space", None, "model"))
        x, dy = (lax.with_sharding_constraint(array, spec) for array in (x, dy))
        return case.step(x, dy, *rest, implementation=implementation)

    case.check(jax.jit(step)(case.x, case.dy, case.params, case.state))


@pytest.mark.parametrize("kind", KINDS)
def test_large_mean(kind):
    """mean 1e4, std 1: one float32 sum of squares about zero would leave nothing of the
    variance."""
    case = Case(shape=(1024, 16), mean=1e4)
    mesh = make_mesh((8,), ("data",), KINDS[kind])
    x, _, params, state = case.place(mesh, P("data"), P())
    y, new = jax.jit(lambda *a: jbn.batch_norm_train(*a, momentum=0.0))(x, params, state)
    np.testing.assert_allclose(new.var, oracle.variance(case.moments), rtol=1e-4)  # issue: 1e-3
    np.testing.assert_allclose(y, case.y, atol=1e-3)


# Manual axes.


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("weights", [None, masks()], ids=["plain", "mask"])
def test_shard_map(check_vma, weights):
    case = Case(shape=(1024, 16), weights=weights)
    mesh = make_mesh((8,), ("data",))
    weights = np.ones((1024, 1), np.float32) if weights is None else weights

    def train(x, params, state, weights, **options):
        local = lambda x, weights, params, state: case.train(
            x, params, state, weights=weights, axis_name="data", **options
        )
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P(), P()),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )
        return mapped(x, weights, params, state)

    def step(x, dy, params, state, weights):
        def loss(x, params):
            y, new_state = train(x, params, state, weights)
            return (y * dy).sum() + new_state.mean.sum(), (y, new_state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    arguments = (case.x, case.dy, case.params, case.state, weights)
    forward = jax.jit(train).lower(case.x, case.params, case.state, weights).compile()
    assert reductions(forward, case.x.size) == 2
    case.check(jax.jit(step)(*arguments))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_within_shard_map(check_vma):
    """Gradients of replicated parameters are summed over the devices as JAX does: by itself, or by
    the user's psum."""
    case = Case(shape=(64, 16))

    def local(x, dy, params, state):
        def loss(x, params):
            y, new_state = case.train(x, params, state, axis_name="data")
            return (y * dy).sum(), (y, new_state)

        (dx, dparams), aux = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return (dx, dparams if check_vma else lax.psum(dparams, "data")), aux

    mapped = jax.shard_map(
        local,
        mesh=make_mesh((8,), ("data",)),
        in_specs=(P("data"), P("data"), P(), P()),
        out_specs=((P("data"), P()), (P("data"), P())),
        check_vma=check_vma,
    )
    case.gradients = oracle.backward(case.x, case.dy, *case.params)
    case.check(jax.jit(mapped)(case.x, case.dy, case.params, case.state))


def test_pmap():
    case = Case(shape=(64, 16))
    split = lambda array: array.reshape(8, 8, 16)

    def local(x, dy, params, state):
        def loss(x, params):
            y, new_state = case.train(x, params, state, axis_name="data")
            return (y * dy).sum(), (y, new_state)

        (dx, dparams), aux = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return (dx, lax.psum(dparams, "data")), aux

    mapped = jax.pmap(
        local, axis_name="data", in_axes=(0, 0, None, None), out_axes=((0, None), (0, None))
    )
    (dx, dparams), (y, state) = mapped(split(case.x), split(case.dy), case.params, case.state)
    case.gradients = oracle.backward(case.x, case.dy, *case.params)
    case.check(((dx.reshape(64, 16), dparams), (y.reshape(64, 16), state)))


def test_vmap():
    """One example at a time, the batch axis named."""
    case = Case(shape=(64, 16))

    def step(x, dy, params, state):
        def loss(x, params):
            one = lambda x: case.train(x, params, state, axis_name="batch")
            y, new_state = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)
            return (y * dy).sum() + new_state.mean.sum(), (y, new_state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    case.check(jax.jit(step)(case.x, case.dy, case.params, case.state))
    case.check(step(case.x, case.dy, case.params, case.state))


GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))


def grouped(check):
    """Check each half of a batch against the oracle on that half."""
    case = Case(shape=(64, 16))
    y, mean = check(case)
    for rows, group in ((slice(0, 32), 0), (slice(32, 64), 4)):
        expected, m = oracle.forward(case.x[rows], *case.params)
        np.testing.assert_allclose(y[rows], expected, atol=TOLERANCE * 10)
        np.testing.assert_allclose(mean[group], 0.1 * m.mean, atol=TOLERANCE)


def local_groups(x, params, state):
    y, new_state = jbn.batch_norm_train(
        x, params, state, momentum=0.9, axis_name="data", axis_index_groups=GROUPS
    )
    return y, new_state.mean[None]


def test_groups_under_pmap():
    def check(case):
        mapped = jax.pmap(local_groups, axis_name="data", in_axes=(0, None, None))
        y, mean = mapped(case.x.reshape(8, 8, 16), case.params, case.state)
        return y.reshape(64, 16), mean[:, 0]

    grouped(check)


def shard_map_groups(check_vma):
    return jax.shard_map(
        local_groups,
        mesh=make_mesh((8,), ("data",)),
        in_specs=(P("data"), P(), P()),
        out_specs=(P("data"), P("data")),
        check_vma=check_vma,
    )


def test_groups_under_shard_map():
    grouped(lambda case: jax.jit(shard_map_groups(False))(case.x, case.params, case.state))


def test_groups_need_check_vma_false():
    case = Case(shape=(64, 16))
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        jax.jit(shard_map_groups(True))(case.x, case.params, case.state)


def test_diverged_state_is_merged():
    """A shard_map that did not synchronize leaves a state on each device: psum_moments and
    update_state make one of them."""
    case = Case(shape=(64, 16))

    def local(x, params, state):
        y, _ = jbn.batch_norm_train(x, params, state, momentum=0.9)
        m = jbn.psum_moments(jbn.moments(x), "data")
        return y, jbn.update_state(state, m, momentum=0.9)

    mapped = jax.shard_map(
        local,
        mesh=make_mesh((8,), ("data",)),
        in_specs=(P("data"), P(), P()),
        out_specs=(P("data"), P()),
    )
    y, state = jax.jit(mapped)(case.x, case.params, case.state)
    np.testing.assert_allclose(
        y[:8], oracle.forward(case.x[:8], *case.params)[0], atol=1e-4
    )  # 8 rows: rstd up to 10
    np.testing.assert_allclose(state.mean, case.new_state.mean, atol=TOLERANCE)
    np.testing.assert_allclose(state.var, case.new_state.var, atol=TOLERANCE)


def test_diverged_states_of_equal_shards_are_merged():
    """Given only the states: each is as good as one shard, so they merge as moments of equal
    counts."""
    rng = np.random.default_rng(0)
    means, variances = (
        rng.normal(size=(8, 16)).astype(np.float32),
        rng.uniform(1, 2, size=(8, 16)).astype(np.float32),
    )

    def local(mean, var):
        state = jbn.State(mean[0], var[0], jnp.int32(5))
        merged = jbn.psum_moments(
            jbn.Moments(jnp.ones_like(state.mean), state.mean, state.var), "data"
        )
        return jbn.update_state(state, merged, momentum=0.0)

    mapped = jax.shard_map(
        local,
        mesh=make_mesh((8,), ("data",)),
        in_specs=(P("data"), P("data")),
        out_specs=jbn.State(P(), P(), P()),
        check_vma=False,
    )
    state = jax.jit(mapped)(means, variances)
    np.testing.assert_allclose(state.mean, means.mean(0), atol=1e-6)
    np.testing.assert_allclose(state.var, variances.mean(0) + means.var(0), atol=1e-5)


def test_higher_derivatives_on_a_mesh(implementation):
    """Hessian-vector product, sharded against not sharded."""
    case = Case()
    x, dy, params, state = case.place(make_mesh((8,), ("data",)), P("data"), P())

    def product(x, dy, params, state, implementation):
        gradient = lambda x: case.step(x, dy, params, state, implementation=implementation)[0][0]
        return jax.jvp(gradient, (x,), (dy,))[1]

    expected = product(case.x, case.dy, case.params, case.state, None)
    actual = jax.jit(product, static_argnums=4)(x, dy, params, state, implementation)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE * 10 * np.abs(expected).max())


def test_vmap_on_a_mesh(implementation):
    """Two batches at once, each split over the devices."""
    cases = [Case(seed=seed) for seed in (0, 1)]
    mesh = make_mesh((8,), ("data",))
    stack = lambda name: jax.device_put(
        np.stack([getattr(c, name) for c in cases]), NamedSharding(mesh, P(None, "data"))
    )
    train = lambda x: cases[0].train(
        x, cases[0].params, cases[0].state, implementation=implementation
    )[0]
    compiled = jax.jit(jax.vmap(train)).lower(stack("x")).compile()
    y = compiled(stack("x"))
    np.testing.assert_allclose(y[0], cases[0].y, atol=TOLERANCE * 10)
    np.testing.assert_allclose(
        y[1], oracle.forward(cases[1].x, *cases[0].params)[0], atol=TOLERANCE * 10
    )
    assert reductions(compiled, cases[0].x.size) == 2


def test_one_device_compiles_to_the_same_program_with_or_without_a_mesh():
    """The partitioning leaves no trace where there is nothing to partition."""
    case = Case()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    count = lambda compiled: collections.Counter(re.findall(r" ([a-z\-]+)\(", compiled.as_text()))
    plain = jax.jit(case.step).lower(case.x, case.dy, case.params, case.state).compile()
    on_mesh = jax.jit(case.step).lower(*case.place(mesh, P("data"), P())).compile()
    assert count(plain) == count(on_mesh)
    assert "CustomSPMDPartitioning" not in plain.as_text()
    assert plain.as_text().count("custom-call") == 0


def test_export_for_every_platform_and_for_8_devices():
    """An exported program holds no callback: XLA's own partitioner splits it."""
    case = Case()
    evaluate = jax.jit(lambda x, params, state: jbn.batch_norm_eval(x, params, state))
    exported = jax.export.export(evaluate, platforms=("cpu", "cuda", "tpu"))(
        case.x, case.params, case.state
    )
    expected = oracle.normalize(case.x, case.state.mean, case.state.var, *case.params)
    np.testing.assert_allclose(
        exported.call(case.x, case.params, case.state), expected, atol=TOLERANCE
    )
    arguments = case.place(make_mesh((8,), ("data",)), P("data"), P())
    exported = jax.export.export(jax.jit(case.step))(*arguments)
    assert exported.nr_devices == 8
    case.check(exported.call(*arguments))


# The README's four ways. Each is to be as short there as here.


def check_readme(case, y, state):
    np.testing.assert_allclose(np.reshape(y, case.y.shape), case.y, atol=TOLERANCE * 10)
    np.testing.assert_allclose(state.mean, 0.01 * case.moments.mean, atol=TOLERANCE)


def test_readme_jit():
    case = Case(shape=(64, 16))
    x, params, state = case.x, case.params, case.state
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    y, state = jax.jit(jbn.batch_norm_train)(x, params, state)
    check_readme(case, y, state)


def test_readme_explicit():
    case = Case(shape=(64, 16))
    x, params, state = case.x, case.params, case.state
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        x = jax.device_put(x, P("data"))
        y, state = jax.jit(jbn.batch_norm_train)(x, params, state)
    check_readme(case, y, state)


@pytest.mark.parametrize("mapped", ["x", "params"])
def test_vmap_over_an_axis_of_an_explicit_mesh(mapped):
    """Each of four members of the mapped axis lies on a device; what is not mapped, on no mesh."""
    case = Case(shape=(16, 6))
    members = jnp.arange(1.0, 5)

    def loss(member, x, params):
        x, params = (x * member, params) if mapped == "x" else (x, jbn.Params(member, params.bias))
        params = params._replace(scale=jnp.broadcast_to(params.scale, (6,)))
        y, state = jbn.batch_norm_train(x, params, case.state)
        return (y**3).sum() + state.var.sum()

    both = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, None))
    expected = both(members, case.x, case.params)
    with jax.set_mesh(make_mesh((4,), ("member",), AxisType.Explicit)):
        on_mesh = jax.device_put(members, P("member"))
        for run in (both, jax.jit(both)):
            got = run(on_mesh, case.x, case.params)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), got, expected
            )


def test_readme_shard_map():
    case = Case(shape=(64, 16))
    x, params, state = case.x, case.params, case.state
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    train = functools.partial(jbn.batch_norm_train, axis_name="data")
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=(P("data"), P())
    )
    y, state = jax.jit(mapped)(x, params, state)
    check_readme(case, y, state)


def test_readme_pmap():
    case = Case(shape=(64, 16))
    x, params, state = case.x, case.params, case.state
    train = functools.partial(jbn.batch_norm_train, axis_name="data")
    mapped = jax.pmap(train, axis_name="data", in_axes=(0, None, None), out_axes=(0, None))
    y, state = mapped(x.reshape(8, -1, *x.shape[1:]), params, state)
    check_readme(case, y, state)


def test_micro_batches_fold_the_state_once():
    """k micro-batches fold k times (effective momentum m^k): merging their moments and folding
    once is the remedy."""
    case = Case(shape=(64, 16))
    m = None
    for x in np.split(case.x, 4):
        m = jbn.moments(x) if m is None else jbn.merge_moments(m, jbn.moments(x))
    state = jbn.update_state(case.state, m, momentum=0.9)
    np.testing.assert_allclose(state.mean, case.new_state.mean, atol=TOLERANCE)
    np.testing.assert_allclose(state.var, case.new_state.var, atol=TOLERANCE)
    four_times = case.state
    for x in np.split(case.x, 4):
        four_times = jbn.batch_norm_train(x, case.params, four_times, momentum=0.9)[1]
    expected = sum(
        0.1 * 0.9 ** (3 - k) * oracle.moments(x).mean for k, x in enumerate(np.split(case.x, 4))
    )
    np.testing.assert_allclose(four_times.mean, expected, atol=TOLERANCE)
    assert four_times.count == 4
    assert state.count == 1


@pytest.mark.aot("libtpu")
@pytest.mark.parametrize("layout", ["batch", "batch-spatial-channel"])
def test_pods_take_no_more_collectives_than_4_chips(layout):
    """Compiled for TPU v5e without one; there XLA's own partitioner makes and merges the
    all-reduces (see jbn/core/op.py)."""
    found = {}
    for topology in ("v5e:2x2", "v5e:16x16"):
        devices = np.array(topologies.get_topology_desc(topology, "tpu").devices)
        shape = {"batch": (devices.size,), "batch-spatial-channel": (devices.size // 4, 2, 2)}[
            layout
        ]
        _, names, x_spec, vector_spec = MESHES[layout]
        mesh = Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
        x, vector, count = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((4 * devices.size, 16, 16, 256), jnp.float32, x_spec),
                ((256,), jnp.float32, vector_spec),
                ((), jnp.int32, P()),
            )
        )
        params, state = jbn.Params(vector, vector), jbn.State(vector, vector, count)

        def train(x, params, state):
            return jbn.batch_norm_train(x, params, state)

        def gradients(x, dy, params, state):
            return jax.vjp(lambda x, params: train(x, params, state)[0], x, params)[1](dy)

        forward = jax.jit(train).lower(x, params, state).compile()
        backward = jax.jit(gradients).lower(x, x, params, state).compile()
        found[topology] = [(reductions(c, x.size), unconditional(c)) for c in (forward, backward)]
    assert found["v5e:16x16"] == found["v5e:2x2"]
    # One all-reduce if the running mean is within 10 standard deviations of the batch's, one more
    # where it is not.
    assert found["v5e:2x2"] == [(2, 1), (3, 2)]


def unconditional(compiled):
    """How many all-reduces of vectors run whichever branch a conditional takes."""
    entry = compiled.as_text().split("\nENTRY ")[1]
    return sum(
        elements > 1 for _, elements in collectives(types.SimpleNamespace(as_text=lambda: entry))
    )
