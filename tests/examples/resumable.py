"""A training run that may be killed at any moment: `python resumable.py FOLDER STEPS`.

Each step's checkpoint is written beside the last and renamed into place, so that what exists is
whole.  Prints "step N" once checkpoint N is in place, and at the end the digest of everything it
holds.
"""

import hashlib
import os
import pathlib
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

import jbn

FEATURES = 8


def initial():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(FEATURES, FEATURES)), jnp.float32)
    params, state = jbn.init(FEATURES)
    return {"kernel": kernel, "params": params, "state": state, "step": jnp.int32(0)}


@jax.jit
def train_step(run):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), run["step"]), (16, FEATURES))

    def loss(learned):
        kernel, params = learned
        y, state = jbn.batch_norm_train(x @ kernel, params, run["state"], activation=jax.nn.relu)
        return jnp.square(y - x).mean(), state

    learned = run["kernel"], run["params"]
    gradients, state = jax.grad(loss, has_aux=True)(learned)
    kernel, params = jax.tree.map(lambda p, d: p - 0.1 * d, learned, gradients)
    return {"kernel": kernel, "params": params, "state": state, "step": run["step"] + 1}


def save(folder, run):
    part, whole = folder / "part", folder / "checkpoint"
    with part.open("wb") as file:
        file.write(flax.serialization.to_bytes(run))
        file.flush()
        os.fsync(file.fileno())
    part.replace(whole)  # atomic


def restore(folder):
    whole = folder / "checkpoint"
    run = initial()
    return flax.serialization.from_bytes(run, whole.read_bytes()) if whole.exists() else run


def digest(run):
    leaves = jax.tree.leaves(run)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def main(folder, steps):
    run = restore(folder)
    print(f"resumed at {int(run['step'])}", flush=True)
    while run["step"] < steps:
        run = train_step(run)
        save(folder, run)
        print(f"step {int(run['step'])}", flush=True)
    print(digest(run), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
