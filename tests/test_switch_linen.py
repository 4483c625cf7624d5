"""jbn.linen.replacing: flax's own layers compute by jbn, however a model calls them."""

import concurrent.futures
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
import jbn.recalibrate
from jbn import health

pytestmark = pytest.mark.third_party

# Mean 1e4, std 1: flax's variance of it is 0, so that its outputs are hundreds, and jbn's are not.
FAR = (np.random.default_rng(0).normal(size=(32, 6)) + 1e4).astype(np.float32)
NEAR = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)


class Plain(nn.Module):
    """Norms by nn.compact, named by flax, one of them called twice."""

    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = self.layer(use_running_average=not train)(x)
        norm = self.layer(momentum=0.9, axis=-1, name="again")
        return norm(norm(x, use_running_average=not train), use_running_average=not train)


class Setup(nn.Module):
    layer: type = nn.BatchNorm

    def setup(self):
        self.norms = [self.layer(), self.layer(use_scale=False)]

    def __call__(self, x, train=True):
        for norm in self.norms:
            x = norm(x, use_running_average=not train)
        return x


class Remat(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        return nn.remat(self.layer)(use_running_average=not train)(x)


class Jitted(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        return nn.jit(self.layer)(use_running_average=not train)(x)


class JittedMethod(nn.Module):
    layer: type = nn.BatchNorm

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return self.layer(use_running_average=False)(x)


class Scanned(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        class Body(nn.Module):
            layer: type

            @nn.compact
            def __call__(self, x, _):
                return self.layer(use_running_average=not train)(x), None

        axes = {"params": 0, "batch_stats": 0}
        scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(self.layer)(x, None)[0]


class Vmapped(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        axes = {"params": 0, "batch_stats": 0}
        vmap = nn.vmap(self.layer, variable_axes=axes, split_rngs={"params": True}, in_axes=1)
        return vmap(use_running_average=not train)(x.reshape(16, 2, 6))


class Shared(nn.Module):
    """The norm's variables are the module's own."""

    layer: type = nn.BatchNorm

    def setup(self):
        self.norm = self.layer()
        nn.share_scope(self, self.norm)

    def __call__(self, x, train=True):
        return self.norm(x, use_running_average=not train)


class Branches(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        norm = self.layer(use_running_average=not train)
        if self.is_initializing():
            return norm(x)
        same = lambda module, x: module(x)
        return nn.cond(x.sum() > 0, same, lambda module, x: module(-x), norm, x)


class Itself(nn.BatchNorm):
    """A subclass."""


MODELS = [Plain, Setup, Remat, Jitted, JittedMethod, Scanned, Vmapped, Shared, Branches]


def run(model, variables, x, **options):
    y, new = model.apply(variables, x, mutable=["batch_stats"], **options)
    return y, new["batch_stats"]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def unlike(a, b):
    """Whether some value is as far off as flax's of FAR: the running variance by 0.01."""
    far = jax.tree.map(lambda a, b: np.abs(a - b).max() > 5e-3, a, b)
    return any(jax.tree.leaves(far))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_computes_as_the_model_with_jbns_layers(kind, jit):
    model, ours = kind(), kind(jbn.linen.BatchNorm)
    wrap = jax.jit if jit else lambda f: f
    variables = model.init(jax.random.key(0), FAR)
    with jbn.linen.replacing():
        equal(model.init(jax.random.key(0), FAR), variables)
        got = wrap(lambda v, x: run(model, v, x))(variables, FAR)
    equal(got, wrap(lambda v, x: run(ours, v, x))(variables, FAR))
    assert unlike(run(model, variables, FAR), got)


@pytest.mark.parametrize("kind", [Plain, Scanned, Remat], ids=lambda kind: kind.__name__)
def test_gradients_through_lifted_transforms(kind):
    dy = np.random.default_rng(2).normal(size=FAR.shape).astype(np.float32)
    variables = kind().init(jax.random.key(0), FAR)

    def gradients(model):
        loss = lambda params, x: (run(model, {**variables, "params": params}, x)[0] * dy).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(variables["params"], FAR)

    with jbn.linen.replacing():
        got = gradients(kind())
    equal(got, gradients(kind(jbn.linen.BatchNorm)))


def test_the_model_may_be_a_norm():
    norm = nn.BatchNorm(use_running_average=False)
    with jbn.linen.replacing():
        variables = norm.init(jax.random.key(0), FAR)
        got = run(norm, variables, FAR)
    equal(got, run(jbn.linen.BatchNorm(use_running_average=False), variables, FAR))


def test_tabulate_and_intermediates_are_flaxs():
    plain = nn.tabulate(Plain(), jax.random.key(0))(NEAR)
    names = lambda: Plain().apply(
        Plain().init(jax.random.key(0), NEAR),
        NEAR,
        capture_intermediates=True,
        mutable=["intermediates", "batch_stats"],
    )[1]["intermediates"]
    expected = jax.tree.map(jnp.shape, names())
    with jbn.linen.replacing():
        assert nn.tabulate(Plain(), jax.random.key(0))(NEAR) == plain
        assert jax.tree.map(jnp.shape, names()) == expected


def test_jit_traces_anew_on_both_sides_of_the_context():
    model = Plain()
    variables = model.init(jax.random.key(0), NEAR)
    traces = []

    @jax.jit
    def step(variables, x):
        traces.append(None)
        return run(model, variables, x)

    outside = step(variables, FAR)
    with jbn.linen.replacing():
        inside = step(variables, FAR)
    assert len(traces) == 2
    assert unlike(inside, outside)
    equal(step(variables, FAR), outside)
    with jbn.linen.replacing():
        equal(step(variables, FAR), inside)
    assert len(traces) == 2, "equal options hit the cache"
    with jbn.linen.replacing(momentum=0.5):
        different = step(variables, FAR)
    assert len(traces) == 3
    assert unlike(different, inside)


def test_a_jitted_method_is_traced_anew():
    model = JittedMethod()
    variables = model.init(jax.random.key(0), FAR)
    outside = run(model, variables, FAR)[0]
    with jbn.linen.replacing():
        inside = run(model, variables, FAR)[0]
    assert np.abs(inside - outside).max() > 10
    equal(run(model, variables, FAR)[0], outside)


def test_as_a_decorator_of_functions_and_of_methods():
    model = Plain()
    variables = model.init(jax.random.key(0), FAR)
    expected = run(Plain(jbn.linen.BatchNorm), variables, FAR)
    decorated = jbn.linen.replacing()(lambda v, x: run(model, v, x))
    equal(decorated(variables, FAR), expected)
    equal(decorated(variables, FAR), expected)  # each call enters anew

    class Half(nn.Module):
        @jbn.linen.replacing()
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    y, _ = Half().init_with_output(jax.random.key(0), FAR)
    assert np.abs(y).max() < 5


def test_options_everywhere_and_by_path():
    poisoned = NEAR.copy()
    poisoned[3, 2] = np.nan
    model = Plain()
    variables = model.init(jax.random.key(0), NEAR)
    with jbn.linen.replacing(skip_nonfinite=True):
        equal(run(model, variables, poisoned)[1], variables["batch_stats"])
    with jbn.linen.replacing(skip_nonfinite=True, by_path={"again": {"skip_nonfinite": False}}):
        stats = run(model, variables, poisoned)[1]
    equal(stats["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    assert np.isnan(stats["again"]["mean"]).any()
    with jbn.linen.replacing(by_path={"Batch*": None}):
        y, _ = run(model, variables, FAR)
    by_hand = nn.BatchNorm(use_running_average=False).apply(
        {c: v["BatchNorm_0"] for c, v in variables.items()}, FAR, mutable=["batch_stats"]
    )[0]
    again = jbn.linen.BatchNorm(use_running_average=False)
    for _ in range(2):
        by_hand = again.apply(
            {c: v["again"] for c, v in variables.items()}, by_hand, mutable=["batch_stats"]
        )[0]
    equal(y, by_hand)


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 8},
        {"unbiased": True},
        {"activation": nn.relu},
        {"update_stats": False},
        {"implementation": "triton/interpret"},
        {"epsilon": 0.1, "momentum": 0.5, "dtype": jnp.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_option_is_that_of_jbns_layer(options):
    x = np.random.default_rng(3).normal(size=(32, 128)).astype(np.float32)
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    with jbn.linen.replacing(**options):
        got = run(norm, variables, x)
    equal(got, run(jbn.linen.BatchNorm(use_running_average=False, **options), variables, x))


def test_axis_name_synchronizes_models_that_know_nothing_of_it():
    model = Plain()
    variables = model.init(jax.random.key(0), NEAR)
    with jbn.linen.replacing(axis_name="batch"):
        step = jax.vmap(lambda x: run(model, variables, x)[1], axis_name="batch")
        stats = step(NEAR.reshape(4, 8, 6))
    whole = run(Plain(jbn.linen.BatchNorm), variables, NEAR)[1]
    for got, expected in zip(jax.tree.leaves(stats), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-6)


def test_of_nested_contexts_the_innermost_decides():
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), NEAR)
    mean = lambda: run(norm, variables, NEAR)[1]["mean"]
    with jbn.linen.replacing(momentum=0.0):
        outer = mean()
        with jbn.linen.replacing(momentum=1.0):
            equal(mean(), variables["batch_stats"]["mean"])
            with jbn.linen.replacing(momentum=0.0):  # as the outermost, and not it
                equal(mean(), outer)
        equal(mean(), outer)
    np.testing.assert_allclose(outer, NEAR.mean(0), atol=1e-6)


def test_an_error_leaves_the_context():
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), FAR)
    with pytest.raises(ZeroDivisionError), jbn.linen.replacing():
        raise ZeroDivisionError
    assert np.abs(run(norm, variables, FAR)[0]).max() > 10


def test_a_thread_starts_outside():
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), FAR)
    call = lambda: float(np.abs(run(norm, variables, FAR)[0]).max())
    with jbn.linen.replacing(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(call).result() > 10
        assert call() < 5


def test_subclasses_are_left_alone_and_reported_once():
    model = Plain(Itself)
    variables = model.init(jax.random.key(0), FAR)
    expected = run(model, variables, FAR)
    with warnings.catch_warnings(record=True) as caught, jbn.linen.replacing():
        warnings.simplefilter("always")
        equal(run(model, variables, FAR), expected)
        run(model, variables, FAR)
    messages = [str(warning.message).partition(".")[0] for warning in caught]
    assert messages == ["left alone: Itself_0 (Itself)", "left alone: again (Itself)"]
    with warnings.catch_warnings(), jbn.linen.replacing():
        warnings.simplefilter("error")
        run(Plain(jbn.linen.BatchNorm), Plain().init(jax.random.key(0), FAR), FAR)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip_nonfinit": True}, TypeError, "skip_nonfinit cannot"),
        ({"param_dtype": jnp.bfloat16}, TypeError, "param_dtype cannot"),
        ({"use_scale": False}, TypeError, "use_scale cannot"),
        ({"by_path": {"*": {"axis": 1}}}, TypeError, "axis cannot"),
        ({"implementation": "cudnn"}, ValueError, "cudnn"),
        ({"activation": "relu"}, TypeError, "relu"),
        ({"momentum": jnp.float32(0.9)}, TypeError, "momentum is Array.*hashable"),
        (
            {"by_path": {"*": 0.9}},
            TypeError,
            r"by_path\['\*'\] is a float \(0\.9\), expected a dict",
        ),
        ({"by_path": {"*": "momentum"}}, TypeError, r"by_path\['\*'\] is a str .*expected a dict"),
        ({"by_path": {("0",): {}}}, TypeError, r"pattern \('0',\), expected a string with /"),
        ({"by_path": [("*", {})]}, TypeError, "by_path is a list .*expected a dict of options"),
        ({"by_path": ()}, TypeError, "by_path is a tuple"),
        ({"by_path": {"*": {3: 0.9}}}, TypeError, "options 3 cannot be given"),
    ],
)
def test_options_that_cannot_be_given(options, error, message):
    with pytest.raises(error, match=message), jbn.linen.replacing(**options):
        pass


def test_lists_are_options_too():
    with jbn.linen.replacing(axis_name="i", axis_index_groups=[[0, 1], [2, 3]]):
        norm = nn.BatchNorm(use_running_average=False)
        variables = norm.init(jax.random.key(0), NEAR)
        step = jax.pmap(
            lambda x: run(norm, variables, x)[1]["mean"], "i", devices=jax.devices()[:4]
        )
        means = step(NEAR.reshape(4, 8, 6))
    np.testing.assert_allclose(means[0], 0.01 * NEAR[:16].mean(0), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(means[2], 0.01 * NEAR[16:].mean(0), rtol=1e-5, atol=1e-8)


def test_what_the_tools_record_inside_the_context():
    model = Plain()
    variables = model.init(jax.random.key(0), NEAR)
    expected = health.input_moments(model, variables, NEAR, train=False)
    recalibrated = lambda: jbn.recalibrate.recalibrate_linen(
        lambda v, x: model.apply(v, x, train=False), variables, [NEAR]
    )
    plain = recalibrated()
    with jbn.linen.replacing():
        found = health.input_moments(model, variables, NEAR, train=False)
        inside = recalibrated()
    assert found.keys() == expected.keys()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, expected)
    jax.tree.map(close, inside, plain)


def test_a_model_from_pypi():
    """jax-resnet 0.0.4, which evaluates where nothing is mutable."""
    jax_resnet = pytest.importorskip("jax_resnet", reason="needs jax-resnet: pip install it")
    model = jax_resnet.ResNet18(n_classes=10)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    train = jax.jit(lambda v, x: run(model, v, x))
    expected, evaluated = train(variables, x), model.apply(variables, x)
    calls = []

    def count(call, args, kwargs, context):
        calls.append(isinstance(context.module, nn.BatchNorm))
        return call(*args, **kwargs)

    with jbn.linen.replacing(), jbn.linen.intercept_methods(count):
        got = train(variables, x)
        # float32 rounding of other sums, through 18 layers
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, got, expected)
        close(model.apply(variables, x), evaluated)
    assert sum(calls) == 2 * 20
