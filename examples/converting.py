"""Take trained batch norms of Equinox, Haiku, Keras and PyTorch over to jbn, and back again.

python examples/converting.py      one layer of each library that is installed, on digits

Each layer sees the same 20 batches of digits in its own library. It is then converted, and jbn
evaluates it on other digits.
"""

import argparse
import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn
from jbn import convert

FEATURES = 16


def flax(batches, test):
    from flax import nnx

    layer = nnx.BatchNorm(FEATURES, momentum=0.9, rngs=nnx.Rngs(0))
    for x in batches:
        layer(x)
    layer.eval()
    params, state = convert.from_nnx(nnx.to_pure_dict(nnx.state(layer)))
    return layer(test), params, state, convert.options(layer)


def torch(batches, test):
    import torch

    layer = torch.nn.BatchNorm1d(FEATURES)
    for x in batches:
        layer(torch.tensor(np.asarray(x)))
    layer.eval()
    params, state = convert.from_torch(layer.state_dict())
    y = layer(torch.tensor(np.asarray(test))).detach().numpy()
    return y, params, state, convert.options(layer)


def keras(batches, test):
    import keras

    layer = keras.layers.BatchNormalization()
    for x in batches:
        layer(x, training=True)
    params, state = convert.from_keras(layer)
    return np.asarray(layer(test, training=False)), params, state, convert.options(layer)


def equinox(batches, test):
    import equinox as eqx

    layer, old = eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, "batch", mode="batch")
    mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for x in batches:
        _, old = mapped(x, old)
    params, state = convert.from_equinox(layer, old)
    layer_off = eqx.nn.inference_mode(layer)
    mapped = jax.vmap(layer_off, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return mapped(test, old)[0], params, state, convert.options(layer)


def haiku(batches, test):
    import haiku as hk

    norm = hk.transform_with_state(
        lambda x, train: hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=train)
    )
    learned, old = norm.init(jax.random.key(0), batches[0], True)
    for x in batches:
        _, old = norm.apply(learned, old, None, x, True)
    params, state = convert.from_haiku(learned, old)
    return norm.apply(learned, old, None, test, False)[0], params, state, {"eps": 1e-5}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="batches that each layer sees")
    steps = parser.parse_args().steps
    images = jnp.asarray(load_digits(return_X_y=True)[0] / 16, jnp.float32)
    x = images @ jax.random.normal(jax.random.key(0), (64, FEATURES))
    batches, test = [x[64 * k : 64 * (k + 1)] for k in range(min(steps, 20))], x[1400:]
    for library in (bar := tqdm((flax, torch, keras, equinox, haiku))):
        bar.set_description(library.__name__)
        if importlib.util.find_spec(library.__name__) is None:
            bar.write(f"{library.__name__:8} is not installed")
            continue
        expected, params, state, options = library(batches, test)
        y = jbn.batch_norm_eval(test, params, state, eps=options["eps"])
        error = float(jnp.abs(y - jnp.asarray(np.asarray(expected))).max())
        bar.write(f"{library.__name__:8} largest difference of {y.size} outputs: {error:.1e}")
        assert error < 1e-4, f"the layer of {library.__name__} was not converted exactly"


if __name__ == "__main__":
    main()
