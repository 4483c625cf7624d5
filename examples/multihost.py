"""Train on several processes at once, with batch norm synchronized over all of them.

python examples/multihost.py                      start 2 processes here, 2 CPU devices each
srun -N 4 python examples/multihost.py --launched         one process of those that SLURM, Open MPI
                                                          or a TPU pod has started

There is nothing to say to jbn: the batch is one global array, split over the devices of all
processes, and its statistics are those of the whole. Every process ends with the same bits, and
prints a digest of them.
"""

import argparse
import hashlib
import itertools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn

BATCH, WIDTHS = 256, (64, 128, 64, 10)


def init(key):
    """Dense layers, all but the last with batch norm and relu: ((weights, norms), states)."""
    keys = jax.random.split(key, len(WIDTHS))
    weights = [
        jax.nn.initializers.he_normal()(k, s)
        for k, s in zip(keys, itertools.pairwise(WIDTHS), strict=False)
    ]
    norms, states = zip(*(jbn.init(width) for width in WIDTHS[1:-1]), strict=True)
    return (weights, list(norms)), list(states)


def apply(params, states, x):
    weights, norms = params
    new_states = []
    for weight, norm, state in zip(weights, norms, states, strict=False):
        x, state = jbn.batch_norm_train(
            x @ weight, norm, state, momentum=0.9, activation=jax.nn.relu
        )
        new_states.append(state)
    return x @ weights[-1], new_states


def train(steps):
    """Each process holds all digits and hands its devices their part of every batch.

    Returns:
        The last loss, the parameters and the states.
    """
    digits, rng = load_digits(), np.random.default_rng(0)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    distribute = lambda array: jax.make_array_from_callback(
        array.shape, split, lambda index: array[index]
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    start = jax.jit(
        lambda: init(jax.random.key(0)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    params, states = start()
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, states, opt_state, x, label):
        def loss_fn(params):
            logits, new_states = apply(params, states, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new_states

        (loss, states), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), states, opt_state, loss

    loss = jnp.nan
    for _ in (bar := tqdm(range(steps), desc="compiling", disable=jax.process_index() > 0)):
        rows = rng.choice(len(digits.target), BATCH, replace=False)
        x, label = (
            distribute(digits.data[rows].astype(np.float32) / 16),
            distribute(digits.target[rows]),
        )
        params, states, opt_state, loss = step(params, states, opt_state, x, label)
        bar.set_description("training", refresh=False)
    return float(loss), params, states


def report(loss, params, states, save):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, states))]
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).digest()
    process, processes = jax.process_index(), jax.process_count()
    where = f"process {process} of {processes}, {jax.device_count()} devices"
    print(f"{where}: loss {loss:.6f}, digest {digest.hex()}", flush=True)
    digests = np.atleast_2d(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)))
    assert (digests == digests[0]).all(), "the processes have different parameters or states"
    if process == 0:
        print(f"all {processes} processes agree in every bit of parameters and states", flush=True)
        if save:
            np.savez(save, *leaves)


def launch(processes, devices):
    """Start this script `processes` times; exit status 1 if any of them failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **environment}  # errors only
    command = lambda index: [sys.executable, *sys.argv, "--address", address, "--index", str(index)]
    children = [subprocess.Popen(command(index), env=environment) for index in range(processes)]
    codes = [child.wait() for child in children]
    return int(any(codes))


def keep_for_prints():
    """Leave standard output to `print`: Gloo, in C++, tells there of each connection."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--devices", type=int, default=2, help="CPU devices of each process started here"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", help="an .npz file for the parameters and states")
    parser.add_argument(
        "--launched", action="store_true", help="a cluster launcher has started this process"
    )
    parser.add_argument("--address", help="of process 0; set by the process that starts the others")
    parser.add_argument("--index", type=int, help="likewise")
    arguments = parser.parse_args()
    if not arguments.launched and arguments.address is None:
        sys.exit(launch(arguments.processes, arguments.devices))
    if arguments.launched:
        jax.distributed.initialize()
    else:
        keep_for_prints()
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.index)
    report(*train(arguments.steps), arguments.save)
