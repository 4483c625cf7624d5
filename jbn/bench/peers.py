"""The libraries that compute the same thing, each used as its own documentation says."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbn.bench import peer_layers
from jbn.bench.cases import Problem
from jbn.kernels.backends import PLATFORMS, Implementation


class Peer(NamedTuple):
    """One way to run a problem.

    build(problem, input_sets) returns run(i), or None where the library has no such layout.  run
    starts the computation on input set i and returns what `wait` waits for; y comes first in it.
    """

    library: str
    implementation: str
    build: Callable[[Problem, int], Callable[[int], Any] | None]
    wait: Callable[[Any], None]

    @property
    def name(self) -> str:
        return f"{self.library} {self.implementation}".strip()


def find(backend: str, *, compiled: bool = True) -> tuple[list[Peer], list[str]]:
    """Every peer that can run here, flax.linen first, and the names of those that are not
    installed.

    Args:
        backend: `jax.default_backend()`.
        compiled: whether to include torch.compile, which takes some seconds for each problem.
    """
    peers = [
        jax_peer("flax.linen", "", peer_layers.flax_linen),
        jax_peer("flax.nnx", "", peer_layers.flax_nnx),
    ]
    for name in _implementations(backend):
        layer = functools.partial(peer_layers.jbn_linen, implementation=name)
        peers.append(jax_peer("jbn", name or "default", layer))
    missing = []
    for library, layer in (("haiku", peer_layers.haiku), ("equinox", peer_layers.equinox)):
        if importlib.util.find_spec(library):
            peers.append(jax_peer(library, "", layer))
        else:
            missing.append(library)
    if importlib.util.find_spec("torch"):
        from jbn.bench import peers_torch

        peers += [
            Peer("torch", name, build, peers_torch.wait)
            for name, build in peers_torch.builders(backend, compiled)
        ]
    else:
        missing.append("torch")
    return peers, missing


def copy(problem: Problem, input_sets: int) -> Callable[[int], Any]:
    """A pass that reads x and writes as much: the fastest way to move 2T on this device."""
    inputs = arrays(problem, input_sets)
    bits = jnp.uint16 if problem.dtype == "bfloat16" else jnp.uint32
    # Flips bits instead of computing: bfloat16 arithmetic is slow on CPUs.
    run = jit_as("copy", lambda x, mask: jax.lax.bitcast_convert_type(x, bits) ^ mask)
    mask = jnp.ones((1,) * len(problem.case.shape), bits)
    return lambda i: run(inputs[i % input_sets][0], mask)


@functools.lru_cache(maxsize=1)
def arrays(problem: Problem, input_sets: int) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(x, residual, dy) of each input set, the same values in all; x is drawn from N(0.5, 2), the
    others from N(0, 1).

    The same arrays for every peer of a problem: where in memory they lie is worth 20 % on CPU.
    """

    @jax.jit
    def draw(key):
        x, residual, dy = jax.random.normal(key, (3, *problem.case.shape), jnp.dtype(problem.dtype))
        return x * 2 + jnp.asarray(0.5, x.dtype), residual, dy

    first = draw(jax.random.key(0))
    return [first, *(jax.tree.map(jnp.copy, first) for _ in range(input_sets - 1))]


def module(peer: Peer) -> str:
    """The name of a JAX peer's compiled module after "jit_": profiles tell peers apart by it."""
    return "".join(c if c.isalnum() else "_" for c in peer.name)


def jax_function(problem: Problem, layer: peer_layers.Layer) -> Callable:
    """f(params, stats, x, residual, dy) of a problem, not jitted."""
    add = (lambda residual: residual) if problem.adds else (lambda residual: None)

    def forward(params, stats, x, residual, dy):
        del dy
        return layer.train(params, stats, x, add(residual))

    def evaluate(params, stats, x, residual, dy):
        del dy
        return layer.evaluate(params, stats, x, add(residual))

    def forward_backward(params, stats, x, residual, dy):
        train = lambda params, x, residual: layer.train(params, stats, x, residual)
        y, vjp, new_stats = jax.vjp(train, params, x, add(residual), has_aux=True)
        # As in a network: y is used elsewhere, and the backward pass begins when dy arrives.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, new_stats, vjp(dy)

    return {"forward": forward, "eval": evaluate, "forward_backward": forward_backward}[
        problem.mode
    ]


def jax_peer(
    library: str, implementation: str, make_layer: Callable[[Problem], peer_layers.Layer]
) -> Peer:
    """The peer that runs a layer under jit."""

    def build(problem, input_sets):
        layer = make_layer(problem)
        run = jit_as(module(peer), jax_function(problem, layer))
        inputs = arrays(problem, input_sets)
        return lambda i: run(layer.params, layer.stats, *inputs[i % input_sets])

    peer = Peer(library, implementation, build, jax.block_until_ready)
    return peer


def jit_as(name: str, fn: Callable) -> Callable:
    """jax.jit under a name, which the compiled module bears."""
    fn.__name__ = fn.__qualname__ = name
    return jax.jit(fn)


def _implementations(backend) -> Iterator[Implementation | None]:
    """What can run here; "xla" is the default itself where there is no kernel."""
    platform = "cuda" if backend == "gpu" else backend
    kernels: list[Implementation] = [k for k, places in PLATFORMS.items() if platform in places]
    yield None
    if kernels:
        yield from ("xla", *kernels)
