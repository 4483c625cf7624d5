"""A model of flax's layers, from its first step to a file: switched, watched, recalibrated, folded.

python examples/whole_life.py        a linen and an nnx model of scikit-learn's digits

The norms train as jbn's (`replacing`, `replace`). A Monitor reads every step. Evaluation gets exact
statistics (`recalibrate`), then the norms go into the convolutions (`fold`). What is left is
written as StableHLO for any batch size, read back, and compared with the model that was trained.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn.linen
import jbn.nnx
from jbn import fold, health
from jbn.recalibrate import recalibrate_linen, recalibrate_nnx

BATCH, SPLIT, MOMENTUM = 64, 1200, 0.9
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class LinenNetwork(nn.Module):
    """Plain flax; the norm is an argument, as in most code, so that a folded one can stand in."""

    norm: Callable = nn.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), 2, use_bias=self.use_bias)(x)
            x = nn.relu(self.norm(use_running_average=not train, momentum=MOMENTUM)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class NnxNetwork(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs):
        sizes = ((1, 16), (16, 32))
        conv = lambda i, o: nnx.Conv(i, o, (3, 3), 2, use_bias=False, rngs=rngs)
        self.convs = nnx.List([conv(*size) for size in sizes])
        self.norms = nnx.List(
            [nnx.BatchNorm(out, momentum=MOMENTUM, rngs=rngs) for _, out in sizes]
        )
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def watched(step, batches, name):
    """Run `step`, which gives the metrics, on every batch; what the monitor says is printed."""
    monitor = health.Monitor()
    for index, batch in enumerate(tqdm(batches, desc=name)):
        for event in monitor.update(index, step(*batch)):
            tqdm.write(str(event))
    print(f"{name}: {len(monitor.events)} events, {len(monitor.active)} of them still active")


def linen_life(batches, images):
    """(the model in evaluation, the folded one): functions of images."""
    model = LinenNetwork()
    with jbn.linen.replacing(skip_nonfinite=True):
        variables = model.init(jax.random.key(0), images[:1], train=False)
        carry = variables, OPTIMIZER.init(variables["params"])

        @jax.jit
        def sgd(carry, x, labels):
            variables, state = carry

            def loss(params):
                given = {**variables, "params": params}
                logits, new = model.apply(given, x, train=True, mutable=["batch_stats"])
                return cross_entropy(logits, labels), new

            gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
            updates, state = OPTIMIZER.update(gradients, state)
            after = {"params": optax.apply_updates(variables["params"], updates), **new}
            return (after, state), health.metrics(after, previous=variables, momentum=MOMENTUM)

        def step(x, labels):
            nonlocal carry
            carry, metrics = sgd(carry, x, labels)
            return metrics

        watched(step, batches, "linen")
        evaluate = lambda variables, x: model.apply(variables, x, train=False)
        variables = recalibrate_linen(evaluate, carry[0], [x for x, _ in batches])
        pairs = fold.find_pairs(evaluate, variables, images[:2])
    folded = fold.fold_variables(variables, pairs)
    inference = LinenNetwork(norm=fold.FoldedNorm, use_bias=True)
    return (
        lambda x: evaluate(variables, x),
        lambda x: inference.apply(folded, x, train=False),
        len(pairs),
    )


def nnx_life(batches, images):
    """As linen_life."""
    model = jbn.nnx.replace(NnxNetwork(nnx.Rngs(0)), skip_nonfinite=True)
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, labels):
        before = nnx.to_pure_dict(nnx.state(model))
        gradients = nnx.grad(lambda model: cross_entropy(model(x), labels))(model)
        optimizer.update(model, gradients)
        return health.metrics(model, previous=before, momentum=MOMENTUM)

    watched(lambda x, labels: step(model, optimizer, x, labels), batches, "nnx")
    model.eval()
    recalibrate_nnx(model, [x for x, _ in batches])
    graph, state = nnx.split(model)
    pairs = fold.find_pairs(lambda state, x: nnx.merge(graph, state)(x), state, images[:2])
    return model, fold.fold_nnx(model, pairs), len(pairs)


def exported(function, path):
    """Write `function` of images, for any number of them, and read it back."""
    shape = (*jax.export.symbolic_shape("batch"), 8, 8, 1)
    program = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(shape, jnp.float32))
    path.write_bytes(program.serialize())
    path.with_suffix(".mlir").write_text(program.mlir_module())  # the same, to read
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of the files; else a temporary one"
    )
    arguments = parser.parse_args(arguments)
    out = arguments.out or pathlib.Path(tempfile.mkdtemp())
    out.mkdir(exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, labels = (images[order] / 16).reshape(-1, 8, 8, 1).astype(np.float32), labels[order]
    rows = rng.integers(0, SPLIT, (arguments.steps, BATCH))
    batches = [(images[row], labels[row]) for row in rows]
    test = images[SPLIT:]
    for name, life in (("linen", linen_life), ("nnx", nnx_life)):
        trained, folded, count = life(batches, images)
        path = out / f"{name}.stablehlo"
        program = exported(folded, path)
        # Two convolutions and a dense layer, each sum rounded in float32: 1e-4 of the output.
        proof = fold.certify(trained, program, [test, test[:7]])
        proof.require(1e-4 * proof.max_output)
        correct = np.asarray(program(test)).argmax(-1) == labels[SPLIT:]
        print(
            f"{name}: {count} norms folded, the file is off by {proof.max_error:.1e} of "
            f"{proof.max_output:.3g}, test accuracy {correct.mean():.4f}: {path}"
        )


if __name__ == "__main__":
    main()
