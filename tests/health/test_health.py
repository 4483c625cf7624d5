"""Health reports: every planted fault is named with its layer and channels, and a healthy model
gives no warning.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx, serialization
from sklearn.datasets import load_digits

import jbn
import jbn.linen
import jbn.nnx
from jbn import health
from jbn.health import __main__ as command
from jbn.health import checkpoints

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = (PIXELS / 16).astype(np.float32)


class Digits(nn.Module):
    """Two hidden layers with batch norm."""

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(16, use_bias=False)(x)
            x = jbn.linen.BatchNorm(
                use_running_average=not train, momentum=0.9, activation=jax.nn.relu
            )(x)
        return nn.Dense(10)(x)


def train(variables, steps, images=PIXELS):
    """SGD on minibatches of 128."""
    sgd = optax.adam(3e-3)

    def loss(params, batch_stats, x, labels):
        logits, new = Digits().apply(
            {"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new[
            "batch_stats"
        ]

    @jax.jit
    def step(params, batch_stats, opt_state, x, labels):
        grads, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, x, labels)
        updates, opt_state = sgd.update(grads, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = sgd.init(params)
    for rows in np.random.default_rng(0).integers(0, len(LABELS), (steps, 128)):
        params, batch_stats, opt_state = step(
            params, batch_stats, opt_state, images[rows], LABELS[rows]
        )
    return {"params": params, "batch_stats": batch_stats}


@pytest.fixture(scope="module")
def trained():
    return train(Digits().init(jax.random.key(0), PIXELS[:2], False), 200)


def with_value(variables, path, channel, value):
    """The variables with one value replaced: path is collection/layer/name."""
    tree = jax.tree.map(np.array, variables)
    node = functools.reduce(lambda node, key: node[key], path.split("/")[:-1], tree)
    node[path.split("/")[-1]][channel] = value
    return tree


def named(report):
    return [(finding.layer, finding.kind, finding.channels) for finding in report.findings]


def test_a_healthy_digits_model_gives_no_warning(trained):
    moments = health.input_moments(Digits(), trained, PIXELS, False)
    accuracy = (Digits().apply(trained, PIXELS, False).argmax(1) == LABELS).mean()
    assert accuracy > 0.95
    assert named(health.model_report(trained, moments)) == []
    assert named(health.model_report(trained)) == []


@pytest.mark.parametrize(
    ("path", "channel", "value", "kind"),
    [
        ("batch_stats/BatchNorm_1/mean", 3, np.nan, "not finite"),
        ("params/BatchNorm_1/bias", 5, np.inf, "not finite"),
        ("batch_stats/BatchNorm_0/var", 2, -0.5, "negative variance"),
        ("batch_stats/BatchNorm_1/var", 7, 0.0, "dead"),
        ("batch_stats/BatchNorm_1/var", 7, 2e-5, "variance near eps"),
        ("batch_stats/BatchNorm_0/mean", 11, 1e4, "cancellation"),
        ("params/BatchNorm_0/scale", 4, 0.0, "prunable"),
        ("params/BatchNorm_1/bias", 1, -20.0, "off"),
        ("params/BatchNorm_1/bias", 1, 20.0, "saturated"),
    ],
)
def test_a_planted_value_is_named_with_layer_and_channel(trained, path, channel, value, kind):
    report = health.model_report(with_value(trained, path, channel, value))
    layer = path.split("/")[1]
    assert (layer, kind, (channel,)) in named(report)
    assert {(f.layer, f.channels) for f in report.findings} == {(layer, (channel,))}
    assert f"{layer}, channel {channel}: {kind}: " in str(report)
    assert "Remedy: " in str(report)


def test_a_dead_unit_is_found_in_the_batch_before_the_running_variance_shows_it(trained):
    tree = jax.tree.map(np.array, trained)
    tree["params"]["Dense_1"]["kernel"][:, 6] = 0
    report = health.model_report(tree, health.input_moments(Digits(), tree, PIXELS, False))
    assert named(report) == [("BatchNorm_1", "dead", (6,))]
    assert named(health.model_report(tree)) == []


@pytest.mark.third_party  # optax counts its steps in int32
def test_statistics_not_updated_while_the_weights_drift(trained):
    """A forgotten mutable=['batch_stats']: the weights train on, the statistics stay."""
    drifted = train(trained, 1000, images=PIXELS * 3 + 1)
    stale = {"params": drifted["params"], "batch_stats": trained["batch_stats"]}
    moments = health.input_moments(Digits(), stale, PIXELS * 3 + 1, False)
    found = {(f.layer, f.kind): f.channels for f in health.model_report(stale, moments).findings}
    assert len(found["BatchNorm_0", "drift"]) == 16
    first = {name: np.float64(value) for name, value in stale["batch_stats"]["BatchNorm_0"].items()}
    x = np.float64(PIXELS * 3 + 1) @ np.float64(stale["params"]["Dense_0"]["kernel"])
    m = oracle.moments(x)
    measured = health.model_report(stale, moments).layers[0]
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    assert_close(measured.drift, (m.mean - first["mean"]) / np.sqrt(first["var"]))
    assert_close(measured.spread, np.sqrt(oracle.variance(m) / first["var"]))


def test_drift_of_one_channel_and_its_noise():
    """A shift of one standard deviation is named in 1000 rows, and is not told from noise in 16."""
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    params, state = jbn.init(4)
    _, state = jbn.batch_norm_train(jnp.asarray(x), params, state, momentum=0.0)
    shifted = x + np.float32([0, 0, 1, 0])
    report = health.report(params, state, jbn.moments(jnp.asarray(shifted)), layer="bn")
    assert named(report) == [("bn", "drift", (2,))]
    assert named(health.report(params, state, jbn.moments(jnp.asarray(shifted[:16])))) == []


def test_numbers_against_the_oracle():
    rng = np.random.default_rng(1)
    x, scale, bias = rng.normal(3, 2, (64, 5)), rng.normal(1, 0.2, 5), rng.normal(0, 1, 5)
    mean, var = rng.normal(2, 1, 5), rng.uniform(1, 9, 5)
    params, state = (
        jbn.Params(jnp.float32(scale), jnp.float32(bias)),
        jbn.State(jnp.float32(mean), jnp.float32(var), jnp.int32(7)),
    )
    measured = health.report(params, state, jbn.moments(jnp.float32(x)), eps=0.5, momentum=0.9)
    y = oracle.normalize(x, mean, var, scale, bias, eps=0.5)
    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-5
    )  # float32 in, float64 after that
    close(measured.one_sided, y.mean(0) / y.std(0), rtol=1e-4)
    close(measured.signal, np.sqrt(x.var(0) / (x.var(0) + 0.5)))
    close(measured.ratio, np.abs(mean) / np.sqrt(var))
    assert measured.updates == 7
    close(measured.start_weight, 0.9**7)
    assert ("layer", "few updates", ()) in named(measured)


def test_never_updated_with_and_without_a_count():
    params, state = jbn.init(3)
    assert named(health.report(params, state)) == [("layer", "never updated", ())]
    assert named(health.report(params, state._replace(count=jnp.int32(9)))) == []
    variables = Digits().init(jax.random.key(0), PIXELS[:2], False)
    assert named(health.model_report(variables)) == [
        (name, "never updated", ()) for name in ("BatchNorm_0", "BatchNorm_1")
    ]


def test_a_replica_that_diverged_is_named_in_stacked_variables(trained):
    stacked = jax.tree.map(lambda v: np.stack([np.asarray(v)] * 4), trained)
    assert named(health.model_report(stacked, stacked=True)) == []
    stacked["batch_stats"]["BatchNorm_1"]["mean"][2, 5] += 1.0
    report = health.model_report(stacked, stacked=True)
    assert named(report) == [("BatchNorm_1", "replicas disagree", ())]
    assert "replica 2 of 4" in str(report)
    std = np.sqrt(trained["batch_stats"]["BatchNorm_1"]["var"][5])
    np.testing.assert_allclose(
        report.layers[1].disagreement, [0, 0, 1 / std, 0], rtol=1e-6, atol=1e-12
    )


def test_a_replica_that_diverged_is_named_among_device_copies():
    """What a shard_map without its check may return: one array, called replicated, of which a
    device holds other values.
    """
    params, state = jbn.init(4)
    devices = jax.devices()
    state = state._replace(mean=jnp.ones(4), count=jnp.int32(5))
    copies = [jnp.ones(4) + (0.25 if d == 6 else 0.0) for d in range(len(devices))]
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("d",)), jax.sharding.PartitionSpec())
    shards = [jax.device_put(c, d) for c, d in zip(copies, devices, strict=True)]
    state = state._replace(mean=jax.make_array_from_single_device_arrays((4,), sharding, shards))
    report = health.report(params, state)
    assert named(report) == [("layer", "replicas disagree", ())]
    assert "replica 6 of 8" in str(report)


def test_a_nan_on_a_later_replica_is_found(trained):
    stacked = jax.tree.map(lambda v: np.stack([np.asarray(v)] * 4), trained)
    stacked["batch_stats"]["BatchNorm_0"]["var"][3, 8] = np.nan
    found = named(health.model_report(stacked, stacked=True))
    assert found == [("BatchNorm_0", "not finite", (8,)), ("BatchNorm_0", "replicas disagree", ())]


def test_the_spread_alone_is_drift():
    """The same means, standard deviations 2.6 times wider and narrower; 1.8 is within the limit."""
    x = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    params, state = jbn.init(4)
    _, state = jbn.batch_norm_train(jnp.asarray(x), params, state, momentum=0.0)
    wider = (x - x.mean(0)) * np.float32([1, 2.6, 1 / 2.6, 1.8]) + x.mean(0)
    report = health.report(params, state, jbn.moments(jnp.asarray(wider)))
    assert named(report) == [("layer", "drift", (1, 2))]
    np.testing.assert_allclose(report.spread, [1, 2.6, 1 / 2.6, 1.8], rtol=1e-4)


def test_a_negative_scale_does_not_turn_the_side_of_the_output():
    """one_sided is the sign of the output's mean: the bias in training, also where scale < 0."""
    params, state = jbn.init(4)
    params = params._replace(
        scale=jnp.array([1.0, -1.0, 1.0, -1.0]), bias=jnp.array([9.0, 9.0, -9.0, -9.0])
    )
    report = health.report(params, state._replace(count=jnp.int32(9)))
    assert named(report) == [("layer", "off", (2, 3)), ("layer", "saturated", (0, 1))]
    x = np.random.default_rng(0).normal(5, 1, (500, 4)).astype(np.float32)
    report = health.report(params, state._replace(count=jnp.int32(9)), jbn.moments(jnp.asarray(x)))
    y = oracle.normalize(x, np.zeros(4), np.ones(4), params.scale, params.bias)
    np.testing.assert_allclose(report.one_sided, y.mean(0) / y.std(0), rtol=1e-4)
    assert report.one_sided[1] > 0 > report.one_sided[3]


def test_replicas_are_compared_with_their_median_and_not_with_the_first():
    """The first of five replicas left the others: it alone is named, which a mean would not do."""
    params, state = jbn.init(3)
    stacked = jax.tree.map(lambda v: np.stack([np.asarray(v)] * 5), (params, state))
    stacked[1].mean[0] += 2.0
    report = health.model_report({"bn": stacked}, stacked=True)
    assert "replica 0 of 5: up to 2 standard deviations" in str(report)
    np.testing.assert_allclose(report.layers[0].disagreement, [2, 0, 0, 0, 0])


@pytest.mark.parametrize(("signal", "kind"), [(0.099, "dead"), (0.101, "variance near eps")])
def test_where_dead_begins(signal, kind):
    """A normalized value of standard deviation s has variance s^2 eps / (1 - s^2) before."""
    params, state = jbn.init(2)
    var = jnp.array([1.0, signal**2 * 1e-5 / (1 - signal**2)], jnp.float32)
    report = health.report(params, state._replace(var=var, count=jnp.int32(9)))
    assert named(report) == [("layer", kind, (1,))]


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_few_updates_are_told_by_a_channel_that_saw_only_zeros(momentum):
    """Without a count: such a channel keeps momentum^k of its initial variance, and mean 0."""
    x = np.random.default_rng(0).normal(1, 2, (64, 4)).astype(np.float32)
    x[:, 2] = 0
    params, state = jbn.init(4)
    for _ in range(12):
        _, state = jbn.batch_norm_train(jnp.asarray(x), params, state, momentum=momentum)
    for known in (None, momentum):
        report = health.report(params, state._replace(count=None), momentum=known)
        assert named(report) == [("layer", "few updates", ())]
        assert report.updates == 12
        np.testing.assert_allclose(report.start_weight, momentum**12)
    assert health.report(params, state._replace(count=None), momentum=0.95).updates is None
    near = state._replace(count=None, var=state.var * (1 + 1e-4))
    assert health.report(params, near).updates is None
    for _ in range(30):
        _, state = jbn.batch_norm_train(jnp.asarray(x), params, state, momentum=0.9)
    if momentum == 0.9:
        assert named(health.report(params, state._replace(count=None))) == []  # 0.9^42 = 1 %


def test_values_whose_squares_overflow_are_named():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    x[:, 1] *= np.float32(1e20)
    params, state = jbn.init(3)
    _, state = jbn.batch_norm_train(jnp.asarray(x), params, state, momentum=0.0)
    found = named(health.report(params, state))
    assert ("layer", "overflow", (1,)) in found
    far = state._replace(mean=jnp.array([0.0, 2e19, 9e18]), var=jnp.ones(3), count=jnp.int32(9))
    assert ("layer", "overflow", (1,)) in named(health.report(params, far))
    fine = state._replace(mean=jnp.array([0.0, 9e18, 0.0]), var=jnp.full(3, 1e36))
    assert named(health.report(params, fine)) == []


@pytest.mark.x64
def test_float64_holds_larger_squares():
    params, state = jbn.init(2, param_dtype=jnp.float64)
    state = state._replace(var=jnp.array([1e60, 1.0]), count=jnp.int32(9))
    assert named(health.report(params, state)) == []


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        ({"mean": np.zeros(3)}, "var is missing"),
        ({"var": np.ones(3)}, "mean is missing"),
        ({"mean": np.zeros(3), "var": None}, "var is no array of numbers but NoneType"),
        ({"mean": "text", "var": np.ones(3)}, "mean is no array of numbers but str"),
        (
            {"mean": np.zeros(3), "var": np.array(["a"] * 3)},
            "var is no array of numbers but ndarray",
        ),
        ({"mean": 0.5, "var": 1.0}, "mean is no array of numbers but float and var is no array"),
        ({"mean": np.zeros(3), "var": np.ones(3, complex)}, "ndarray of complex128"),
        ({}, "mean is missing and var is missing"),
    ],
)
def test_a_layer_without_mean_or_var_is_reported(trained, stats, words):
    tree = {
        "params": {**trained["params"], "late": {"scale": np.ones(3)}},
        "batch_stats": {**trained["batch_stats"], "late": stats},
    }
    report = health.model_report(tree)
    assert named(report) == [("late", "missing", ())]
    assert words in str(report)
    assert len(report.layers) == 3


def test_a_norm_whose_statistics_are_all_gone_is_reported(trained):
    stats = {"BatchNorm_0": trained["batch_stats"]["BatchNorm_0"]}
    report = health.model_report({**trained, "batch_stats": stats})
    assert named(report) == [("BatchNorm_1", "missing", ())]
    copies = {"model": trained, "average": {"params": trained["params"]}}
    assert named(health.model_report(copies)) == []  # a copy of the parameters needs no statistics


def test_other_things_called_mean_or_var_are_no_norms(trained):
    head = {"mean": {"kernel": np.ones((3, 2))}, "var": np.ones(2)}
    tree = {**trained, "params": {**trained["params"], "gauss": head}}
    assert named(health.model_report(tree)) == []


def test_json_is_strict_and_complete(trained):
    tree = with_value(trained, "batch_stats/BatchNorm_1/mean", 3, np.nan)
    report = health.model_report(tree)
    decoded = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert decoded == report.to_dict()
    layer = decoded["layers"][1]
    assert layer["mean"][3] is None
    np.testing.assert_allclose(layer["var"], tree["batch_stats"]["BatchNorm_1"]["var"])
    assert layer["findings"][0]["kind"] == "not finite"
    assert layer["findings"][0]["channels"] == [3]
    assert json.loads(report.layers[1].to_json()) == layer


def test_features_of_several_axes_and_absent_parameters():
    params, state = jbn.init((2, 3), use_scale=False, use_bias=False)
    state = jbn.State(state.mean, state.var.at[1, 2].set(0), jnp.int32(4))
    report = health.report(params, state)
    assert named(report) == [("layer", "dead", ((1, 2),))]
    assert report.scale is None


def test_nnx_and_functional_models():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([jbn.nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])

    net = Net(nnx.Rngs(0))
    net.blocks[1].var[...] = jnp.array([1.0, 0.0, 1.0])
    for variables in (net, nnx.state(net)):
        expected = [("blocks/0", "never updated", ()), ("blocks/1", "dead", (1,))]
        assert named(health.model_report(variables)) == expected
    params, state = jbn.init(3)
    broken = state._replace(mean=jnp.array([0.0, jnp.nan, 0.0]), count=jnp.int32(1))
    assert named(health.model_report({"encoder": {"norm": (params, broken)}})) == [
        ("encoder/norm", "not finite", (1,))
    ]


def test_moments_of_a_layer_called_twice_are_pooled():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            norm = jbn.linen.BatchNorm(use_running_average=True)
            return norm(a), norm(b)

    a, b = jnp.asarray(PIXELS[:10, :4]), jnp.asarray(PIXELS[10:40, :4])
    found = health.input_moments(Twice(), Twice().init(jax.random.key(0), a, b), a, b)
    expected = oracle.moments(PIXELS[:40, :4])
    np.testing.assert_allclose(found["BatchNorm_0"].mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(found["BatchNorm_0"].m2, expected.m2, rtol=1e-5)


def saved_msgpack(tree, folder):
    (folder / "model.msgpack").write_bytes(serialization.to_bytes(tree))
    return folder / "model.msgpack"


def saved_orbax(tree, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", tree)
    return folder / "orbax"


def saved_by_manager(tree, folder):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    return folder / "manager"


@pytest.mark.third_party
@pytest.mark.parametrize("save", [saved_msgpack, saved_orbax, saved_by_manager])
def test_the_command_reads_a_checkpoint(trained, save, tmp_path, capsys):
    healthy = save({"step": np.int32(5), "model": trained}, tmp_path)
    assert command.main([str(healthy)]) == 0
    table = capsys.readouterr().out
    assert "model/BatchNorm_0" in table
    assert table.endswith("0 warnings\n")


@pytest.mark.third_party
def test_the_command_warns_and_draws(trained, tmp_path, capsys):
    path = saved_msgpack(with_value(trained, "params/BatchNorm_1/scale", 9, 0.0), tmp_path)
    assert command.main([str(path), "--plot", str(tmp_path / "out.png")]) == 1
    assert "WARNING BatchNorm_1, channel 9: prunable: scale 0" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.third_party
def test_nnx_and_tuples_come_back_from_a_checkpoint(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = jbn.nnx.BatchNorm(4, rngs=rngs)

    params, state = jbn.init(2)
    for tree, name in (
        (nnx.state(Net(nnx.Rngs(0))), "norm"),
        ({"first": (params, state)}, "first"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for save in (saved_orbax, saved_msgpack):
            plain = (
                nnx.to_pure_dict(tree)
                if isinstance(tree, nnx.State) and save is saved_msgpack
                else tree
            )
            assert [*checkpoints.find(*checkpoints.load(save(plain, folder)).values())[0]] == [name]


def test_the_command_says_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights").write_bytes(serialization.to_bytes({"params": {"kernel": np.zeros(3)}}))
    for name, message in {
        "text": "is not a file of",
        "empty": "0 orbax trees",
        "none": "not there",
        "weights": "no batch norm",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            command.main([str(tmp_path / name)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_errors_name_what_came():
    params, state = jbn.init(3)
    m = jbn.moments(jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="got a State and a Params"):
        health.report(state, params)
    with pytest.raises(ValueError, match=r"moments of layer have shape \(2,\), expected \(3,\)"):
        health.report(params, state, m)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), expected that of mean, \(3,\)"):
        health.report(jbn.init(2)[0], state)
    with pytest.raises(ValueError, match=r"moments of \['other'\]"):
        health.model_report({"bn": (params, state)}, {"other": m})
    with pytest.raises(ValueError, match="eps is 0"):
        health.report(params, state, eps=0)
