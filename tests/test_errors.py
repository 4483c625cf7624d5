"""The error table, one test a line.

The message says what came, and a call that raises changes nothing.
"""
# Most calls here are wrong on purpose.
# pyright: reportArgumentType=false

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
PARAMS, STATE = jbn.init(4)
MOMENTS = jbn.moments(X)

train = functools.partial(jbn.batch_norm_train, X, PARAMS, STATE)
evaluate = functools.partial(jbn.batch_norm_eval, X, PARAMS, STATE)


def train_x(x, **options):
    return jbn.batch_norm_train(x, PARAMS, STATE, **options)


renorm = functools.partial(jbn.batch_renorm_train, X, PARAMS, STATE)


def in_groups(groups):
    """Training with six devices, one row of x each."""
    step = functools.partial(train_x, axis_name="i", axis_index_groups=groups)
    return jax.vmap(step, axis_name="i")(X[:, None])


def evaluate_narrow(dtype):
    narrow = STATE._replace(mean=STATE.mean.astype(dtype), var=STATE.var.astype(dtype))
    return jbn.batch_norm_eval(X, PARAMS, narrow)


def train_layer(params=PARAMS, state=STATE):
    return jbn.batch_norm_train(X, params, state)


# (name, call, error, what the message must contain: the offending value, and the expected one where
# there is one)
TABLE = [
    ("integer x", lambda: train_x(jnp.ones((6, 4), jnp.int32)), TypeError, ["int32", "float"]),
    ("bool x", lambda: train_x(jnp.ones((6, 4), bool)), TypeError, ["bool", "float"]),
    (
        "complex x",
        lambda: train_x(jnp.ones((6, 4), jnp.complex64)),
        TypeError,
        ["complex64", "Flax"],
    ),
    (
        "x without values",
        lambda: train_x(jax.ShapeDtypeStruct((6, 4), jnp.float32)),
        TypeError,
        ["ShapeDtypeStruct", "jax.eval_shape"],
    ),
    (
        "x with dtypes of its own",
        lambda: train_x(types.SimpleNamespace(shape=(6, 4), dtype="torch.float32")),
        TypeError,
        ["SimpleNamespace", "jnp.asarray(x)"],
    ),
    (
        "an activation that returns nothing",
        lambda: train(activation=lambda y: None),
        TypeError,
        ["None", "(6, 4)", "elementwise"],
    ),
    (
        "an activation that reduces",
        lambda: evaluate(activation=jnp.sum),
        TypeError,
        ["()", "(6, 4)", "elementwise"],
    ),
    ("x of lists", lambda: train_x([[1.0, 2.0]]), TypeError, ["list", "[[1.0, 2.0]]"]),
    (
        "integer x in eval",
        lambda: jbn.batch_norm_eval(jnp.ones((6, 4), jnp.int8), PARAMS, STATE),
        TypeError,
        ["int8"],
    ),
    (
        "integer x in moments",
        lambda: jbn.moments(jnp.ones((6, 4), jnp.int16)),
        TypeError,
        ["int16"],
    ),
    ("empty batch", lambda: train_x(jnp.ones((0, 4))), ValueError, ["(0, 4)"]),
    ("empty inner axis", lambda: train_x(jnp.ones((2, 0, 4))), ValueError, ["(2, 0, 4)"]),
    ("empty moments", lambda: jbn.moments(jnp.ones((0, 4))), ValueError, ["(0, 4)"]),
    (
        "one value per channel",
        lambda: train_x(jnp.ones((1, 4))),
        ValueError,
        ["(1, 4)", "batch_norm_eval"],
    ),
    ("one value, several axes", lambda: train_x(jnp.ones((1, 1, 4))), ValueError, ["(1, 1, 4)"]),
    ("one value per virtual batch", lambda: train(virtual_batch_size=1), ValueError, ["(6, 4)"]),
    ("rank 1 in train", lambda: train_x(jnp.ones(4)), ValueError, ["(4,)", "axis_name"]),
    ("rank 0", lambda: train_x(jnp.float32(3)), ValueError, ["axis -1", "rank 0"]),
    (
        "scale of another size",
        lambda: train_layer(PARAMS._replace(scale=jnp.ones(5))),
        ValueError,
        ["scale", "(5,)", "(4,)"],
    ),
    (
        "bias of another rank",
        lambda: train_layer(PARAMS._replace(bias=jnp.ones((4, 1)))),
        ValueError,
        ["bias", "(4, 1)"],
    ),
    (
        "mean of another size",
        lambda: train_layer(state=STATE._replace(mean=jnp.ones(3))),
        ValueError,
        ["mean", "(3,)", "(4,)"],
    ),
    (
        "var of another size",
        lambda: train_layer(state=STATE._replace(var=jnp.ones(()))),
        ValueError,
        ["var", "()", "(4,)"],
    ),
    (
        "integer mean",
        lambda: train_layer(state=STATE._replace(mean=jnp.ones(4, int))),
        TypeError,
        ["mean", "int32"],
    ),
    ("count None", lambda: train_layer(state=STATE._replace(count=None)), TypeError, ["count"]),
    (
        "count a Python int",
        lambda: train_layer(state=STATE._replace(count=0)),
        TypeError,
        ["count is a int (0)", "jnp.asarray(count)"],
    ),
    (
        "count a float",
        lambda: train_layer(state=STATE._replace(count=jnp.float32(3))),
        TypeError,
        ["count", "float32", "int32", "jnp.int32(0)"],
    ),
    (
        "count per feature",
        lambda: jbn.update_state(STATE._replace(count=jnp.zeros(4, int)), MOMENTS),
        TypeError,
        ["count", "(4,)", "jnp.int32(0)"],
    ),
    (
        "mean in bfloat16",
        lambda: train_layer(state=STATE._replace(mean=jnp.zeros(4, jnp.bfloat16))),
        TypeError,
        ["mean", "bfloat16", "astype(jnp.float32)"],
    ),
    (
        "var in float16",
        lambda: jbn.update_state(STATE._replace(var=jnp.ones(4, jnp.float16)), MOMENTS),
        TypeError,
        ["var", "float16", "astype(jnp.float32)"],
    ),
    ("mean None", lambda: train_layer(state=STATE._replace(mean=None)), TypeError, ["mean"]),
    (
        "var of another size than mean",
        lambda: jbn.update_state(STATE._replace(var=jnp.ones(3)), MOMENTS),
        ValueError,
        ["var", "(3,)", "(4,)"],
    ),
    ("m2 None", lambda: jbn.update_state(STATE, MOMENTS._replace(m2=None)), TypeError, ["m.m2"]),
    (
        "m2 of another size",
        lambda: jbn.update_state(STATE, MOMENTS._replace(m2=jnp.ones(3))),
        ValueError,
        ["m.m2", "(3,)", "(4,)"],
    ),
    (
        "count of moments a scalar",
        lambda: jbn.merge_moments(MOMENTS, MOMENTS._replace(count=jnp.float32(6))),
        ValueError,
        ["b.count", "()", "(4,)"],
    ),
    (
        "count of moments an integer",
        lambda: jbn.merge_moments(MOMENTS._replace(count=jnp.full(4, 6)), MOMENTS),
        TypeError,
        ["a.count", "int32", "astype"],
    ),
    (
        "mean of moments a float",
        lambda: jbn.update_state(STATE, MOMENTS._replace(mean=0.5)),
        TypeError,
        ["m.mean", "0.5"],
    ),
    ("scale a float", lambda: train_layer(PARAMS._replace(scale=1.0)), TypeError, ["scale", "1.0"]),
    ("layer of another axis", lambda: train(axis=0), ValueError, ["(4,)", "(6,)", "use axis=1"]),
    (
        "channels first without axis",
        lambda: train_x(jnp.ones((2, 4, 8, 8))),
        ValueError,
        ["scale has shape (4,)", "(8,)", "use axis=1"],
    ),
    (
        "channels first without axis in eval",
        lambda: jbn.batch_norm_eval(jnp.ones((4, 8)), PARAMS, STATE),
        ValueError,
        ["use axis=0"],
    ),
    (
        "two feature axes without axis",
        lambda: jbn.batch_norm_train(jnp.ones((2, 3, 5, 7)), *jbn.init((3, 5))),
        ValueError,
        ["(3, 5)", "use axis=(1, 2)"],
    ),
    ("params a tuple", lambda: train_layer(tuple(PARAMS)), TypeError, ["tuple", "jbn.init"]),
    ("params a dict", lambda: train_layer({"scale": 1}), TypeError, ["dict", "{'scale': 1}"]),
    (
        "params and state swapped",
        lambda: train_layer(STATE, PARAMS),
        TypeError,
        ["State", "Params"],
    ),
    ("state missing", lambda: train_layer(state=None), TypeError, ["None", "State"]),
    ("axis too large", lambda: train(axis=2), ValueError, ["axis 2", "rank 2"]),
    ("axis too small", lambda: train(axis=-3), ValueError, ["axis -3", "-2 <= axis < 2"]),
    ("axis repeated", lambda: train(axis=(1, -1)), ValueError, ["(1, -1)"]),
    ("no axis", lambda: train(axis=()), ValueError, ["()"]),
    ("axis a float", lambda: train(axis=1.5), TypeError, ["1.5"]),
    ("axis a name", lambda: evaluate(axis="channels"), TypeError, ["channels"]),
    ("momentum above 1", lambda: train(momentum=5), ValueError, ["5", "OLD"]),
    ("momentum below 0", lambda: train(momentum=-0.1), ValueError, ["-0.1"]),
    ("momentum nan", lambda: train(momentum=float("nan")), ValueError, ["nan"]),
    ("momentum an array above 1", lambda: train(momentum=jnp.float32(1.5)), ValueError, ["1.5"]),
    ("momentum a word", lambda: train(momentum="fast"), TypeError, ["fast"]),
    (
        "momentum in update_state",
        lambda: jbn.update_state(STATE, MOMENTS, momentum=2),
        ValueError,
        ["2"],
    ),
    ("eps zero", lambda: train(eps=0), ValueError, ["eps is 0"]),
    ("eps negative", lambda: train(eps=-1e-3), ValueError, ["-0.001"]),
    ("eps nan in eval", lambda: evaluate(eps=float("nan")), ValueError, ["nan"]),
    ("eps infinite", lambda: train(eps=np.inf), ValueError, ["inf", "finite"]),
    ("eps None", lambda: train(eps=None), TypeError, ["None"]),
    ("eps 0 in float32", lambda: train(eps=1e-46), ValueError, ["1e-46", "float32", "1e-5"]),
    ("eps subnormal in float32", lambda: evaluate(eps=1e-40), ValueError, ["1e-40", "float32"]),
    ("eps per feature", lambda: train(eps=np.full(4, 1e-5)), ValueError, ["(4,)", "scalar"]),
    ("eps of one element", lambda: evaluate(eps=jnp.ones(1)), ValueError, ["(1,)", "scalar"]),
    ("eps a number in a string", lambda: train(eps="1e-5"), TypeError, ["'1e-5'", "number"]),
    ("eps a bool", lambda: evaluate(eps=True), TypeError, ["True", "number"]),
    ("eps complex", lambda: train(eps=1e-5 + 0j), TypeError, ["(1e-05+0j)", "number"]),
    ("eps an array of bools", lambda: train(eps=jnp.array(True)), TypeError, ["number"]),
    (
        "eps per feature, traced",
        lambda: jax.jit(lambda eps: train(eps=eps))(jnp.ones(4)),
        ValueError,
        ["eps", "(4,)", "scalar"],
    ),
    ("momentum per feature", lambda: train(momentum=jnp.ones(4)), ValueError, ["(4,)", "scalar"]),
    (
        "momentum per feature, traced",
        lambda: jax.jit(lambda m: jbn.update_state(STATE, MOMENTS, momentum=m))(jnp.ones(4)),
        ValueError,
        ["momentum", "(4,)", "scalar"],
    ),
    (
        "momentum complex, traced",
        lambda: jax.jit(lambda momentum: train(momentum=momentum))(1j),
        TypeError,
        ["momentum", "number"],
    ),
    ("momentum a number in a string", lambda: train(momentum="0.9"), TypeError, ["'0.9'"]),
    ("momentum a list", lambda: train(momentum=[0.9]), TypeError, ["[0.9]", "list"]),
    ("momentum a bool", lambda: train(momentum=False), TypeError, ["False", "number"]),
    ("momentum too large", lambda: train(momentum=10**400), ValueError, ["momentum"]),
    ("r_max in a string", lambda: renorm(r_max="3", d_max=5), TypeError, ["r_max", "'3'"]),
    ("r_max per feature", lambda: renorm(r_max=jnp.ones(4), d_max=5), ValueError, ["(4,)"]),
    ("d_max None", lambda: renorm(r_max=3, d_max=None), TypeError, ["d_max", "None"]),
    ("d_max negative", lambda: renorm(r_max=3, d_max=-1), ValueError, ["d_max is -1"]),
    ("unbiased a word", lambda: train(unbiased="yes"), TypeError, ["unbiased", "'yes'"]),
    (
        "skip_nonfinite traced",
        lambda: jax.jit(lambda skip: train(skip_nonfinite=skip))(True),
        TypeError,
        ["skip_nonfinite", "before tracing"],
    ),
    (
        "unbiased a word in update_state",
        lambda: jbn.update_state(STATE, MOMENTS, unbiased="no"),
        TypeError,
        ["unbiased", "'no'"],
    ),
    (
        "weights of another batch",
        lambda: train(weights=jnp.ones((5, 1))),
        ValueError,
        ["(5, 1)", "(6, 4)"],
    ),
    (
        "weights per example, rank 1",
        lambda: train(weights=jnp.ones(6)),
        ValueError,
        ["(6,)", "(6, 4)"],
    ),
    (
        "weights of higher rank",
        lambda: train(weights=jnp.ones((1, 6, 4))),
        ValueError,
        ["(1, 6, 4)"],
    ),
    (
        "integer weights",
        lambda: train(weights=jnp.ones((6, 1), jnp.int32)),
        TypeError,
        ["int32", "bool"],
    ),
    ("weights a list", lambda: train(weights=[1.0, 0.5]), TypeError, ["list", "[1.0, 0.5]"]),
    (
        "weights in moments",
        lambda: jbn.moments(X, weights=jnp.ones((2, 4))),
        ValueError,
        ["(2, 4)"],
    ),
    (
        "residual of another shape",
        lambda: train(residual=jnp.ones((6, 1))),
        ValueError,
        ["(6, 1)", "(6, 4)"],
    ),
    ("residual broadcast", lambda: evaluate(residual=jnp.ones(4)), ValueError, ["(4,)", "(6, 4)"]),
    ("integer residual", lambda: train(residual=jnp.ones((6, 4), jnp.uint8)), TypeError, ["uint8"]),
    ("virtual batch not dividing", lambda: train(virtual_batch_size=4), ValueError, ["4", "6"]),
    ("virtual batch zero", lambda: train(virtual_batch_size=0), ValueError, ["is 0"]),
    ("virtual batch larger", lambda: train(virtual_batch_size=12), ValueError, ["12", "6"]),
    ("virtual batch a float", lambda: train(virtual_batch_size=1.5), TypeError, ["1.5"]),
    (
        "virtual batch along the feature axis",
        lambda: jbn.batch_norm_train(X.T, PARAMS, STATE, axis=0, virtual_batch_size=2),
        ValueError,
        ["2", "(0,)"],
    ),
    (
        "unknown implementation",
        lambda: train(implementation="cudnn"),
        ValueError,
        ["cudnn", "triton"],
    ),
    (
        "implementation in eval",
        lambda: evaluate(implementation="XLA"),
        ValueError,
        ["'XLA'", "'xla'"],
    ),
    ("activation by name", lambda: train(activation="relu"), TypeError, ["'relu'", "jax.nn.relu"]),
    ("activation a number", lambda: evaluate(activation=2), TypeError, ["2"]),
    (
        "axis_name not bound",
        lambda: train(axis_name="devices"),
        ValueError,
        ["devices", "shard_map"],
    ),
    ("axis_name not bound, one of two", lambda: train(axis_name=("a", "b")), ValueError, ["'a'"]),
    (
        "axis_name in psum_moments",
        lambda: jbn.psum_moments(MOMENTS, "devices"),
        ValueError,
        ["devices"],
    ),
    (
        "groups without axis_name",
        lambda: train(axis_index_groups=[[0, 1]]),
        ValueError,
        ["[[0, 1]]"],
    ),
    ("integer dtype", lambda: train(dtype=jnp.int32), TypeError, ["int32"]),
    ("dtype unknown", lambda: train(dtype="banana"), TypeError, ["'banana'", "jnp.float32"]),
    ("dtype a number", lambda: evaluate(dtype=32), TypeError, ["32", "jnp.float32"]),
    ("param_dtype None", lambda: jbn.init(4, param_dtype=None), TypeError, ["None"]),
    ("param_dtype unknown", lambda: jbn.init(4, param_dtype="b16"), TypeError, ["'b16'"]),
    ("axis_name a list", lambda: train(axis_name=["i"]), TypeError, ["['i']", "tuple"]),
    ("axis_name a dict", lambda: train(axis_name={"i": 1}), TypeError, ["{'i': 1}"]),
    ("axis_name of a list", lambda: train(axis_name=("i", [])), TypeError, ["('i', [])"]),
    (
        "axis_name an int",
        lambda: jax.vmap(lambda x: train_x(x, axis_name=3), axis_name=3)(X[:, None]),
        TypeError,
        ["3", "position"],
    ),
    ("groups a number", lambda: in_groups(2), TypeError, ["axis_index_groups is 2", "[[0, 1]"]),
    ("groups of floats", lambda: in_groups([[0.0, 1.0]]), TypeError, ["[[0.0, 1.0]]"]),
    ("groups not nested", lambda: in_groups([0, 1]), TypeError, ["[0, 1]"]),
    ("groups that leave one out", lambda: in_groups([[0, 1, 2]]), ValueError, ["0 to 5"]),
    ("groups that overlap", lambda: in_groups([[0, 1, 2], [2, 3, 4, 5]]), ValueError, ["0 to 5"]),
    ("integer dtype in eval", lambda: evaluate(dtype=bool), TypeError, ["bool"]),
    ("features zero", lambda: jbn.init(0), ValueError, ["0"]),
    ("features negative", lambda: jbn.init((3, -2)), ValueError, ["(3, -2)"]),
    ("features empty", lambda: jbn.init(()), ValueError, ["()"]),
    ("features a float", lambda: jbn.init(2.5), TypeError, ["2.5"]),
    ("features a bool", lambda: jbn.init(True), TypeError, ["True"]),
    ("use_scale a string", lambda: jbn.init(4, use_scale="no"), TypeError, ["use_scale", "'no'"]),
    ("scale_init None", lambda: jbn.init(4, scale_init=None), TypeError, ["scale_init", "None"]),
    ("key an int", lambda: jbn.init(4, key=3), TypeError, ["key", "3", "jax.random.key"]),
    ("axis a bool", lambda: train(axis=True), TypeError, ["True"]),
    ("psum over nothing", lambda: jbn.psum_moments(MOMENTS, None), TypeError, ["None"]),
    ("param_dtype an integer", lambda: jbn.init(4, param_dtype=jnp.int32), TypeError, ["int32"]),
    ("merging a tuple", lambda: jbn.merge_moments(MOMENTS, (1, 2, 3)), TypeError, ["(1, 2, 3)"]),
    ("merging a state", lambda: jbn.merge_moments(STATE, MOMENTS), TypeError, ["State"]),
    (
        "merging other features",
        lambda: jbn.merge_moments(MOMENTS, jbn.moments(X.T)),
        ValueError,
        ["(4,)", "(6,)"],
    ),
    ("updating by a tuple", lambda: jbn.update_state(STATE, (1, 2, 3)), TypeError, ["(1, 2, 3)"]),
    (
        "updating moments",
        lambda: jbn.update_state(MOMENTS, MOMENTS),
        TypeError,
        ["Moments", "State"],
    ),
    (
        "updating other features",
        lambda: jbn.update_state(STATE, jbn.moments(X.T)),
        ValueError,
        ["(4,)", "(6,)"],
    ),
    ("psum of an array", lambda: jbn.psum_moments(X, "devices"), TypeError, ["Moments"]),
    (
        "normalize by a list",
        lambda: jbn.normalize(X, [0.0], jnp.ones(4), PARAMS),
        TypeError,
        ["mean", "[0.0]"],
    ),
    (
        "normalize by an integer var",
        lambda: jbn.normalize(X, jnp.ones(4), jnp.ones(4, int), PARAMS),
        TypeError,
        ["var", "int32"],
    ),
    (
        "normalize by a wide mean",
        lambda: jbn.normalize(X, jnp.ones(7), jnp.ones(4), PARAMS),
        ValueError,
        ["mean", "(7,)"],
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "contains"), [pytest.param(*line[1:], id=line[0]) for line in TABLE]
)
def test_error(call, error, contains):
    before = jax.tree.map(np.array, (X, PARAMS, STATE, MOMENTS))
    with pytest.raises(error) as raised:
        call()
    for part in contains:
        assert part in str(raised.value)
    jax.tree.map(np.testing.assert_array_equal, before, (X, PARAMS, STATE, MOMENTS))


def test_an_unbound_axis_keeps_the_cause():
    with pytest.raises(ValueError, match="devices") as raised:
        train(axis_name="devices")
    assert isinstance(raised.value.__cause__, NameError)


def test_checks_come_before_tracing_too():
    """Shapes and dtypes are known under jit: the same errors."""
    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        jax.jit(lambda x: train_x(x, weights=jnp.ones((5, 1))))(X)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        jax.jit(train_x)(X[:1])


@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_traced_numbers_are_not_checked(name):
    y, _ = jax.jit(lambda value: train(**{name: value}))(1.5)
    assert np.isfinite(y).all()


ALLOWED = [
    ("one value and weights", lambda: train_x(X[:1], weights=jnp.ones((1, 1)))[0], PARAMS.bias),
    ("one value in eval", lambda: jbn.batch_norm_eval(X[:1], PARAMS, STATE, eps=3.0), X[:1] / 2),
    ("rank 1 in eval", lambda: jbn.batch_norm_eval(X[0], PARAMS, STATE, eps=3.0), X[0] / 2),
    (
        "one value and axis_name",
        lambda: jax.vmap(lambda x: train_x(x, axis_name="i")[0], axis_name="i")(X)[:, None],
        None,
    ),
    (
        "rank 1 and axis_name",
        lambda: jax.vmap(lambda x: train_x(x, axis_name="i")[0], axis_name="i")(X),
        None,
    ),
    (
        "virtual_batch_size an array",
        lambda: train(virtual_batch_size=jnp.int32(3))[0],
        train(virtual_batch_size=3)[0],
    ),
    ("momentum 0", lambda: train(momentum=0)[1].mean, MOMENTS.mean),
    ("momentum 1", lambda: train(momentum=1)[1].mean, STATE.mean),
    ("momentum a NumPy scalar", lambda: train(momentum=np.float64(0))[1].mean, MOMENTS.mean),
    ("no features", lambda: jbn.moments(jnp.ones((8, 0))).mean, jnp.zeros(0)),
    ("no features, no values", lambda: jbn.moments(jnp.ones((0, 0))).m2, jnp.zeros(0)),
    (
        "a narrow state in eval",
        lambda: evaluate_narrow(jnp.bfloat16),
        jbn.batch_norm_eval(X, PARAMS, STATE),
    ),
]


@pytest.mark.parametrize(
    ("call", "expected"), [pytest.param(*line[1:], id=line[0]) for line in ALLOWED]
)
def test_the_edge_of_an_error_is_allowed(call, expected):
    if expected is None:
        expected = train()[0].reshape(call().shape)
    np.testing.assert_allclose(
        call(), np.broadcast_to(expected, call().shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.x64
def test_eps_is_compared_with_the_dtype_of_the_statistics():
    x = jnp.asarray(X, jnp.float64)
    y, _ = jbn.batch_norm_train(x, *jbn.init(4), eps=1e-50)
    np.testing.assert_allclose(np.std(y, 0), 1, rtol=1e-12)
    with pytest.raises(ValueError, match="1e-310"):
        jbn.batch_norm_train(x, *jbn.init(4), eps=1e-310)
