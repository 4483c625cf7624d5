"""Kernels that XLA cannot look into, for tests of partitioning.

A Pallas kernel in interpret mode is ordinary HLO, which XLA partitions by itself, so a test on it
shows nothing.  Here x passes through a LAPACK custom call first (x = QR), which XLA can only run on
one device, after gathering x.
"""

import functools

import jax

from jbn.kernels import triton, xla

IMPLEMENTATION = "triton/interpret"


def install(monkeypatch):
    """Put opaque kernels in the place of `IMPLEMENTATION`, and return its name."""
    for name in ("fwd_stats", "fwd_apply", "bwd_stats", "bwd_apply"):
        monkeypatch.setattr(triton, name, functools.partial(_opaque, getattr(xla, name)))
    return IMPLEMENTATION


def _opaque(function, x, *args, interpret, **kwargs):
    assert interpret
    q, r = jax.lax.linalg.qr(x.reshape(-1, x.shape[-1]), full_matrices=False)
    return function((q @ r).reshape(x.shape), *args, **kwargs)
