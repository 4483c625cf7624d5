"""How a Mosaic GPU kernel is launched, or interpreted on any platform."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jbn.kernels import shared_gpu as gpu
from jbn.kernels import shared_pallas as pallas
from jbn.kernels.blocks import PipelineTiles

_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    # A sum across warps needs 4 rows of a whole tile in float32.
    reduction_scratch_bytes=16384,
)


class Launch(NamedTuple):
    """One kernel call. It is hashable, so that it can be the parameter of a primitive."""

    kernel: Callable
    tiles: PipelineTiles
    shapes: tuple[tuple[int, ...], ...]  # of the results
    dtypes: tuple
    scratch: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    interpret: bool
    batchable: bool = True  # see shared_gpu.launch_primitive

    def __call__(self, *operands):
        if self.interpret and jax.__version_info__ < (0, 11):
            raise NotImplementedError(
                "implementation 'mosaic_gpu/interpret' needs JAX 0.11: older interpreters know no "
                f"TMA, and this is JAX {jax.__version__}"
            )

        def body(*refs, **scratch):
            self.kernel(*refs, tiles=self.tiles, **dict(self.options), **scratch)

        body.__name__ = f"jbn{self.kernel.__name__.removesuffix('_kernel')}"
        return plgpu.kernel(
            body,
            out_type=[
                pallas.out_like(operands[0], *a) for a in zip(self.shapes, self.dtypes, strict=True)
            ],
            scratch_types=dict(self.scratch),
            grid=(self.tiles.num_chunks, self.tiles.num_columns),
            grid_names=("chunk", "column"),
            compiler_params=_PARAMS,
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,  # pyright: ignore[reportAttributeAccessIssue]
        )(*operands)


def call(
    kernel: Callable,
    tiles: PipelineTiles,
    arrays: list[Array],
    vectors: list[Array],
    dtypes: tuple,
    others: tuple[tuple[tuple[int, ...], Any], ...],
    scratch: Iterable[tuple[str, Any]],
    *,
    interpret: bool,
    options: dict[str, Any],
    batchable: bool = True,
) -> list[Array]:
    """Run a kernel on arrays [rows, width] and on vectors.

    Args:
        kernel: the body. It gets references to arrays, vectors and results in this order, and by
            name `tiles`, the scratch memory and the options. The arrays and the results of their
            shape are [rows, 1, width] to the kernel (`PipelineTiles.slots` says why).
        tiles: how the programs share the arrays.
        arrays, vectors: the operands.
        dtypes: of the results that have the shape of the arrays.
        others: shape and dtype of the results after these.
        scratch: name and type of each piece of shared memory.
        interpret: run on any platform, by JAX's interpreter.
        options: static arguments of the body; hashable.
        batchable: whether vmap may turn the call into one launch with a larger grid.
    """
    shapes = ((tiles.rows, 1, tiles.width),) * len(dtypes) + tuple(shape for shape, _ in others)
    dtypes = tuple(jnp.dtype(dtype) for dtype in (*dtypes, *(dtype for _, dtype in others)))
    launch = Launch(
        kernel, tiles, shapes, dtypes, tuple(scratch), tuple(options.items()), interpret, batchable
    )
    results = launch_p.bind(*(a[:, None] for a in arrays), *vectors, launch=launch)
    return [a[:, 0] if a.ndim == 3 else a for a in results]


def _one_at_a_time(launch, result_avals, *operands):
    """Interpret a launch while no other is interpreted."""

    def interpret(*operands):
        return [np.asarray(a) for a in _interpreted(*map(np.asarray, operands), launch=launch)]

    def run(*operands):
        return _INTERPRETER.submit(interpret, *operands).result()

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in result_avals]
    return jax.pure_callback(run, shapes, *operands)


# A single thread, because the interpreter keeps one state for all launches. A thread of its own,
# because the caller's may be in the middle of a vmap, whose axis name the interpreter would take
# for one of the grid's.
_INTERPRETER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jbn_mosaic_gpu_interpreter")


@functools.partial(jax.jit, static_argnames="launch")
def _interpreted(*operands, launch):
    return launch(*operands)


def _lower(context, launch, *operands):
    if launch.interpret:
        _refuse_partitioned_callback(context.module_context)
        # The interpreter has side effects on a state of its own. Behind a callback the program
        # around it does not see them.
        run = functools.partial(_one_at_a_time, launch, context.avals_out)
    else:
        run = launch
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


def _refuse_partitioned_callback(module_context):
    """Raise where JAX would lose the interpreter's callback, and the process would end by SIGSEGV.

    custom_partitioning lowers the program of a shard to a module of its own, under the name below,
    and forgets that module's list of host callbacks.  The program then calls the first callback of
    an empty list.
    """
    name = ir.StringAttr(module_context.module.operation.attributes["sym_name"]).value
    if "tmp_xla_computation" in name:
        raise NotImplementedError(
            "implementation 'mosaic_gpu/interpret' cannot run in custom_partitioning, as under jit "
            "with x split over devices: use shard_map with axis_name, 'triton/interpret', or None"
        )


launch_p = gpu.launch_primitive("jbn_mosaic_gpu", _lower)
