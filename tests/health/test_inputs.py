"""What each batch norm reads, under every lifted transform and however the layer is called."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from flax.nnx import bridge

import jbn
import jbn.linen
import jbn.nnx
from jbn import health

pytestmark = pytest.mark.third_party

X = np.random.default_rng(0).normal(3, 2, (6, 5, 4)).astype(np.float32)


def close(m, x, weights=None):
    """Moments of one layer (or of one member of a stack) against float64 ones."""
    expected = oracle.moments(np.asarray(x, np.float64), weights=weights)
    np.testing.assert_allclose(m.count, expected.count)
    np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(m.m2, expected.m2, rtol=1e-5)


class Doubling(nn.Module):
    """Reads x, gives 2 x: what the layers of a chain read is known."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, _=None):
        self.norm(use_running_average=True, name="norm")(x)
        return 2 * x, None


class Inside(nn.Module):
    """A transformed block as a part of a model, not its outermost module."""

    block: type

    @nn.compact
    def __call__(self, x):
        return self.block(name="block")(x)


def scanned(**axes):
    return nn.scan(
        Doubling, split_rngs={"params": "params" in axes["variable_axes"]}, length=3, **axes
    )


STACKED = {"variable_axes": {"params": 0, "batch_stats": 0}}
SHARED = {"variable_axes": {}, "variable_broadcast": "params", "variable_carry": "batch_stats"}
UNROLLED = [X, 2 * X, 4 * X]
# Transformed class, variables stacked so many times (None: shared), what each member reads.
LINEN = {
    "plain": (Doubling, None, X),
    "remat": (nn.remat(Doubling), None, X),
    "jit": (nn.jit(Doubling), None, X),
    "remat of jit": (nn.remat(nn.jit(Doubling)), None, X),
    "scan": (scanned(**STACKED), 3, UNROLLED),
    "scan of remat": (
        nn.scan(nn.remat(Doubling), split_rngs={"params": True}, length=3, **STACKED),
        3,
        UNROLLED,
    ),
    "scan with one norm": (scanned(**SHARED), None, np.concatenate(UNROLLED)),
    "vmap": (nn.vmap(Doubling, split_rngs={"params": True}, **STACKED), 6, list(X)),
    "vmap with one norm": (
        nn.vmap(
            Doubling,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
        ),
        None,
        X,
    ),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", LINEN)
def test_lifted_transforms_of_linen(name, inside):
    block, members, read = LINEN[name]
    variables = Doubling().init(jax.random.key(0), X)
    if members is not None:
        variables = jax.tree.map(lambda v: jnp.stack([v] * members), variables)
    if inside:
        variables = {collection: {"block": tree} for collection, tree in variables.items()}
    model = Inside(block) if inside else block()
    model.apply(
        variables, X, mutable=["batch_stats"]
    )  # what nn.jit compiled before must not hide the norms
    (m,) = health.input_moments(model, variables, X).values()
    if members is None:
        close(m, read)
    else:
        for member in range(members):
            close(jax.tree.map(lambda v, i=member: v[i], m), read[member])


def test_a_layer_that_is_the_model_and_one_that_a_transform_made_of_it():
    for kind in (nn.BatchNorm, jbn.linen.BatchNorm, nn.remat(nn.BatchNorm), nn.jit(nn.BatchNorm)):
        norm = kind(use_running_average=True)
        found = health.input_moments(norm, norm.init(jax.random.key(0), X), X)
        close(found["layer"], X)


def test_a_scan_that_broadcasts_statistics_is_an_error():
    block = nn.scan(
        Doubling,
        variable_broadcast=["params", "batch_stats"],
        split_rngs={"params": False},
        length=3,
    )
    with pytest.raises(ValueError, match="broadcast"):
        health.input_moments(block(), Doubling().init(jax.random.key(0), X), X)


class Looping(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return nn.while_loop(lambda _, c: c[0] < 3, lambda m, c: (c[0] + 1, m(c[1])), norm, (0, x))


def test_a_norm_whose_moments_cannot_come_out_is_named():
    variables = {
        collection: {"norm": tree}
        for collection, tree in nn.BatchNorm(use_running_average=True)
        .init(jax.random.key(0), X)
        .items()
    }
    with pytest.raises(ValueError, match="'norm' ran where its variables cannot change"):
        health.input_moments(Looping(), variables, X)


class Shifting(nn.BatchNorm):
    """The norm of the base class reads x + 1."""

    def __call__(self, x, **options):
        return super().__call__(x + 1, **options)


class ShiftingNnx(nnx.BatchNorm):
    def __call__(self, x, **options):
        return super().__call__(x + 1, **options)


def test_a_subclass_has_the_moments_of_what_its_base_reads_once():
    norm = Shifting(use_running_average=True)
    close(health.input_moments(norm, norm.init(jax.random.key(0), X), X)["layer"], X + 1)
    norm = ShiftingNnx(4, use_running_average=True, rngs=nnx.Rngs(0))
    close(health.input_moments(norm, X)["layer"], X + 1)


ROWS = np.random.default_rng(1).random((6, 5, 1)) < 0.6
COMPLEX = (X + 1j * X[::-1]).astype(np.complex64)
READ = {  # name -> (x, keyword arguments, float64 array of shape [.., features], weights)
    "bool mask": (X, {"mask": ROWS}, X, ROWS),
    "int mask": (X, {"mask": ROWS.astype(np.int32) * 2}, X, ROWS),
    "list mask": (X, {"mask": ROWS.tolist()}, X, ROWS),
    "integers": (X.astype(np.int32), {}, X.astype(np.int32), None),
    "a list": (X.tolist(), {}, X, None),
}


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", READ)
def test_x_and_mask_are_read_as_the_layer_reads_them(library, keyword, name):
    x, options, read, weights = READ[name]
    args, options = ((), {"x": x, **options}) if keyword else ((x,), options)
    if library == "linen":
        norm = jbn.linen.BatchNorm(use_running_average=True)
        args = (norm.init(jax.random.key(0), X), *args)
    else:
        norm = jbn.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    m = health.input_moments(norm, *args, **options)["layer"]
    close(m, read, None if weights is None else np.broadcast_to(weights, X.shape))
    assert m.mean.dtype == jnp.float32


def test_complex_x_and_no_feature_axis():
    norm = jbn.linen.BatchNorm(use_running_average=True)
    for mapped in (False, True):
        model = norm
        variables = norm.init(jax.random.key(0), COMPLEX)
        if mapped:
            model = nn.vmap(
                jbn.linen.BatchNorm,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
            )(use_running_average=True)
        m = health.input_moments(model, variables, COMPLEX)["layer"]
        mean = COMPLEX.mean((0, 1), dtype=np.complex128)
        np.testing.assert_allclose(m.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(m.m2, (np.abs(COMPLEX - mean) ** 2).sum((0, 1)), rtol=1e-5)
    norm = jbn.linen.BatchNorm(use_running_average=True, axis=())
    m = health.input_moments(norm, norm.init(jax.random.key(0), X), X)["layer"]
    close(jax.tree.map(lambda v: v[None], m), X.reshape(-1, 1))


class Block(nnx.Module):
    """Reads x, gives 2 x; looks at attributes of its norm."""

    def __init__(self, rngs, norm=nnx.BatchNorm):
        self.norm = norm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        assert self.norm.num_features == 4
        assert isinstance(self.norm, nnx.BatchNorm)
        self.norm(x * self.norm.scale[...] ** 0)
        return 2 * x


class Stack(nnx.Module):
    """A block, or a stack of them, run by one of the transforms."""

    def __init__(self, run, members=None):
        make = lambda rngs: Block(rngs)
        rngs = nnx.Rngs(0)
        if members is not None:
            make = nnx.split_rngs(splits=members)(nnx.vmap(make))
        self.block, self.run = make(rngs), run

    def __call__(self, x):
        return self.run(self.block, x)


def call(block, x):
    return block(x)


def carry_block(block, x):
    run = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return run(block, x)[1]


NNX = {
    "plain": (call, None, X),
    "remat": (nnx.remat(call), None, X),
    "jit": (nnx.jit(call), None, X),
    "scan": (nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry), 3, UNROLLED),
    "scan with one norm": (carry_block, None, X),
    "vmap": (nnx.vmap(call, in_axes=(0, None)), 3, [X, X, X]),
    "vmap with one norm": (nnx.vmap(call, in_axes=(None, 0)), None, X),
    "cond": (lambda m, x: nnx.cond(x[0, 0, 0] < 99, call, lambda m, x: x, m, x), None, X),
}


@pytest.mark.parametrize("name", NNX)
def test_lifted_transforms_of_nnx(name):
    run, members, read = NNX[name]
    model = Stack(run, members)
    model(X)  # what nnx.jit compiled before must not hide the norms
    for _ in range(2):
        found = health.input_moments(model, X)
        assert list(found) == ["block/norm"]
        m = found["block/norm"]
        if members is None:
            close(m, read)
        else:
            for member in range(members):
                close(jax.tree.map(lambda v, i=member: v[i], m), read[member])
    assert type(model.block.norm) is nnx.BatchNorm
    assert not hasattr(model.block.norm, "input_moments")


@pytest.mark.parametrize(
    "run",
    [
        nnx.scan(call, in_axes=(None, 0), out_axes=0),
        lambda m, x: jax.vmap(m)(x),
        lambda m, x: jax.jit(call)(m, x),
    ],
    ids=["scan", "jax.vmap", "jax.jit"],
)
def test_an_nnx_norm_whose_moments_cannot_come_out_is_named(run):
    with pytest.raises(ValueError, match="'block/norm' ran where its variables cannot change"):
        health.input_moments(Stack(run), X)


class Held(nnx.Module):
    """Norms in a container; the first reads x, the second 2 x."""

    def __init__(self, hold, get):
        norm = lambda kind: kind(4, use_running_average=True, rngs=nnx.Rngs(0))
        self.held, self.get = hold([norm(nnx.BatchNorm), norm(jbn.nnx.BatchRenorm)]), get

    def __call__(self, x):
        first, second = self.get(self.held)
        return first(x), second(2 * x)


HOLDERS = {
    "List": (nnx.List, lambda held: held),
    "Dict": (lambda n: nnx.Dict(a=n[0], b=n[1]), lambda held: (held["a"], held["b"])),
    "list": (nnx.data, lambda held: held),
    "tuple": (lambda n: nnx.data(tuple(n)), lambda held: held),
    "dict": (lambda n: nnx.data(dict(zip("ab", n, strict=True))), lambda held: held.values()),
    "Sequential": (lambda n: nnx.Sequential(*n), lambda held: held.layers),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_nnx_norms_in_containers(name):
    found = health.input_moments(Held(*HOLDERS[name]), X)
    first, second = sorted(found)
    close(found[first], X)
    close(found[second], 2 * X)


def test_the_names_are_those_of_the_report():
    model = Held(*HOLDERS["List"])
    report = health.model_report(model, health.input_moments(model, X))
    assert [layer.layer for layer in report.layers] == ["held/0", "held/1"]
    norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    assert health.model_report(norm, health.input_moments(norm, X)).layers[0].drift is not None


class OneOfTwo(nn.Module):
    @nn.compact
    def __call__(self, x, both):
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
        y = norm("first")(x)
        return norm("second")(y) if both else y


def test_what_reads_nothing_is_left_out_and_no_norm_at_all_is_an_error():
    variables = OneOfTwo().init(jax.random.key(0), X, True)
    assert list(health.input_moments(OneOfTwo(), variables, X, False)) == ["first"]
    with pytest.raises(ValueError, match="no batch norm was called"):
        health.input_moments(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), X), X)
    with pytest.raises(ValueError, match="no batch norm was called"):
        health.input_moments(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), X)
    with pytest.raises(TypeError, match="model is a int"):
        health.input_moments(3, X)


def _in_loop(f):
    return lambda x: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, x)[1]


class Raw(nn.Module):
    """Its norm runs inside a transform of JAX's, and before or after that outside."""

    transform: object
    order: tuple

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        inside = norm if self.is_initializing() else self.transform(lambda x: norm(x))
        for is_inside in self.order:
            x = inside(x) if is_inside else norm(x)
        return x


@pytest.mark.parametrize("order", [(True,), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("transform", [jax.checkpoint, jax.jit, _in_loop])
def test_a_linen_norm_inside_a_transform_of_jax_is_named(transform, order):
    model = Raw(transform, order)
    variables = model.init(jax.random.key(0), X)
    name = "the batch norm 'norm'" if sum(order) == len(order) == 1 else ".*"
    with pytest.raises(ValueError, match=f"{name} ran where its variables cannot change"):
        health.input_moments(model, variables, X)


def test_a_linen_norm_inside_vmap_of_jax_has_the_moments_of_it_all():
    model = Raw(jax.vmap, (True, False))
    m = health.input_moments(model, model.init(jax.random.key(0), X), X)["norm"]
    close(m, np.concatenate([X, X / np.sqrt(1 + 1e-5)]))


class OwnNnx(nnx.BatchNorm):
    """Computes all by itself."""

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + self.epsilon)


class AroundNnx(nnx.BatchNorm):
    """Calls another norm in place of its base class."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.inner = nnx.BatchNorm(*args, **options)

    def __call__(self, x):
        return self.inner(2 * x)


class Around(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="inner")(2 * super().__call__(x))


def test_a_subclass_with_a_call_of_its_own_has_the_moments_of_what_it_reads():
    options = {"use_running_average": True, "rngs": nnx.Rngs(0)}
    found = health.input_moments(
        nnx.Sequential(OwnNnx(4, **options), nnx.BatchNorm(4, **options)), X
    )
    assert sorted(found) == ["layers/0", "layers/1"]
    close(found["layers/0"], X)
    close(found["layers/1"], X / np.sqrt(1 + 1e-5))


def test_a_norm_inside_a_norm_is_found():
    found = health.input_moments(AroundNnx(4, use_running_average=True, rngs=nnx.Rngs(0)), X)
    close(found["layer"], X)
    close(found["inner"], 2 * X)
    norm = Around(use_running_average=True)
    found = health.input_moments(norm, norm.init(jax.random.key(0), X), X)
    close(found["layer"], X)
    close(found["inner"], 2 * X / np.sqrt(1 + 1e-5))


class HoldingLinen(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.second = bridge.ToNNX(nn.BatchNorm(use_running_average=True), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.second(self.first(x))


class HoldingNnx(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="first")(x)
        options = {"use_running_average": True}
        return bridge.ToLinen(nnx.BatchNorm, args=(4,), kwargs=options, name="second")(x)


def test_a_norm_of_the_other_library_is_named():
    with pytest.raises(ValueError, match=r"'layer' is one of flax\.linen inside nnx\.bridge"):
        health.input_moments(HoldingLinen(nnx.Rngs(0)), X)
    variables = HoldingNnx().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"'second' is one of flax\.nnx inside nnx\.bridge"):
        health.input_moments(HoldingNnx(), variables, X)
