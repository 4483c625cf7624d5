"""How a Mosaic GPU kernel is launched, or interpreted on any platform."""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import mlir

from jbn.kernels import shared_gpu as gpu
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.blocks import Ring

_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    # Of a sum across warps: 4 rows of a whole tile in float32.
    reduction_scratch_bytes=16384,
)


class Launch(NamedTuple):
    """One kernel call; hashable, so that it can be the parameter of a primitive."""

    kernel: Callable
    ring: Ring
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple
    scratch: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    interpret: bool

    def __call__(self, *operands):
        if self.interpret and jax.__version_info__ < (0, 11):
            raise NotImplementedError(
                "implementation 'mosaic_gpu/interpret' needs JAX 0.11: older interpreters know no TMA"
            )

        def body(*refs, **scratch):
            self.kernel(*refs, ring=self.ring, **dict(self.options), **scratch)

        body.__name__ = f"jbn{self.kernel.__name__.removesuffix('_kernel')}"
        return plgpu.kernel(
            body,
            out_type=[
                pallas.out_like(operands[0], *a) for a in zip(self.shapes, self.dtypes, strict=True)
            ],
            scratch_types=dict(self.scratch),
            grid=(self.ring.num_chunks, self.ring.num_columns),
            grid_names=("chunk", "column"),
            compiler_params=_PARAMS,
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,  # pyright: ignore[reportAttributeAccessIssue]
        )(*operands)


def _alone(launch, results, *operands):
    """Interpreted, one launch at a time in this process: the interpreter keeps one state for all."""

    def run(*operands):
        with _INTERPRETER:
            return [np.asarray(a) for a in _interpreted(*map(np.asarray, operands), launch=launch)]

    return jax.pure_callback(
        run, [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results], *operands
    )


_INTERPRETER = threading.Lock()


@functools.partial(jax.jit, static_argnames="launch")
def _interpreted(*operands, launch):
    return launch(*operands)


def _lower(context, launch, *operands):
    # The interpreter has side effects on a state of its own, which the transformations around it
    # need not know.
    run = functools.partial(_alone, launch, context.avals_out) if launch.interpret else launch
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


launch_p = gpu.launch_primitive("jbn_mosaic_gpu", _lower)
