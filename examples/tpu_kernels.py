"""The TPU kernels through the functional API: checked against float64 NumPy, and timed where there
is a TPU.

python examples/tpu_kernels.py

Run it on a TPU VM. Elsewhere it takes small arrays in Pallas' interpret mode, and times nothing.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import jbn

ON_TPU = jax.default_backend() == "tpu"
IMPLEMENTATION = "mosaic_tpu" if ON_TPU else "mosaic_tpu/interpret"
SHAPES = (
    [(128, 28, 28, 512), (128, 56, 56, 64), (100_000, 96)]
    if ON_TPU
    else [(8, 7, 7, 128), (128, 2, 3, 24), (1000, 96)]
)


def layer(x, params, residual, implementation):
    """Batch norm + residual + ReLU from a fresh state."""
    state = jbn.State(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]), jnp.int32(0))
    return jbn.batch_norm_train(
        x,
        params,
        state,
        momentum=0.0,
        residual=residual,
        activation=jax.nn.relu,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def forward_backward(x, params, residual, dy, implementation):
    y, pull, state = jax.vjp(
        lambda *args: layer(*args, implementation), x, params, residual, has_aux=True
    )
    return y, state, pull(dy)


def oracle(x, params, residual, dy):
    """(y, mean, dx) in float64, by the formulas of Ioffe & Szegedy 2015."""
    x, scale, bias, residual, dy = (np.asarray(a, np.float64) for a in (x, *params, residual, dy))
    axes = tuple(range(x.ndim - 1))
    mean, rstd = x.mean(axes), 1 / np.sqrt(x.var(axes) + 1e-5)
    xhat = (x - mean) * rstd
    y = np.maximum(xhat * scale + bias + residual, 0)
    dz = np.where(y > 0, dy, 0)
    return y, mean, scale * rstd * (dz - dz.mean(axes) - xhat * (dz * xhat).mean(axes))


def median_seconds(function, *args, repeats=20):
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    print(
        f"{jax.devices()[0].device_kind}: implementation {IMPLEMENTATION!r}, "
        "batch norm + residual + ReLU, random normal data"
    )
    for shape in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            keys = jax.random.split(jax.random.key(0), 5)
            x, residual, dy = (jax.random.normal(key, shape, dtype) for key in keys[:3])
            x = (x + 3).astype(dtype)
            params = jbn.Params(
                *(jax.random.uniform(key, shape[-1:], minval=0.5) for key in keys[3:])
            )
            y, state, (dx, *_) = forward_backward(x, params, residual, dy, IMPLEMENTATION)
            errors = []
            for name, got, want in zip(
                ("y", "mean", "dx"),
                (y, state.mean, dx),
                oracle(x, params, residual, dy),
                strict=True,
            ):
                # A result is rounded once; where z is within rounding of 0, which side of ReLU it
                # is on may differ in dx.
                wrong = np.abs(np.asarray(got, np.float64) - want) > 2 * float(
                    jnp.finfo(got.dtype).eps
                ) * (np.abs(want) + 4)
                errors.append(f"{name} {wrong.mean():.1e}")
                assert wrong.mean() <= (1e-3 if name == "dx" else 0), (
                    f"{shape} {x.dtype}: {name} is not what the oracle says"
                )
            line = f"{x.dtype} {shape}: share off the oracle: {', '.join(errors)}"
            if ON_TPU:
                for implementation in (IMPLEMENTATION, None):
                    step = functools.partial(forward_backward, implementation=implementation)
                    milliseconds = 1e3 * median_seconds(step, x, params, residual, dy)
                    line += f"; {implementation or 'XLA'} {milliseconds:.3f} ms"
            print(line)


if __name__ == "__main__":
    main()
