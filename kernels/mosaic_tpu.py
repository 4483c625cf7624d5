"""The four functions as Pallas kernels for TPU, and a whole pass in one kernel where x fits VMEM.

They are for batch norm on its own: beside a convolution XLA's fusions are better (xla_tpu.py).

x is read as [outer, inner, channels] or [outer, channels, inner] (mosaic_tpu_blocks), depending on
how XLA:TPU lays it out in memory.  k per-channel vectors are an array [k, 1, channels] or
[k, channels, 1].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir

from jbn.kernels import mosaic_tpu_blocks
from jbn.kernels import mosaic_tpu_bodies as bodies
from jbn.kernels.mosaic_tpu_blocks import RowBlocks
from jbn.kernels.seam import Affine, Device, Stats, StatsGradient
from jbn.kernels.shared_gpu import launch_primitive
from jbn.kernels.shared_pallas import channels_last, out_like, too_long


def unsupported(shape: tuple[int, ...], dtype, axis: tuple[int, ...]) -> str | None:
    """Why these kernels cannot take x, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {jnp.dtype(dtype).name}"
    if reason := channels_last(shape, axis):
        return reason
    blocks = mosaic_tpu_blocks.stream(shape, jnp.dtype(dtype).itemsize)
    return too_long(blocks.outer, blocks.inner, blocks.channels)


def unsupported_device(kind: str) -> str | None:
    """Why a device cannot run these kernels: every TPU can."""
    del kind
    return None


def fwd_stats(
    x: Array, shift: Array, weights: Array | None, *, axis: tuple[int, ...], interpret: bool
) -> Stats:
    """Count, mean and m2 of each channel, by one read of x. No guess of the mean is needed."""
    del shift
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = mosaic_tpu_blocks.stream(x.shape, x.dtype.itemsize)
    found = _call(
        bodies.fwd_stats,
        (_view(x, blocks),),
        (_vector(x, blocks),) * 3,
        blocks,
        sums=True,
        interpret=interpret,
    )
    return _stats(found, blocks)


def fwd_apply(
    x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype, interpret: bool
) -> Array:
    """y = activation((x - shift) * gain + bias + residual)."""
    assert axis == (x.ndim - 1,)
    blocks = mosaic_tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(bodies.fwd_apply, activation=activation)
    operands = (_view(x, blocks), _view(residual, blocks), _stacked(affine, blocks))
    (y,) = _call(body, operands, (_rows(x, blocks, dtype),), blocks, interpret=interpret)
    return _unview(y, x, blocks)


def bwd_stats(
    x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation, interpret: bool
) -> tuple[Array, Array]:
    """The per-channel sums of dz and of dz * (x - shift), by one read of x and dy."""
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = mosaic_tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(bodies.bwd_stats, activation=activation)
    operands = (*(_view(a, blocks) for a in (x, dy, saved)), _stacked(affine, blocks))
    sum_dz, sum_dz_x = _call(
        body, operands, (_vector(x, blocks),) * 2, blocks, sums=True, interpret=interpret
    )
    return sum_dz.reshape(-1), sum_dz_x.reshape(-1)


def bwd_apply(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    stats_gradient: StatsGradient | None,
    saved,
    weights,
    axis,
    activation,
    residual_dtype,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """(dx, dz): dx = gain * dz + intercept + slope * (x - shift); dz in residual_dtype or None."""
    assert weights is None
    assert axis == (x.ndim - 1,)
    blocks = mosaic_tpu_blocks.stream(x.shape, x.dtype.itemsize)
    body = functools.partial(bodies.bwd_apply, activation=activation)
    operands = (
        *(_view(a, blocks) for a in (x, dy, saved)),
        _stacked(affine, blocks),
        None if stats_gradient is None else _stacked(stats_gradient, blocks),
    )
    results = (
        _rows(x, blocks, x.dtype),
        None if residual_dtype is None else _rows(x, blocks, residual_dtype),
    )
    dx, dresidual = _call(body, operands, results, blocks, interpret=interpret)
    return _unview(dx, x, blocks), _unview(dresidual, x, blocks)


def fwd_fused(
    x: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    eps: Array,
    *,
    axis,
    activation,
    dtype,
    device: Device,
    interpret: bool,
) -> tuple[Array, Stats] | None:
    """y and the statistics by one read of x and one write of y.

    None where 128 channels do not fit VMEM.
    """
    assert axis == (x.ndim - 1,)
    arrays, vmem_bytes = (
        2 if residual is None else 3,
        mosaic_tpu_blocks.VMEM_BYTES.get(device.kind, 0),
    )
    blocks = mosaic_tpu_blocks.resident(x.shape, _itemsize(x, residual, dtype), arrays, vmem_bytes)
    if blocks is None:
        return None
    body = functools.partial(bodies.fwd_fused, activation=activation)
    operands = (
        _view(x, blocks),
        _view(residual, blocks),
        _stacked((scale, bias), blocks),
        jnp.reshape(eps, (1,)),
    )
    results = (_rows(x, blocks, dtype), *(_vector(x, blocks),) * 3)
    y, *found = _call(
        body, operands, results, blocks, scratch=3, vmem_bytes=vmem_bytes, interpret=interpret
    )
    return _unview(y, x, blocks), _stats(found, blocks)


def bwd_fused(
    x: Array,
    dy: Array,
    affine: Affine,
    *,
    offset: Array,
    rstd: Array,
    d_stats: tuple[Array, Array],
    saved: Array | None,
    axis,
    activation,
    residual_dtype,
    device: Device,
    interpret: bool,
) -> tuple[Array, Array | None, Array, Array] | None:
    """(dx, dresidual, sum dz, sum dz * (x - shift)) by one read of x and dy.

    None where 128 channels do not fit VMEM.  d_stats: the cotangents of the batch's mean and biased
    variance.
    """
    assert axis == (x.ndim - 1,)
    vmem_bytes = mosaic_tpu_blocks.VMEM_BYTES.get(device.kind, 0)
    arrays = 3 + (saved is not None) + (residual_dtype is not None)
    blocks = mosaic_tpu_blocks.resident(
        x.shape, _itemsize(x, dy, saved, residual_dtype), arrays, vmem_bytes
    )
    if blocks is None:
        return None
    body = functools.partial(bodies.bwd_fused, activation=activation)
    operands = (
        *(_view(a, blocks) for a in (x, dy, saved)),
        _stacked(affine, blocks),
        _stacked((offset, rstd, *d_stats), blocks),
    )
    results = (
        _rows(x, blocks, x.dtype),
        None if residual_dtype is None else _rows(x, blocks, residual_dtype),
        *(_vector(x, blocks),) * 2,
    )
    dx, dresidual, sum_dz, sum_dz_x = _call(
        body, operands, results, blocks, scratch=2, vmem_bytes=vmem_bytes, interpret=interpret
    )
    return (
        _unview(dx, x, blocks),
        _unview(dresidual, x, blocks),
        sum_dz.reshape(-1),
        sum_dz_x.reshape(-1),
    )


def _call(
    body, operands, results, blocks: RowBlocks, *, interpret, sums=False, scratch=0, vmem_bytes=None
):
    """Run body on every block: views by rows, stacked vectors by channels only, rank 1 whole; None
    stays None.

    sums: whether results are gathered over the rows, which then are taken in sequence.
    scratch: vectors of scratch memory for body.
    """
    vectors = lambda k: blocks.arranged(k, 1, blocks.block_channels)
    by_channels = lambda c, i, j: blocks.arranged(0, 0, c)

    def spec(array):
        if array.ndim == 1:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        if array.shape == blocks.view:
            return pl.BlockSpec(blocks.block, lambda c, i, j: blocks.arranged(i, j, c))
        return pl.BlockSpec(vectors(array.shape[0]), by_channels)

    in_specs, out_specs = jax.tree.map(spec, (operands, results))
    order = "arbitrary" if sums else "parallel"
    run = functools.partial(
        pl.pallas_call,
        functools.partial(body, blocks=blocks),
        grid=blocks.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(vectors(scratch), jnp.float32)] if scratch else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", order, order), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * math.prod(blocks.view),
            transcendentals=0,
            bytes_accessed=sum(
                a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, results))
            ),
        ),
        interpret=interpret,
        name=getattr(body, "func", body).__name__,
    )
    # The interpreter that simulates memory has effects, which a primitive would have to declare.
    if interpret is not True:
        return run(out_shape=results)(*operands)
    leaves, tree = jax.tree.flatten(operands)
    out = _interpreted.bind(*leaves, launch=_Interpreted(run, tree, results))
    return jax.tree.unflatten(jax.tree.structure(results), out)


class _Interpreted(NamedTuple):
    """A kernel as a function of the leaves of its operands, for `launch_primitive`."""

    run: Callable  # pallas_call without the types of its results
    tree: Any
    results: tuple
    interpret: bool = True
    batchable: bool = True

    # Types and specs have no hash of their own, and a launch is used once.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @property
    def shapes(self):
        return tuple(result.shape for result in jax.tree.leaves(self.results))

    def __call__(self, *leaves):
        # What varies over manual mesh axes no longer does when the launch is lowered.
        typed = lambda result: out_like(leaves[0], result.shape, result.dtype)
        call = self.run(out_shape=jax.tree.map(typed, self.results))
        return jax.tree.leaves(call(*jax.tree.unflatten(self.tree, leaves)))


def _lower(context, launch, *operands):
    return mlir.lower_fun(launch, multiple_results=True)(context, *operands)


_interpreted = launch_primitive("jbn_mosaic_tpu_interpreted", _lower)


def _view(array, blocks):
    return None if array is None else array.transpose(blocks.order).reshape(blocks.view)


def _unview(array, x, blocks) -> Any:
    if array is None:
        return None
    transposed = array.reshape(tuple(x.shape[a] for a in blocks.order))
    return transposed.transpose(tuple(map(blocks.order.index, range(x.ndim))))


def _rows(x, blocks, dtype):
    return out_like(x, blocks.view, dtype)


def _vector(x, blocks):
    return out_like(x, blocks.arranged(1, 1, blocks.channels), jnp.float32)


def _stacked(vectors, blocks):
    return jnp.stack(vectors).reshape(blocks.arranged(len(vectors), 1, blocks.channels))


def _stats(found, blocks):
    shift, offset, m2 = (v.reshape(-1) for v in found)
    return Stats(jnp.full_like(shift, float(blocks.outer * blocks.inner)), shift, offset, m2)


def _itemsize(*arrays_or_dtypes):
    """Of the widest; None is skipped."""
    return max(
        jnp.dtype(getattr(a, "dtype", a)).itemsize for a in arrays_or_dtypes if a is not None
    )
