"""`jbn.nnx.BatchNorm` against flax's where flax is right, else the oracle; and against linen."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from flax.nnx.nn import dtypes
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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn.linen
from jbn.nnx import BatchNorm


def features(options):
    axis = options.get("axis", -1)
    return SHAPE[axis] if isinstance(axis, int) else None


def make(cls, num_features=SHAPE[-1], **options):
    return cls(num_features, rngs=nnx.Rngs(0), **options)


def pure(layer):
    return nnx.to_pure_dict(nnx.state(layer, (nnx.Param, nnx.BatchStat)))


def train(layer, x, **call):
    """y, the variables after it, and gradients with respect to x and the parameters."""

    @nnx.jit
    def differentiate(layer, x):
        def loss(layer, x):
            y = layer(x, use_running_average=False, **call)
            ramp = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(ramp * y.astype(jnp.float32)), y

        of = (nnx.DiffState(0, nnx.Param), 1)
        gradients, y = nnx.grad(loss, argnums=of, has_aux=True)(layer, x)
        return y, nnx.to_pure_dict(gradients[0]), gradients[1]

    y, dparams, dx = differentiate(layer, x)
    return y, pure(layer), dparams, dx


def compare(x, options, factor=64, **call):
    """Initial variables, one training step with gradients, and inference after it."""
    theirs, ours = (make(cls, features(options), **options) for cls in (nnx.BatchNorm, BatchNorm))
    same(pure(ours), pure(theirs))
    with strict():
        got = train(ours, x, **call)
    close(got, train(theirs, x, **call), factor)
    nnx.update(ours, nnx.state(theirs))
    infer = lambda layer: nnx.jit(lambda layer, x: layer(x, use_running_average=True, **call))(
        layer, x
    )
    with strict():
        y = infer(ours)
    return y, infer(theirs)


@pytest.mark.third_party
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_options_mean_what_they_mean_in_flax(options):
    close(*compare(data(), options))


@pytest.mark.third_party
@pytest.mark.parametrize(("x_dtype", "dtype", "param_dtype", "use_scale"), DTYPES)
def test_dtypes_are_flax_s(x_dtype, dtype, param_dtype, use_scale):
    options = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "use_scale": use_scale,
        "use_bias": use_scale,
    }
    # Flax rounds x, scale and bias to dtype, and so their gradients: that is the difference.
    y, theirs = compare(
        data(dtype=x_dtype),
        options,
        factor=2**17 if dtype == jnp.bfloat16 else 64,
    )
    if dtype == jnp.bfloat16:  # flax rounds the statistics in inference
        assert y.dtype == theirs.dtype
    else:
        close(y, theirs)


@pytest.mark.third_party
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.shape))
def test_masks_are_flax_s(mask):
    close(*compare(data(), {}, mask=mask))


def test_statistics_are_never_rounded_to_dtype():
    """flax casts the running statistics to bfloat16 in inference: x - mean becomes 0."""
    layer = make(BatchNorm, 3, dtype=jnp.bfloat16, use_running_average=True)
    layer.mean[...] = jnp.full(3, 257.5)  # the bfloat16 numbers here are 256, 258, 260
    layer.var[...] = jnp.full(3, 0.25)
    x = jnp.full((2, 3), 258, jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(layer(x), np.float32), 0.5 / np.sqrt(0.25 + 1e-5), rtol=2.0**-8
    )
    assert layer.mean.dtype == jnp.float32


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.float16, jnp.int32])
def test_x_is_never_rounded_to_dtype(x_dtype):
    """flax casts x to bfloat16, where 1001 is 1000: -0.5 instead of 0.5."""
    options = {"dtype": jnp.bfloat16, "axis": 0, "use_running_average": True}
    layer = make(BatchNorm, 1, **options)
    layer.mean[...] = jnp.full(1, 1000.5)
    x = jnp.asarray([[1001, 999]], x_dtype)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), [[0.5, -1.5]], rtol=2.0**-8)
    y = layer(x, use_running_average=False)
    np.testing.assert_allclose(np.asarray(y, np.float32), [[1, -1]], rtol=2.0**-8)
    linen = jbn.linen.BatchNorm(**options)
    variables = linen.init(jax.random.key(0), x)
    variables["batch_stats"] = {"mean": jnp.full(1, 1000.5), "var": jnp.ones(1)}
    same(make_like(layer, mean=1000.5)(x), linen.apply(variables, x))


def make_like(layer, mean):
    twin = make(BatchNorm, 1, dtype=layer.dtype, axis=layer.axis, use_running_average=True)
    twin.mean[...] = jnp.full(1, mean)
    return twin


def test_a_running_average_of_a_narrow_tree_does_not_stall():
    """In bfloat16 the mean would stop at 2.56."""
    x = jnp.full((4, 3), 3.0, jnp.bfloat16)
    layer = make(BatchNorm, 3)
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), nnx.state(layer))
    nnx.update(layer, narrow)
    assert layer.mean.dtype == jnp.bfloat16
    step = nnx.jit(lambda layer: layer(x))
    for _ in range(600):
        step(layer)
    np.testing.assert_allclose(layer.mean[...], 3 * (1 - 0.99**600), rtol=1e-4)
    assert layer.var.dtype == jnp.float32


@pytest.mark.parametrize("options", [*OF_BATCH_STATISTICS, *OF_THE_UPDATE], ids=str)
def test_options_are_not_checked_where_they_are_not_used(options):
    x = data(mean=3.0)
    layer, plain = make(BatchNorm, **options), make(BatchNorm)
    same(layer(x, True), plain(x, True))
    if options in OF_THE_UPDATE:  # nothing is updated
        same(make(BatchNorm, update_stats=False, **options)(x), plain(x))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("use_running_average", [False, True])
def test_no_examples(shape, use_running_average):
    layer = make(BatchNorm, shape[-1], use_running_average=use_running_average)
    before = pure(layer)

    def total(layer, x):
        y = layer(x)
        assert y.shape == shape
        return jnp.sum(y)

    dlayer, dx = nnx.grad(total, argnums=(nnx.DiffState(0, nnx.Param), 1))(layer, jnp.zeros(shape))
    same(pure(layer), before)
    assert dx.shape == shape
    jax.tree.map(lambda d: np.testing.assert_array_equal(d, 0), nnx.to_pure_dict(dlayer))


@pytest.mark.third_party
@pytest.mark.parametrize("use_running_average", [False, True])
def test_promote_dtype_is_called_as_in_flax(use_running_average):
    def halve(values, /, *, dtype=None):
        x, mean, var, scale, bias = dtypes.promote_dtype(values, dtype=dtype)
        return x / 2, mean, var, scale + 1, bias - 1

    options = {"promote_dtype": halve, "use_running_average": use_running_average}
    ours, theirs = (make(cls, **options)(data()) for cls in (BatchNorm, nnx.BatchNorm))
    close(ours, theirs)


@pytest.mark.third_party
@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_integers_are_read_as_float32(dtype):
    x = (
        (np.arange(24) % 5 > 1).reshape(6, 4)
        if dtype is bool
        else np.arange(24).reshape(6, 4).astype(dtype)
    )
    ours, theirs = (make(cls, 4) for cls in (BatchNorm, nnx.BatchNorm))
    close((ours(x), pure(ours)), (theirs(x), pure(theirs)))


@pytest.mark.third_party
def test_complex_input():
    """flax drops the imaginary part of the running mean, here it stays."""
    x = jnp.asarray(np.asarray(data(seed=1)) + 1j * np.asarray(data(seed=2)), jnp.complex64)
    ours, theirs = (make(cls, momentum=0.5) for cls in (BatchNorm, nnx.BatchNorm))
    with strict():
        y = ours(x)
    with pytest.warns(np.exceptions.ComplexWarning):
        expected = theirs(x)
    close(y, expected)
    close(ours.var[...], theirs.var[...])
    np.testing.assert_allclose(ours.mean[...], np.asarray(x).mean((0, 1, 2)) / 2, rtol=1e-5)
    close(ours.mean[...].real, theirs.mean[...])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 2, 2, 2, 5)], ids=str)
def test_inputs_flax_accepts(shape):
    x = data(shape)
    ours, theirs = (make(cls) for cls in (BatchNorm, nnx.BatchNorm))
    close((ours(x), pure(ours)), (theirs(x), pure(theirs)))


def test_several_feature_axes_share_the_flat_variables():
    """flax cannot store their statistics."""
    x = data((6, 3, 4))
    layer = make(BatchNorm, 12, axis=(1, 2), momentum=0.0)
    y, m = oracle.forward(x, axis=(1, 2))
    np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], m.mean.reshape(12), rtol=1e-5, atol=1e-6)
    assert layer.var.shape == (12,)


@pytest.mark.third_party
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_linen_gives_the_same_bits(x_dtype, dtype, use_running_average):
    x = data(dtype=x_dtype)
    options = {
        "use_running_average": use_running_average,
        "activation": jax.nn.relu,
        "dtype": dtype,
        "momentum": 0.9,
    }
    linen = jbn.linen.BatchNorm(**options)
    y, new = linen.apply(
        linen.init(jax.random.key(0), x), x, residual=x, mask=MASKS[0], mutable=["batch_stats"]
    )
    layer = make(BatchNorm, **options)
    same(layer(x, residual=x, mask=MASKS[0]), y)
    same({"mean": layer.mean[...], "var": layer.var[...]}, new["batch_stats"])


def test_arguments_of_flax_come_first_and_have_its_defaults():
    theirs, ours = (
        inspect.signature(cls.__init__).parameters for cls in (nnx.BatchNorm, BatchNorm)
    )
    described = lambda parameters: [(p.name, p.kind, p.default) for p in parameters.values()]
    assert described(ours)[: len(theirs)] == described(theirs)
    added = [
        "activation",
        "virtual_batch_size",
        "unbiased",
        "skip_nonfinite",
        "update_stats",
        "implementation",
    ]
    assert list(ours)[len(theirs) :] == added
    call = list(inspect.signature(nnx.BatchNorm.__call__).parameters)
    assert list(inspect.signature(BatchNorm.__call__).parameters) == [*call, "residual"]


def test_is_flax_s_class_with_the_same_attributes():
    theirs, ours = (make(cls) for cls in (nnx.BatchNorm, BatchNorm))
    assert isinstance(ours, nnx.BatchNorm)
    assert set(vars(theirs)) < set(vars(ours))


def test_train_eval_and_views():
    x = data()

    class Net(nnx.Module):
        def __init__(self):
            self.norm = make(BatchNorm)

    net = Net()
    net.eval()
    assert net.norm.use_running_average
    np.testing.assert_allclose(net.norm(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(5))
    net.train()
    assert not net.norm.use_running_average
    y = net.norm(x)
    close_to_oracle(y, oracle.forward(x)[0])
    assert np.any(net.norm.mean[...] != 0)
    view = nnx.view(net, use_running_average=True)
    assert view.norm.use_running_average
    assert not net.norm.use_running_average
    assert view.norm.mean is net.norm.mean
    assert "use_running_average" in nnx.view_info(net)


def close_to_oracle(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_use_running_average_of_the_call_goes_first():
    x = data()
    layer = make(BatchNorm, use_running_average=True)
    close_to_oracle(layer(x, False), oracle.forward(x)[0])
    with pytest.raises(ValueError, match="use_running_average is None"):
        make(BatchNorm, use_running_average=None)(x)


def test_update_stats_false_touches_nothing():
    x = data(mean=3.0)
    layer = make(BatchNorm, update_stats=False)
    close_to_oracle(layer(x), oracle.forward(x)[0])
    np.testing.assert_array_equal(layer.mean[...], np.zeros(5))
    np.testing.assert_array_equal(layer.var[...], np.ones(5))


def test_skip_nonfinite_keeps_the_model_usable():
    x = data()
    layer = make(BatchNorm, skip_nonfinite=True)
    layer(x)
    before = pure(layer)
    layer(x.at[1, 1, 1, 1].set(jnp.inf))
    same(pure(layer), before)


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_and_nothing_is_changed(options, error, match):
    layer = make(BatchNorm, **options)
    before = pure(layer)
    with pytest.raises(error, match=match):
        layer(data())
    same(pure(layer), before)


def test_bad_arrays_are_refused():
    x = data()
    with pytest.raises(ValueError, match=r"scale has shape \(4,\), expected \(5,\)"):
        make(BatchNorm, 4)(x)
    with pytest.raises(ValueError, match="residual has shape"):
        make(BatchNorm)(x, residual=x[..., :1])
    with pytest.raises(ValueError, match="weights has shape"):
        make(BatchNorm)(x, mask=np.ones((2, *SHAPE), bool))


def test_large_mean():
    x = data((4096, 8), mean=1e4, std=1.0)
    layer = make(BatchNorm, 8, momentum=0.0)
    y, m = oracle.forward(x)
    np.testing.assert_allclose(layer(x), y, atol=1e-3)
    np.testing.assert_allclose(layer.var[...], oracle.variance(m), rtol=1e-3)


def test_stored_statistics_carry_no_gradient_as_in_flax():
    x = data()

    def stored(x, cls):
        layer = make(cls)
        layer(x)
        return jnp.sum(layer.mean[...] + layer.var[...])

    for cls in (nnx.BatchNorm, BatchNorm):
        np.testing.assert_array_equal(jax.grad(stored)(x, cls), np.zeros(SHAPE))


def test_array_references():
    """Variables that hold a jax.Ref are written in place, under jax.jit and jax.grad."""
    x = data()
    layer = make(BatchNorm)
    with nnx.var_defaults(ref=True):
        held = make(BatchNorm)
    y = jax.jit(lambda x: held(x))(x)
    same(y, jax.jit(lambda x: make(BatchNorm)(x))(x))
    layer(x)
    close(held.mean[...], layer.mean[...])
    jax.grad(lambda x: jnp.sum(held(x)))(x)
    layer(x)
    close(held.mean[...], layer.mean[...])


# Lifting.


@pytest.mark.parametrize("how", ["remat", "vmap", "scan", "scan_carry", "vmap_axis_name"])
def test_lifting(how):
    x = data((4, 6, 5))

    def run(cls):
        per_layer = how in ("vmap", "scan")
        build = lambda key: cls(5, rngs=nnx.Rngs(key), bias_init=jax.nn.initializers.normal())
        keys = jax.random.split(jax.random.key(0), 4)
        layer = nnx.vmap(build)(keys) if per_layer else build(keys[0])
        apply = lambda layer, x: layer(x)
        if how == "remat":
            call = nnx.remat(apply)
        elif how == "vmap":
            call = nnx.vmap(apply)
        elif how == "vmap_axis_name":
            layer.axis_name = "batch"
            axes = nnx.StateAxes({...: None})
            call = nnx.vmap(apply, in_axes=(axes, 0), axis_name="batch")
        elif how == "scan":
            call = lambda layer, x: nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, layer)
        else:
            axes = nnx.StateAxes({...: nnx.Carry})
            call = nnx.scan(apply, in_axes=(axes, 0), out_axes=0)

        @nnx.jit
        def step(layer, x):
            def loss(layer, x):
                y = call(layer, x)
                return jnp.sum(jnp.sin(y)), y

            grads, y = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(
                layer, x
            )
            return y, nnx.to_pure_dict(grads[0]), grads[1]

        return step(layer, x), pure(layer)

    close(run(BatchNorm), run(nnx.BatchNorm))


def test_synchronized_masked_shards_are_weighted_by_count():
    x = data((8, 2, 5), mean=3.0)
    mask = np.arange(16).reshape(8, 2, 1) % 5 < np.arange(8)[:, None, None] % 4
    expected, m = oracle.forward(x.reshape(16, 5), weights=mask.reshape(16, 1))
    graph, state = nnx.split(make(BatchNorm, momentum=0.0, axis_name="batch"))

    def local(state, x, mask):
        layer = nnx.merge(graph, state)
        y = layer(x, mask=mask)
        return y, layer.mean[...], layer.var[...]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    across = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=(P("batch"), P(), P())
    )
    y, mean, var = jax.jit(across)(state, x, jnp.asarray(mask))
    close_to_oracle((y.reshape(16, 5), mean, var), (expected, m.mean, oracle.variance(m)))


# Checkpoints.


@pytest.mark.parametrize("source", [nnx.BatchNorm, BatchNorm], ids=["from flax", "from jbn"])
def test_checkpoints_go_both_ways(source):
    target = nnx.BatchNorm if source is BatchNorm else BatchNorm
    x = data()
    trained = make(source, momentum=0.5)
    trained(x)
    saved = nnx.to_pure_dict(nnx.state(trained))
    loaded = make(target, momentum=0.5)
    state = nnx.state(loaded)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(saved)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(loaded, state)
    same(pure(loaded), pure(trained))
    y, expected = (layer(x, use_running_average=True) for layer in (loaded, trained))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
