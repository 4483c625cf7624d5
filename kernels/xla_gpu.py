"""The four functions in jax.numpy, placed for XLA:GPU."""

from jbn.kernels.xla import bwd_apply, bwd_stats, fwd_apply, fwd_stats

__all__ = ["bwd_apply", "bwd_stats", "fwd_apply", "fwd_stats"]
