"""`jbn.linen.BatchNorm` against flax's where flax is right, against the oracle where it is not."""

import dataclasses
import functools
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax import serialization
from flax_cases import (
    BAD_OPTIONS,
    DTYPES,
    EMPTY,
    MASKS,
    OF_BATCH_STATISTICS,
    OF_THE_UPDATE,
    OPTIONS,
    SHAPE,
    close,
    data,
    options_id,
    same,
    strict,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn.linen import BatchNorm

KEY = jax.random.key(0)


def train(layer, variables, x, **call):
    """y, updated statistics, and gradients with respect to x, params and the old statistics."""

    def loss(x, params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = layer.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"], **call
        )
        ramp = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        total = jnp.sum(ramp * y.astype(jnp.float32))
        for leaf in jax.tree.leaves(new):
            total += jnp.sum(jnp.square(leaf).astype(jnp.float32))
        return total, (y, new)

    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, aux), gradients = differentiate(
        jnp.asarray(x), variables.get("params", {}), variables["batch_stats"]
    )
    return *aux, gradients


def init(layer, x, **call):
    """Variables alone: under jit nothing else is compiled."""
    return jax.jit(lambda: layer.init(KEY, x, **call))()


def compare(x, options, factor=64, **call):
    """Initialization, one training step with gradients, and inference after it."""
    theirs, ours = nn.BatchNorm(**options), BatchNorm(**options)
    variables = init(theirs, x, use_running_average=False)
    with strict():
        same(init(ours, x, use_running_average=False), variables)
        got = train(ours, variables, x, **call)
    expected = train(theirs, variables, x, **call)
    close(got, expected, factor)
    infer = lambda layer: jax.jit(
        lambda: layer.apply({**variables, **expected[1]}, x, use_running_average=True, **call)
    )()
    with strict():
        y = infer(ours)
    close(y, infer(theirs))


@pytest.mark.third_party
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"axis": (1, -1)}, {"axis": (-1, 1)}, {"axis": (0, 2)}, {"axis": [3, 3]}],
    ids=options_id,
)
def test_options_mean_what_they_mean_in_flax(options):
    compare(data(), options)


@pytest.mark.third_party
@pytest.mark.parametrize(("x_dtype", "dtype", "param_dtype", "use_scale"), DTYPES)
def test_dtypes_are_flax_s(x_dtype, dtype, param_dtype, use_scale):
    compare(
        data(dtype=x_dtype),
        {"dtype": dtype, "param_dtype": param_dtype, "use_scale": use_scale, "use_bias": use_scale},
    )


@pytest.mark.third_party
@pytest.mark.x64
@pytest.mark.parametrize(("x_dtype", "dtype"), [(np.float64, None), (np.float32, np.float64)])
def test_float64(x_dtype, dtype):
    """flax lets float64 into batch_stats, here they keep their dtype; y is float64."""
    x = data(dtype=x_dtype)
    layers = [cls(use_running_average=False, dtype=dtype) for cls in (BatchNorm, nn.BatchNorm)]
    (ours, our_new), (theirs, their_new) = [layer.init_with_output(KEY, x) for layer in layers]
    same(our_new, their_new)
    assert ours.dtype == theirs.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.third_party
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.shape))
@pytest.mark.parametrize("mask_dtype", [bool, np.int32, np.float32])
def test_masks_are_flax_s(mask, mask_dtype):
    compare(data(), {}, mask=mask.astype(mask_dtype))


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("x", "axis"),
    [
        (data((5,)), -1),  # rank 1, one value a channel
        (data((1, 5)), -1),
        (data((4, 3)), ()),  # the whole array is one feature
        (data((2, 2, 2, 2, 2, 3)), -1),
        (data((7, 3), np.float16), -1),
        (np.asarray(data()), 1),  # NumPy
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_inputs_flax_accepts(x, axis):
    # The variance of a single value is 0: dx is a difference of numbers of order 1 / sqrt(epsilon)
    # = 316.
    compare(x, {"axis": axis}, factor=64 * 316 if x.size == 5 else 64)


@pytest.mark.third_party
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
@pytest.mark.parametrize(
    "options", [{}, {"use_scale": False, "use_bias": False}, {"dtype": jnp.bfloat16}], ids=str
)
def test_integers_are_read_as_float32(dtype, options):
    x = (
        (np.arange(24).reshape(6, 4) % 5 > 1)
        if dtype is bool
        else np.arange(24).reshape(6, 4).astype(dtype)
    )
    theirs, ours = (cls(use_running_average=False, **options) for cls in (nn.BatchNorm, BatchNorm))
    variables = theirs.init(KEY, x)
    with strict():
        got = ours.apply(variables, x, mutable=["batch_stats"])
    close(got, theirs.apply(variables, x, mutable=["batch_stats"]))


def complex_data(mean=0.0):
    return jnp.asarray(
        np.asarray(data(seed=1)) + mean + 1j * np.asarray(data(seed=2)), jnp.complex64
    )


@pytest.mark.third_party
@pytest.mark.parametrize("mask", [None, MASKS[0]], ids=["", "mask"])
@pytest.mark.parametrize(
    "options", [{}, {"axis": 1, "use_scale": False}, {"param_dtype": jnp.complex64}], ids=str
)
def test_complex_input(options, mask):
    theirs, ours = nn.BatchNorm(**options), BatchNorm(**options)
    x = complex_data()
    variables = init(theirs, x, use_running_average=False)
    with strict():
        same(init(ours, x, use_running_average=False), variables)

    def loss(layer, x, params):
        y, new = layer.apply(
            {**variables, "params": params}, x, False, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.abs(y - 1) ** 2), (y, new)

    expected = jax.jit(jax.value_and_grad(functools.partial(loss, theirs), (0, 1), has_aux=True))(
        x, variables["params"]
    )
    got = jax.jit(jax.value_and_grad(functools.partial(loss, ours), (0, 1), has_aux=True))(
        x, variables["params"]
    )
    # The loss is a sum of 360 terms of order 1: its own rounding.
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
    close(got[0][1:] + got[1:], expected[0][1:] + expected[1:])
    trained = {**variables, **expected[0][1][1]}
    with strict():
        y = ours.apply(trained, x, True)
    close(y, theirs.apply(trained, x, True))


def test_complex_statistics_survive_a_large_mean():
    x = complex_data(mean=1e4)
    y, _ = BatchNorm(use_running_average=False).init_with_output(KEY, x)
    std = np.sqrt(np.mean(np.abs(np.asarray(y, np.complex128)) ** 2, (0, 1, 2)))
    np.testing.assert_allclose(std, 1, rtol=1e-3)


def test_complex_masked_padding_is_never_read():
    x, padding = complex_data(), ~MASKS[0][:, 0, 0, 0]
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    apply = lambda x: layer.apply(variables, x, mask=MASKS[0], mutable=["batch_stats"])
    (y, new), (expected, expected_new) = apply(x.at[padding, 0].set(jnp.nan)), apply(x)
    same(new, expected_new)
    np.testing.assert_array_equal(y[~padding], expected[~padding])
    np.testing.assert_array_equal(y[padding, 0], jnp.zeros_like(y[padding, 0]))


def test_complex_takes_no_kernels_nor_virtual_batches():
    for options in ({"implementation": "triton"}, {"virtual_batch_size": 2}):
        layer = BatchNorm(use_running_average=False, **options)
        variables = BatchNorm(use_running_average=False).init(KEY, complex_data())
        with pytest.raises(NotImplementedError, match="complex"):
            layer.apply(variables, complex_data(), mutable=["batch_stats"])


def test_attributes_of_flax_come_first_and_have_its_defaults():
    described = lambda cls: [
        (f.name, f.default, f.kw_only)
        for f in dataclasses.fields(cls)
        if f.name not in ("parent", "name")
    ]
    theirs, ours = described(nn.BatchNorm), described(BatchNorm)
    assert ours[: len(theirs)] == theirs
    added = (
        "activation",
        "virtual_batch_size",
        "unbiased",
        "skip_nonfinite",
        "update_stats",
        "implementation",
    )
    assert tuple(name for name, _, _ in ours[len(theirs) :]) == added


def test_is_flax_s_class_under_the_same_name():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(True)(BatchNorm(True, name="named")(BatchNorm(True)(x)))

    assert issubclass(BatchNorm, nn.BatchNorm)
    assert set(Net().init(KEY, data())["params"]) == {"BatchNorm_0", "BatchNorm_1", "named"}


@pytest.mark.third_party
def test_tabulate_shows_one_row():
    describe = lambda cls: cls(use_running_average=False).tabulate(
        KEY, data(), console_kwargs={"width": 200}
    )
    assert describe(BatchNorm) == describe(nn.BatchNorm)


def test_initialization_updates_nothing_and_needs_no_axis():
    layer = BatchNorm(use_running_average=False, axis_name="nowhere", virtual_batch_size=1000)
    variables = layer.init(KEY, data() + 7)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(5))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(5))


@pytest.mark.third_party
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_statistics_are_stored_in_flax_s_dtype(stored, x_dtype, force):
    """Float32, whatever they came in; only if asked for by name, x's narrower dtype."""
    x = data(mean=3.0, dtype=x_dtype)
    options = {"force_float32_reductions": force, "param_dtype": jnp.bfloat16, "momentum": 0.5}
    ours, theirs = (cls(use_running_average=False, **options) for cls in (BatchNorm, nn.BatchNorm))
    same(init(ours, x), init(theirs, x))
    variables = jax.tree.map(lambda v: v.astype(stored), init(theirs, x))
    with strict():
        _, got = ours.apply(variables, x, mutable=["batch_stats"])
    expected = theirs.apply(variables, x, mutable=["batch_stats"])[1]
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
    near = functools.partial(np.testing.assert_allclose, rtol=2.0**-5)  # flax sums in bfloat16
    wide = functools.partial(jax.tree.map, lambda v: np.asarray(v, np.float32))
    jax.tree.map(near, wide(got), wide(expected))


def test_a_running_average_of_a_narrow_tree_does_not_stall():
    """In bfloat16 the mean would stop at 2.56."""
    x = jnp.full((4, 3), 3.0, jnp.bfloat16)
    layer = BatchNorm(use_running_average=False)
    variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), layer.init(KEY, x))
    apply = jax.jit(lambda v: layer.apply(v, x, mutable=["batch_stats"])[1])
    for _ in range(600):
        variables = {**variables, **apply(variables)}
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 3 * (1 - 0.99**600), rtol=1e-4)


@pytest.mark.parametrize("options", [*OF_BATCH_STATISTICS, *OF_THE_UPDATE], ids=str)
def test_options_are_not_checked_where_they_are_not_used(options):
    x = data(mean=3.0)
    layer, plain = BatchNorm(**options), BatchNorm()
    variables = layer.init(KEY, x, False)
    same(variables, plain.init(KEY, x, False))
    same(layer.apply(variables, x, True), plain.apply(variables, x, True))
    if options in OF_THE_UPDATE:  # nothing is updated
        frozen = BatchNorm(use_running_average=False, update_stats=False, **options)
        expected, _ = plain.apply(variables, x, False, mutable=["batch_stats"])
        same(frozen.apply(variables, x), expected)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"virtual_batch_size": 2, "dtype": jnp.bfloat16, "activation": jnp.tanh}],
    ids=options_id,
)
def test_no_examples(shape, use_running_average, options):
    x = jnp.zeros(shape)
    layer = BatchNorm(use_running_average=use_running_average, **options)
    variables = layer.init(KEY, x)

    def apply(x, params):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    y, new = apply(x, variables["params"])
    assert (y.shape, y.dtype) == (shape, options.get("dtype", jnp.float32))
    same(new, {"batch_stats": variables["batch_stats"]})
    total = lambda x, params: jnp.sum(apply(x, params)[0].astype(jnp.float32))
    dx, dparams = jax.grad(total, (0, 1))(x, variables["params"])
    assert dx.shape == shape
    same(dparams, jax.tree.map(jnp.zeros_like, variables["params"]))


def test_no_examples_across_an_axis():
    x = jnp.zeros((2, 0, 4))
    layer = BatchNorm(use_running_average=False, axis_name="batch", activation=jax.nn.relu)
    variables = layer.init(KEY, x[0])
    apply = lambda x: layer.apply(variables, x, mutable=["batch_stats"])
    y, new = jax.vmap(apply, axis_name="batch", out_axes=(0, None))(x)
    assert y.shape == x.shape
    same(new, {"batch_stats": variables["batch_stats"]})


@pytest.mark.third_party
def test_trained_under_pmap_and_evaluated_anywhere():
    """The layers of flax's imagenet example name an axis that only its training step has."""
    x = data((8, 4, 5), mean=2.0)

    def trained(cls):
        layer = cls(axis_name="batch", momentum=0.9)
        variables = layer.init(KEY, x[0], False)

        @functools.partial(jax.pmap, axis_name="batch")
        def step(variables, x):
            _, new = layer.apply(variables, x, False, mutable=["batch_stats"])
            return {**variables, **new}

        replicated = jax.tree.map(lambda v: jnp.stack([v] * 8), variables)
        variables = jax.tree.map(lambda v: v[0], step(replicated, x))
        return variables, layer.apply(variables, x[0], True)

    close(trained(BatchNorm), trained(nn.BatchNorm))


@pytest.mark.parametrize("how", ["shard_map", "shard_map unchecked", "pmap"])
def test_variables_on_a_mesh_closed_over(how):
    """An Auto mesh: JAX lets no function close over an array of an Explicit one."""
    x = data((8, 4, 5))
    layer = BatchNorm(use_running_average=True, axis_name="batch", activation=jax.nn.relu)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    variables = layer.init(KEY, x[0])
    placed = jax.device_put(variables, NamedSharding(mesh, P()))
    apply = lambda x: layer.apply(placed, x)
    if how == "pmap":
        y = jax.pmap(apply, axis_name="batch")(x)
    else:
        x = jax.device_put(x, NamedSharding(mesh, P("batch")))
        y = jax.shard_map(
            apply,
            mesh=mesh,
            in_specs=P("batch"),
            out_specs=P("batch"),
            check_vma=how == "shard_map",
        )(x)
    np.testing.assert_allclose(y, layer.apply(variables, np.asarray(x)), rtol=1e-6)


def test_use_running_average_is_merged_as_in_flax():
    x = data()
    variables = BatchNorm().init(KEY, x, True)
    for layer, call in (
        (BatchNorm(), {}),
        (BatchNorm(use_running_average=True), {"use_running_average": True}),
    ):
        with pytest.raises(ValueError, match="use_running_average"):
            layer.apply(variables, x, **call)


def test_forgotten_mutable_is_flax_s_error():
    x = data()
    layer = BatchNorm(use_running_average=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(layer.init(KEY, x), x)


def test_update_stats_false_normalizes_by_the_batch_and_touches_nothing():
    x = data(mean=3.0)
    frozen, layer = (BatchNorm(use_running_average=False, update_stats=u) for u in (False, True))
    variables = layer.init(KEY, x)
    expected, _ = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(frozen.apply(variables, x), expected)
    _, kept = frozen.apply(variables, x, mutable=["batch_stats"])
    same(kept, {"batch_stats": variables["batch_stats"]})


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu, jnp.tanh])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_residual_and_activation(activation, use_running_average):
    x, residual = data(), data(seed=1)
    plain = BatchNorm(use_running_average=use_running_average)
    fused = BatchNorm(use_running_average=use_running_average, activation=activation)
    variables = plain.init(KEY, x)
    expected = plain.apply(variables, x, mutable=["batch_stats"])[0] + residual
    expected = expected if activation is None else activation(expected)
    y, _ = fused.apply(variables, x, residual=residual, mutable=["batch_stats"])
    close(y, expected)


def test_an_activation_with_parameters_of_its_own():
    x = data()
    layer = BatchNorm(use_running_average=False, activation=nn.PReLU(), parent=None)
    variables = layer.init(KEY, x)
    y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    z, _ = BatchNorm(use_running_average=False).init_with_output(KEY, x)
    close(y, jnp.where(z >= 0, z, 0.01 * z))
    loss = lambda params: jnp.sum(
        layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
    )
    slope = jax.grad(loss)(variables["params"])["activation"]["negative_slope"]
    np.testing.assert_allclose(slope, jnp.sum(jnp.minimum(z, 0)), rtol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_unbiased_is_what_is_stored_not_what_normalizes(unbiased):
    x = data()
    layer = BatchNorm(use_running_average=False, momentum=0.0, unbiased=unbiased)
    y, new = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    expected, m = oracle.forward(x)
    np.testing.assert_allclose(new["batch_stats"]["var"], oracle.variance(m, unbiased), rtol=1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS, ids=str)
def test_bad_options_are_refused(options, error, match):
    x = data()
    variables = BatchNorm().init(KEY, x, True)
    with pytest.raises(error, match=match):
        BatchNorm(**options).apply(variables, x, False, mutable=["batch_stats"])


def test_bad_arrays_are_refused():
    x = data()
    variables = BatchNorm().init(KEY, x, True)
    call = functools.partial(
        BatchNorm(use_running_average=False).apply, variables, mutable=["batch_stats"]
    )
    with pytest.raises(ValueError, match=r"residual has shape \(5,\)"):
        call(x, residual=x[0, 0, 0])
    with pytest.raises(ValueError, match=r"weights has shape \(6,\)"):
        call(x, mask=np.ones(6, bool))
    with pytest.raises(flax.errors.ScopeParamShapeError):
        call(x[..., :4])


# Where flax is wrong.


def test_large_mean():
    """flax: variance 0, y's std 319."""
    x = data((4096, 8), mean=1e4, std=1.0)
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    y, new = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    expected, m = oracle.forward(x)
    np.testing.assert_allclose(new["batch_stats"]["var"], oracle.variance(m), rtol=1e-3)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_masked_padding_is_never_read():
    """flax: NaN gradients in the valid rows."""
    x = np.array(data())
    mask = MASKS[0]
    padding = ~mask[:, 0, 0, 0]
    clean = jnp.asarray(x)
    x[padding] = np.nan
    x[padding, 0] = np.inf
    layer = BatchNorm()
    variables = layer.init(KEY, clean, True)
    got, expected = (train(layer, variables, jnp.asarray(v), mask=mask) for v in (x, clean))
    assert np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[2][0][padding], 0)
    np.testing.assert_allclose(got[0][~padding], expected[0][~padding], rtol=1e-5, atol=1e-5)
    close(got[1], expected[1])
    # The padding is normalized too, so its dy reaches the valid rows through the statistics; where
    # it is NaN its xhat is 0.
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    dmean, dvar = (
        2 * (1 - 0.99) * np.asarray(got[1]["batch_stats"][name], np.float64)
        for name in ("mean", "var")
    )
    dx = oracle.backward(x, dy, weights=mask, dmean=dmean, dvar=dvar).x
    np.testing.assert_allclose(got[2][0][~padding], dx[~padding], rtol=1e-4, atol=1e-5)


def test_nothing_valid_leaves_the_statistics_alone():
    x = data()
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    y, new = layer.apply(variables, x, mask=np.zeros((6, 1, 1, 1), bool), mutable=["batch_stats"])
    same(new, {"batch_stats": variables["batch_stats"]})
    assert np.isfinite(y).all()


def test_skip_nonfinite_keeps_the_model_usable():
    x = data()
    layer = BatchNorm(skip_nonfinite=True)
    variables = layer.init(KEY, x, False)
    _, before = layer.apply(variables, x, False, mutable=["batch_stats"])
    _, after = layer.apply(
        {**variables, **before}, x.at[0, 0, 0, 0].set(jnp.inf), False, mutable=["batch_stats"]
    )
    same(after, before)
    _, poisoned = BatchNorm().apply(
        {**variables, **before}, x.at[0, 0, 0, 0].set(jnp.inf), False, mutable=["batch_stats"]
    )
    assert not np.isfinite(poisoned["batch_stats"]["mean"]).all()


UNEQUAL = (
    np.arange(16).reshape(8, 2, 1) % 5 < np.arange(8)[:, None, None] % 4
)  # shards of 2, 1 and 0 valid rows


@functools.cache
def unequal():
    x = data((8, 2, 5), mean=3.0)
    layer = BatchNorm(use_running_average=False, momentum=0.5, axis_name="batch")
    variables = layer.init(KEY, x[0])
    y, m = oracle.forward(x.reshape(16, 5), weights=UNEQUAL.reshape(16, 1))
    state = oracle.running(oracle.State(np.zeros(5), np.ones(5), 0), m, momentum=0.5)
    return (
        x,
        layer,
        variables,
        y.reshape(8, 2, 5),
        {"batch_stats": {"mean": state.mean, "var": state.var}},
    )


def close_to_oracle(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("how", ["shard_map", "pmap", "vmap"])
def test_synchronized_masked_shards_are_weighted_by_count(how):
    """flax averages the means of the shards: wrong, and NaN where a shard has no valid row."""
    x, layer, variables, y, stats = unequal()
    local = lambda x, mask: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    if how == "shard_map":
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        across = jax.shard_map(
            lambda x, mask: local(x[0], mask[0]),
            mesh=mesh,
            in_specs=(P("batch"), P("batch")),
            out_specs=(P("batch"), P()),
        )
        got, new = jax.jit(across)(x, jnp.asarray(UNEQUAL))
        got = got.reshape(x.shape)
    else:
        across = {"pmap": jax.pmap, "vmap": jax.vmap}[how](local, axis_name="batch")
        got, new = across(x, jnp.asarray(UNEQUAL))
        jax.tree.map(
            lambda v: np.testing.assert_array_equal(v, jnp.broadcast_to(v[:1], v.shape)), new
        )
        new = jax.tree.map(lambda v: v[0], new)
    close_to_oracle((got, new), (y, stats))


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("axis_name", "groups"), [(["batch"], None), ("batch", [[0, 1], [2, 3], [4, 5], [6, 7]])]
)
def test_synchronization_and_its_groups_are_flax_s(axis_name, groups):
    x = data((8, 3, 5))
    options = {"use_running_average": False, "axis_name": axis_name, "axis_index_groups": groups}
    results = []
    for cls in (BatchNorm, nn.BatchNorm):
        layer = cls(**options)
        variables = layer.init(KEY, x[0])
        loss = lambda x, layer=layer, variables=variables: jnp.sum(
            layer.apply(variables, x, mutable=["batch_stats"])[0] ** 3
        )
        apply = lambda x, layer=layer, variables=variables: layer.apply(
            variables, x, mutable=["batch_stats"]
        )
        results.append((jax.pmap(apply, "batch")(x), jax.pmap(jax.grad(loss), "batch")(x)))
    close(*results)


def test_axis_index_groups_without_an_axis_are_ignored_as_in_flax():
    x = data()
    y, _ = BatchNorm(use_running_average=False, axis_index_groups=[[0]]).init_with_output(KEY, x)
    np.testing.assert_array_equal(
        y, BatchNorm(use_running_average=False).init_with_output(KEY, x)[0]
    )


# Lifting.


def lifted(cls, how):
    """A module that holds the layer under one of linen's transformations."""
    if how == "vmap":
        lift = nn.vmap(
            cls,
            in_axes=0,
            out_axes=0,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        return lift(use_running_average=False)
    if how == "vmap_axis_name":
        lift = nn.vmap(
            cls,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="batch",
        )
        return lift(use_running_average=False, axis_name="batch")
    if how == "remat":
        return nn.remat(cls)(use_running_average=False)
    if how == "jit":
        return nn.jit(cls)(use_running_average=False)

    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            y = cls(use_running_average=False, bias_init=nn.initializers.normal())(carry)
            return nn.relu(y), jnp.sum(y)

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {
                "variable_axes": {"params": 0, "batch_stats": 0},
                "split_rngs": {"params": True},
            }
            if how == "scan_shared":
                axes = {
                    "variable_carry": "batch_stats",
                    "variable_broadcast": "params",
                    "split_rngs": {"params": False},
                }
            return nn.scan(Body, length=3, **axes)()(x, None)[0]

    return Loop()


@pytest.mark.third_party
@pytest.mark.parametrize("how", ["vmap", "vmap_axis_name", "remat", "jit", "scan", "scan_shared"])
def test_lifting(how):
    x = data((4, 6, 5))

    def step(layer, variables):
        def loss(x, params):
            y, new = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, new)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, variables["params"])

    theirs, ours = lifted(nn.BatchNorm, how), lifted(BatchNorm, how)
    own = "scan" if how == "scan_shared" else how  # linen cannot initialize what it carries
    variables = init(lifted(nn.BatchNorm, own), x)
    with strict():
        same(init(lifted(BatchNorm, own), x), variables)
    variables = jax.tree.map(lambda v: v[0], variables) if how == "scan_shared" else variables
    with strict():
        got = step(ours, variables)
    close(got, step(theirs, variables))


def test_partitioned_parameters():
    layer = BatchNorm(
        use_running_average=False,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("channels",)),
    )
    x = data()
    variables = layer.init(KEY, x)
    assert variables["params"]["scale"].names == ("channels",)
    y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    close_to_oracle(y, oracle.forward(x)[0])


# Checkpoints.


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        for features in (8, 16):
            x = nn.Dense(features)(x)
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def trained(norm, steps=5):
    """Variables of a small classifier after a few steps of SGD."""
    rng = np.random.default_rng(0)
    x, labels = data((16, 6, 6, 2)), rng.integers(0, 3, 16)
    net, optimizer = Net(norm), optax.sgd(0.1, momentum=0.9)
    variables = net.init(KEY, x, train=True)
    params, stats, memory = (
        variables["params"],
        variables["batch_stats"],
        optimizer.init(variables["params"]),
    )

    @jax.jit
    def step(params, stats, memory):
        def loss(params):
            logits, new = net.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new[
                "batch_stats"
            ]

        grads, stats_ = jax.grad(loss, has_aux=True)(params)
        updates, memory_ = optimizer.update(grads, memory)
        return optax.apply_updates(params, updates), stats_, memory_

    for _ in range(steps):
        params, stats, memory = step(params, stats, memory)
    return {"params": params, "batch_stats": stats}


@pytest.mark.third_party
@pytest.mark.parametrize("source", [nn.BatchNorm, BatchNorm], ids=["from flax", "from jbn"])
def test_checkpoints_go_both_ways(source):
    target = nn.BatchNorm if source is BatchNorm else BatchNorm
    variables = trained(source)
    x = data((4, 6, 6, 2), seed=9)
    template = jax.tree.map(jnp.zeros_like, Net(target).init(KEY, x, train=False))
    assert jax.tree.structure(template) == jax.tree.structure(variables)
    loaded = serialization.from_bytes(template, serialization.to_bytes(variables))
    same(loaded, variables)
    same(serialization.from_state_dict(template, serialization.to_state_dict(variables)), variables)
    ours, theirs = (
        Net(norm).apply(v, x, train=False) for norm, v in ((target, loaded), (source, variables))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.third_party
def test_training_ends_where_flax_s_does():
    got, expected = trained(BatchNorm), trained(nn.BatchNorm)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    # Five steps of SGD amplify the rounding of float32 sums over 576 rows.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, expected)


def test_importing_jbn_does_not_import_flax_and_offers_the_modules():
    code = (
        "import sys, jbn; assert 'flax' not in sys.modules; "
        "jbn.linen.BatchNorm; jbn.nnx.BatchNorm; "
        "from jbn import linen; assert not hasattr(jbn, 'keras')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "options", [{"activation": jax.nn.relu}, {"virtual_batch_size": 2}], ids=options_id
)
def test_the_functional_api_gives_the_same_bits(options):
    x = data()
    layer = BatchNorm(use_running_average=False, **options)
    variables = layer.init(KEY, x[:1])
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    params, state = jbn.init(SHAPE[-1])
    expected, state = jbn.batch_norm_train(x, params, state, **options)
    np.testing.assert_array_equal(y, expected)
    same(new["batch_stats"], {"mean": state.mean, "var": state.var})
