"""Health reports: every planted fault is named with its layer and channels, and a healthy model gives no warning."""

import functools

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
    """The trap of a forgotten mutable=['batch_stats']: the weights train on, the statistics stay."""
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
    """What a shard_map without its check may return: one array, called replicated, of which a device holds other values."""
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
    with pytest.raises(ValueError, match=r"moments have shape \(2,\), expected \(3,\)"):
        health.report(params, state, m)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), expected that of mean, \(3,\)"):
        health.report(jbn.init(2)[0], state)
    with pytest.raises(ValueError, match=r"moments of \['other'\]"):
        health.model_report({"bn": (params, state)}, {"other": m})
    with pytest.raises(ValueError, match="eps is 0"):
        health.report(params, state, eps=0)
