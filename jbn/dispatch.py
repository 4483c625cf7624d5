"""Which implementation runs: chosen here and nowhere else, from static shapes and the platform the program is lowered for."""

from jbn.kernels import xla

# None and "xla" run XLA's own fusions everywhere until a kernel has been measured faster.
IMPLEMENTATIONS = {None: xla, "xla": xla}


def functions(implementation):
    """The module whose four functions serve this implementation."""
    return IMPLEMENTATIONS[implementation]
