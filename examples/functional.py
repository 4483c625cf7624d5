"""The network of digits.py again, with the functional API alone: pytrees, and one jax.jit per step.

python examples/functional.py
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbn

BLOCKS = ((16, 1), (32, 2), (32, 1))  # features and stride of each residual block


def init(key):
    """All parameters in one tree, and the states of all batch norms in another."""
    kernels, norms, features = {}, {}, 16
    keys = iter(jax.random.split(key, 2 + 3 * len(BLOCKS)))

    def kernel(name, size, n_in, n_out):
        kernels[name] = jax.random.normal(next(keys), (size, size, n_in, n_out)) * np.sqrt(
            2 / (size * size * n_in)
        )

    kernel("stem", 3, 1, features)
    norms["stem"] = jbn.init(features)
    for i, (n_out, stride) in enumerate(BLOCKS):
        kernel(f"{i}a", 3, features, n_out)
        kernel(f"{i}b", 3, n_out, n_out)
        if stride > 1:
            kernel(f"{i}skip", 1, features, n_out)
        norms[f"{i}a"], norms[f"{i}b"] = jbn.init(n_out), jbn.init(n_out)
        features = n_out
    dense = {
        "kernel": jax.random.normal(next(keys), (features, 10)) * features**-0.5,
        "bias": jnp.zeros(10),
    }
    params = {
        "kernels": kernels,
        "norms": {name: p for name, (p, _) in norms.items()},
        "dense": dense,
    }
    return params, {name: s for name, (_, s) in norms.items()}


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def forward(params, states, x, train):
    """Logits and new states. train, a bool: by the statistics of the batch, or the running ones."""
    kernels, new_states = params["kernels"], dict(states)

    def norm(name, x, residual=None):
        arguments = {"residual": residual, "activation": jax.nn.relu}
        if not train:
            return jbn.batch_norm_eval(x, params["norms"][name], states[name], **arguments)
        y, new_states[name] = jbn.batch_norm_train(
            x, params["norms"][name], states[name], momentum=0.9, **arguments
        )
        return y

    x = norm("stem", conv(x, kernels["stem"]))
    for i, (_, stride) in enumerate(BLOCKS):
        y = norm(f"{i}a", conv(x, kernels[f"{i}a"], stride))
        skip = conv(x, kernels[f"{i}skip"], stride) if stride > 1 else x
        x = norm(f"{i}b", conv(y, kernels[f"{i}b"]), residual=skip)
    return x.mean((1, 2)) @ params["dense"]["kernel"] + params["dense"]["bias"], new_states


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    images, labels = digits.images[order, ..., None].astype(np.float32) / 16, digits.target[order]
    split = int(0.8 * len(labels))

    params, states = init(jax.random.key(args.seed))
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.2, args.steps), momentum=0.9)

    def loss_fn(params, states, x, label):
        logits, states = forward(params, states, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), states

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, states, opt_state, x, label):
        (loss, states), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, states, x, label)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), states, opt_state, loss

    opt_state, rng = optimizer.init(params), np.random.default_rng(args.seed)
    for _ in (bar := tqdm(range(args.steps), desc="compiling")):
        batch = rng.integers(split, size=128)
        params, states, opt_state, loss = step(
            params, states, opt_state, images[batch], labels[batch]
        )
        bar.set_description("training", refresh=False)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    predict = jax.jit(
        lambda params, states, x: forward(params, states, x, train=False)[0].argmax(-1)
    )
    accuracy = (predict(params, states, images[split:]) == labels[split:]).mean()
    count = states["stem"].count
    print(f"running statistics of {count} batches, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
