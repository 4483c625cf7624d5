"""The comparison with other libraries, true line by line: each row of TABLE is measured here on
those that are installed."""

import importlib
import importlib.util
import inspect
import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx

import jbn

os.environ.setdefault("KERAS_BACKEND", "jax")  # read at Keras's first import
pytestmark = pytest.mark.third_party

LIBRARIES = ("jbn", "flax", "torch", "haiku", "equinox", "keras")
EVERYONE = set(LIBRARIES)
MASKED = {"jbn", "flax", "keras"}  # who takes a mask at all
# A property, and for which libraries it holds, with their defaults. The README's table may say no
# more than this.
TABLE = {
    "variance of float32 data at mean 10 000, std 1, right to 1e-3": {
        "jbn",
        "torch",
        "equinox",
        "keras",
    },
    "one batch with an infinity leaves the running statistics finite": {"jbn"},
    "refuses eps <= 0": {"jbn", "torch"},
    "refuses momentum outside [0, 1]": {"jbn"},
    "refuses to train on one value per channel": {"jbn", "torch"},
    "refuses an empty batch": {"jbn"},
    "cumulative average over all batches": {"jbn", "torch"},
    "takes a mask": MASKED,
    "NaN in masked elements reaches no gradient of the others": {"jbn"},
    "masked statistics over devices weighted by count": {"jbn"},
    "third derivatives right": EVERYONE - {"torch"},
    "virtual batches": {"jbn"},
    "batch renormalization": {"jbn", "keras"},
    "residual and activation in the same call": {"jbn"},
}


class Step(NamedTuple):
    """One training step: the output, and the running statistics after it."""

    y: Any
    mean: Any
    var: Any


def step(library, *batches, old=0.0, eps=1e-5, **options):
    """Train a layer of the library on the batches in turn; `old` is the weight of the old value in
    its running averages."""
    return STEPS[library](batches, old, eps, options)


def _jbn(batches, old, eps, options):
    params, state = jbn.init(batches[0].shape[-1])
    for x in batches:
        y, state = jbn.batch_norm_train(
            jnp.asarray(x), params, state, momentum=old, eps=eps, **options
        )
    return Step(y, state.mean, state.var)


def _flax(batches, old, eps, options):
    layer = linen.BatchNorm(use_running_average=False, momentum=old, epsilon=eps)
    variables = layer.init(jax.random.key(0), jnp.asarray(batches[0]))
    for x in batches:
        y, new = layer.apply(variables, jnp.asarray(x), mutable=["batch_stats"], **options)
        variables = {**variables, **new}
    return Step(y, variables["batch_stats"]["mean"], variables["batch_stats"]["var"])


def _torch(batches, old, eps, options):
    import torch

    layer = torch.nn.BatchNorm1d(
        batches[0].shape[-1], momentum=None if old is None else 1 - old, eps=eps
    )
    for x in batches:
        y = layer(torch.tensor(x))
    n = len(batches[-1])
    biased = (n - 1) / n if n > 1 and old == 0 else 1.0
    return Step(y.detach().numpy(), layer.running_mean.numpy(), layer.running_var.numpy() * biased)


def _haiku(batches, old, eps, options):
    import haiku

    layer = haiku.transform_with_state(
        lambda x: haiku.BatchNorm(True, True, old, eps)(x, is_training=True)
    )
    params, state = layer.init(jax.random.key(0), jnp.asarray(batches[0]))
    for x in batches:
        y, state = layer.apply(params, state, None, jnp.asarray(x))
    mean, var = (
        state[f"batch_norm/~/{name}_ema"]["average"].reshape(-1) for name in ("mean", "var")
    )
    return Step(y, mean, var)


def _equinox(batches, old, eps, options):
    import equinox

    make = equinox.nn.make_with_state(equinox.nn.BatchNorm)
    layer, state = make(batches[0].shape[-1], "batch", eps=eps, momentum=old, mode="ema")
    for x in batches:
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            jnp.asarray(x), state
        )
    mean, var = state.get(layer.ema_state_index)
    return Step(y, mean, var)


def _keras(batches, old, eps, options):
    import keras

    layer = keras.layers.BatchNormalization(momentum=old, epsilon=eps)
    for x in batches:
        y = layer(jnp.asarray(x), training=True, **options)
    return Step(np.asarray(y), np.asarray(layer.moving_mean), np.asarray(layer.moving_variance))


STEPS = {
    "jbn": _jbn,
    "flax": _flax,
    "torch": _torch,
    "haiku": _haiku,
    "equinox": _equinox,
    "keras": _keras,
}


def measured(row, library, holds):
    """Compare a measurement with the table."""
    assert holds == (library in TABLE[row]), f"{library}: {row}: measured {holds}"


def refuses(call):
    """Whether the call raises rather than computes."""
    try:
        call()
    except (ValueError, TypeError):
        return True
    return False


@pytest.fixture(params=LIBRARIES)
def library(request):
    if importlib.util.find_spec(request.param) is None:
        extra = "torch" if request.param == "torch" else "'jbn[peers]'"
        pytest.skip(f"{request.param} is not installed: pip install {extra}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield request.param


def data(rows=512, mean=0.0):
    return (np.random.default_rng(0).normal(size=(rows, 4)) + mean).astype(np.float32)


def test_variance_far_from_zero(library):
    x = data(mean=1e4)
    result = step(library, x)
    exact = oracle.variance(oracle.moments(x))
    right = (
        np.abs(np.float64(result.var) / exact - 1).max() < 1e-3
        and np.abs(np.std(result.y, 0) - 1).max() < 1e-3
    )
    measured("variance of float32 data at mean 10 000, std 1, right to 1e-3", library, bool(right))


def test_flax_without_its_fast_variance_is_right_too():
    """The README may not call this a defect of all of flax: an option cures it."""
    x = data(mean=1e4)
    layer = linen.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=False)
    _, new = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(
        new["batch_stats"]["var"], oracle.variance(oracle.moments(x)), rtol=1e-3
    )


def test_a_batch_with_an_infinity(library):
    bad = data()
    bad[3, 2] = np.inf
    options = {"skip_nonfinite": True} if library == "jbn" else {}  # nobody else has such an option
    result = step(library, data(), bad, data(), old=0.9, **options)
    finite = np.isfinite(result.mean).all() and np.isfinite(result.var).all()
    measured(
        "one batch with an infinity leaves the running statistics finite", library, bool(finite)
    )


def test_arguments_out_of_range(library):
    measured("refuses eps <= 0", library, refuses(lambda: step(library, data(), eps=-1.0)))
    measured(
        "refuses momentum outside [0, 1]", library, refuses(lambda: step(library, data(), old=5.0))
    )
    measured(
        "refuses to train on one value per channel",
        library,
        refuses(lambda: step(library, data(1))),
    )
    measured("refuses an empty batch", library, refuses(lambda: step(library, data(0))))


def test_cumulative_average(library):
    batches = [data() + shift for shift in np.float32([0, 3, 9])]
    row = "cumulative average over all batches"
    if library in TABLE[row]:
        np.testing.assert_allclose(
            step(library, *batches, old=None).mean, np.mean(batches, (0, 1)), rtol=1e-5
        )
    measured(row, library, not refuses(lambda: step(library, *batches, old=None)))


def masked_output(library, x, mask):
    """y of a layer in training that reads only the rows of the mask."""
    if library == "jbn":
        return jbn.batch_norm_train(x, *jbn.init(4), weights=mask[:, None])[0]
    if library == "flax":
        layer = linen.BatchNorm(use_running_average=False)
        variables = layer.init(jax.random.key(0), jnp.ones_like(x))
        return layer.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[0]
    import keras

    layer = keras.layers.BatchNormalization()
    layer.build((None, *x.shape))
    trained, kept = (
        [v.value for v in values]
        for values in (layer.trainable_variables, layer.non_trainable_variables)
    )
    return layer.stateless_call(trained, kept, x[None], training=True, mask=mask[None])[0][0]


def test_masks(library):
    row = "takes a mask"
    if library not in TABLE[row]:
        assert not {"mask", "weights"} & arguments(library)
        return
    mask = jnp.arange(6) < 4
    x = jnp.asarray(data(6))
    y = masked_output(library, x, mask)
    expected, _ = oracle.forward(np.asarray(x), weights=np.asarray(mask)[:, None])
    eps = 1e-3 if library == "keras" else 1e-5
    expected = (
        expected
        if eps == 1e-5
        else oracle.forward(np.asarray(x), weights=np.asarray(mask)[:, None], eps=eps)[0]
    )
    np.testing.assert_allclose(y[:4], expected[:4], rtol=1e-4, atol=1e-5)
    padded = x.at[4:].set(jnp.nan)
    dx = jax.grad(
        lambda x: jnp.where(mask[:, None], jnp.square(masked_output(library, x, mask)) * x, 0).sum()
    )(padded)
    row = "NaN in masked elements reaches no gradient of the others"
    measured(row, library, bool(jnp.isfinite(dx[:4]).all()))


def test_masked_statistics_over_devices():
    """Three devices with 1, 2 and 3 valid rows: jbn's mean is that of all six, flax's the mean of
    three means."""
    x, mask = data(9).reshape(3, 3, 4), np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    expected = x[mask].mean(0)
    params, state = jbn.init(4)

    def ours(x, mask):
        return jbn.batch_norm_train(
            x, params, state, momentum=0.0, weights=mask[:, None], axis_name="d"
        )[1].mean

    layer = linen.BatchNorm(use_running_average=False, momentum=0.0, axis_name="d")
    variables = layer.init(jax.random.key(0), x[0])

    def theirs(x, mask):
        return layer.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[1][
            "batch_stats"
        ]["mean"]

    row = "masked statistics over devices weighted by count"
    for library, mean in (("jbn", ours), ("flax", theirs)):
        got = jax.vmap(mean, axis_name="d")(x, mask)
        measured(row, library, bool(np.abs(np.asarray(got) - expected[None]).max() < 1e-5))


def third_derivative(library, x):
    """d^3/dt^3 of sum(w * y(x + t v)^2) at 0 by the library's reverse mode, three times."""
    direction, weight = (
        np.cos(np.arange(x.size)).reshape(x.shape),
        np.sin(np.arange(x.size)).reshape(x.shape),
    )
    if library == "torch":
        import torch

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        layer = torch.nn.BatchNorm1d(x.shape[1], dtype=torch.float64)
        value = (
            torch.tensor(weight) * layer(torch.tensor(x) + t * torch.tensor(direction)) ** 2
        ).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return float(value)
    output = {
        "jbn": lambda x: jbn.batch_norm_train(x, *jbn.init(x.shape[1], param_dtype=x.dtype))[0]
    }
    if library == "flax":
        layer = linen.BatchNorm(
            use_running_average=False, dtype=jnp.float64, param_dtype=jnp.float64
        )
        variables = layer.init(jax.random.key(0), x)
        output["flax"] = lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]
    f = lambda t: (weight * output[library](jnp.asarray(x) + t * direction) ** 2).sum()
    return float(jax.grad(jax.grad(jax.grad(f)))(jnp.zeros((), jnp.float64)))


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("library", ["jbn", "flax", "torch"], indirect=True)
def test_third_derivatives(library):
    """Against central differences of the float64 oracle. The other libraries are jax.grad of plain
    jnp, as flax is."""
    x, h = np.random.default_rng(0).normal(size=(6, 3)), 2e-3
    direction, weight = (
        np.cos(np.arange(x.size)).reshape(x.shape),
        np.sin(np.arange(x.size)).reshape(x.shape),
    )
    f = lambda t: (weight * oracle.forward(x + t * direction)[0] ** 2).sum()
    # Central differences of fourth order: error O(h^4), rounding 1e-16 / h^3 = 1e-8.
    taps = zip((-3, -2, -1, 1, 2, 3), (1 / 8, -1, 13 / 8, -13 / 8, 1, -1 / 8), strict=True)
    expected = sum(c * f(k * h) for k, c in taps) / h**3
    measured(
        "third derivatives right",
        library,
        bool(abs(third_derivative(library, x) / expected - 1) < 1e-3),
    )


def arguments(library):
    """The names of everything the library's layer takes, constructor and call."""
    if library == "jbn":
        functions = [jbn.batch_norm_train]
    elif library == "flax":
        functions = [
            linen.BatchNorm.__init__,
            linen.BatchNorm.__call__,
            nnx.BatchNorm.__init__,
            nnx.BatchNorm.__call__,
        ]
    elif library == "torch":
        import torch

        functions = [torch.nn.BatchNorm2d.__init__, torch.nn.BatchNorm2d.forward]
    elif library == "keras":
        import keras

        functions = [keras.layers.BatchNormalization.__init__, keras.layers.BatchNormalization.call]
    else:
        layer = (
            importlib.import_module("haiku").BatchNorm
            if library == "haiku"
            else importlib.import_module("equinox").nn.BatchNorm
        )
        functions = [layer.__init__, layer.__call__]
    return {
        name
        for function in functions
        for name in inspect.signature(inspect.unwrap(function)).parameters
    }


def test_what_a_layer_takes(library):
    takes = arguments(library)
    measured("virtual batches", library, bool({"virtual_batch_size", "ghost_batch_size"} & takes))
    measured(
        "residual and activation in the same call", library, {"residual", "activation"} <= takes
    )
    renorm = library == "jbn" and callable(jbn.batch_renorm_train)
    measured(
        "batch renormalization",
        library,
        renorm or bool({"renorm", "r_max", "renorm_clipping"} & takes),
    )


def test_nnx_in_bfloat16_rounds_running_statistics_that_jbn_keeps():
    """flax rounds the mean 0.9951 to bfloat16 before it subtracts it: from x = 0.9961 that leaves
    another difference."""
    x = jnp.full((2, 1), 1.0 - 2**-8, jnp.bfloat16)
    results = {}
    for name, module in (
        ("flax", nnx.BatchNorm),
        ("jbn", importlib.import_module("jbn.nnx").BatchNorm),
    ):
        layer = module(1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
        layer.mean[...] = jnp.array([0.9951])
        layer.var[...] = jnp.array([1e-6])
        results[name] = float(layer(x)[0, 0])
    exact = oracle.normalize(np.float64(x), np.float32([0.9951]), np.float32([1e-6]))[0, 0]
    assert abs(results["jbn"] / exact - 1) < 2**-7
    assert abs(results["flax"] / exact - 1) > 0.1
