"""The four functions of a GPU backend, made from its kernels.

Here arrays are widened, vectors are stacked, and partial results are merged.  Also how a launch
becomes a primitive of JAX.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType

from jbn.kernels import shared_pallas as pallas
from jbn.kernels.seam import Affine, Stats, StatsGradient


class Backend(NamedTuple):
    """A kernel for each of the four functions, and how to launch them.

    Arrays reach a launch as [rows, width], where rows are put side by side until the width is a
    multiple of lanes(itemsize), if that is possible; vectors reach it as [vectors, width].

        reduce(kernel, arrays, vectors, num_results, interpret, **options)
            -> (tiles, partial results [num_chunks, width])
        map(kernel, arrays, vectors, dtypes, interpret, **options) -> results [rows, width]

    `tiles` tells how the rows were divided: by `rows`, `chunk_rows` and `num_chunks`.
    """

    fwd_stats_kernel: Callable
    fwd_apply_kernel: Callable
    bwd_stats_kernel: Callable
    bwd_apply_kernel: Callable
    lanes: Callable[[int], int]
    reduce: Callable
    map: Callable

    def fwd_stats(
        self,
        x: Array,
        shift: Array,
        weights: Array | None,
        *,
        axis: tuple[int, ...],
        interpret: bool,
    ) -> Stats:
        """Count, mean and m2 of each channel; the kernel chooses shifts of its own."""
        del shift, axis
        assert weights is None, "weighted statistics run on XLA"
        arrays, factor = self._widened(x)
        tiles, partials = self.reduce(self.fwd_stats_kernel, arrays, [], 3, interpret)
        rows = jnp.minimum(
            tiles.chunk_rows, tiles.rows - tiles.chunk_rows * jnp.arange(tiles.num_chunks)
        )
        counts = jnp.repeat(rows.astype(jnp.float32), factor)
        return pallas.merge(counts, *pallas.narrow(partials, factor))

    def fwd_apply(
        self,
        x: Array,
        affine: Affine,
        residual: Array | None,
        *,
        axis,
        activation,
        dtype,
        interpret: bool,
    ) -> Array:
        """y = activation((x - shift) * gain + bias + residual)."""
        del axis
        arrays, factor = self._widened(x, residual)
        vectors = [_stack(affine, factor)]
        (y,) = self.map(
            self.fwd_apply_kernel,
            arrays,
            vectors,
            (jnp.dtype(dtype),),
            interpret,
            activation=activation,
        )
        return y.reshape(x.shape)

    def bwd_stats(
        self,
        x: Array,
        dy: Array,
        affine: Affine,
        saved: Array | None,
        weights: Array | None,
        *,
        axis,
        activation,
        interpret: bool,
    ) -> tuple[Array, Array]:
        """The per-channel sums of dz and of dz * (x - shift)."""
        del axis
        assert weights is None, "weighted sums run on XLA"
        arrays, factor = self._widened(x, dy, saved)
        vectors = [_stack(affine, factor)]
        _, partials = self.reduce(
            self.bwd_stats_kernel, arrays, vectors, 2, interpret, activation=activation
        )
        sum_dz, sum_dz_x = (p.sum(0) for p in pallas.narrow(partials, factor))
        return sum_dz, sum_dz_x

    def bwd_apply(
        self,
        x: Array,
        dy: Array,
        affine: Affine,
        stats_gradient: StatsGradient | None,
        saved: Array | None,
        weights: Array | None,
        *,
        axis,
        activation,
        residual_dtype,
        interpret: bool,
    ) -> tuple[Array, Array | None]:
        """dx = gain * dz + intercept + slope * (x - shift); and dz, the residual's cotangent."""
        del axis
        assert weights is None, "weighted gradients run on XLA"
        arrays, factor = self._widened(x, dy, saved)
        if stats_gradient is None:
            stats_gradient = StatsGradient(*(jnp.zeros_like(affine.gain),) * 2)
        vectors = [_stack((*affine, *stats_gradient), factor)]
        dtypes = cotangent_dtypes(x, activation, residual_dtype)
        options = {"activation": activation, "num_inputs": len(arrays)}
        return cotangents(
            self.map(self.bwd_apply_kernel, arrays, vectors, dtypes, interpret, **options),
            x,
            dy,
            residual_dtype,
        )

    def _widened(self, x, *others):
        """The arrays that are not None, as [rows / factor, factor * channels], and the factor."""
        channels = x.shape[-1]
        factor = pallas.widening(x.size // channels, channels, self.lanes(x.dtype.itemsize))
        return [pallas.widen(a, factor) for a in (x, *others) if a is not None], factor


def unsupported(
    shape: tuple[int, ...], dtype: Any, axis: tuple[int, ...], lanes: Callable[[int], int]
) -> str | None:
    """Why no kernel with such `lanes` (see `Backend`) can take such an x, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"takes float32, bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if reason := pallas.channels_last(shape, axis):
        return reason
    rows, channels = math.prod(shape[:-1]), shape[-1]
    factor = pallas.widening(rows, channels, lanes(jnp.dtype(dtype).itemsize))
    return pallas.too_long(rows // factor, factor * channels)


def cotangent_dtypes(
    x: Array, activation: Callable | None, residual_dtype: Any
) -> tuple[jnp.dtype, ...]:
    """The dtypes of what a backward kernel stores: dx, and dz if the residual's gradient needs it.

    Without an activation dz is dy, so there is nothing to store.
    """
    separate = residual_dtype is not None and activation is not None
    return (x.dtype, jnp.dtype(residual_dtype)) if separate else (x.dtype,)


def cotangents(
    stored: Sequence[Array], x: Array, dy: Array, residual_dtype: Any
) -> tuple[Array, Array | None]:
    """(dx, dresidual) from what a kernel stored, in the dtypes of `cotangent_dtypes`."""
    dx, *dz = (a.reshape(x.shape) for a in stored)
    if residual_dtype is None:
        return dx, None
    return dx, dz[0] if dz else dy.astype(residual_dtype)


def _stack(vectors, factor):
    """Per-channel vectors as one operand [vectors, width], which costs XLA one small fusion."""
    return jnp.tile(jnp.stack(vectors), (1, factor))


def launch_primitive(name: str, lower: Callable) -> Primitive:
    """A primitive that runs a kernel: `bind(*operands, launch=launch)` is launch(*operands).

    Being a primitive, it is expanded only when it is lowered.  The interpreter mixes arrays that
    vary over manual mesh axes with constants that do not, which shard_map's check of the types
    would refuse; at lowering that check is over.

    Args:
        name: of the primitive.
        lower: lower(context, launch, *operands) returns what `mlir.lower_fun` returns.

    A launch is hashable and callable, and has the attributes `shapes` (of its results), `interpret`
    and `batchable`.  Under vmap a batchable launch becomes one launch with a larger grid; any other
    runs in a loop.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    jitted = jax.jit(primitive.bind, static_argnames="launch")

    def run_eagerly(*operands, launch):
        with jax.disable_jit(False):
            return jitted(*operands, launch=launch)

    def result_types(*avals, launch):
        # plgpu.kernel forgets over which mesh axes its results vary.
        out_avals = jax.make_jaxpr(launch)(*avals).out_avals
        return [aval.update(manual_axis_type=avals[0].manual_axis_type) for aval in out_avals]

    def batch(operands, dims, *, launch):
        if launch.batchable:
            out = primitive.bind(*operands, launch=_Batched(launch, tuple(dims)))
        else:
            out = _one_by_one(functools.partial(primitive.bind, launch=launch), operands, dims)
        return out, [0] * len(out)

    def lowering(context, *operands, launch):
        unvarying = lambda avals: [aval.update(manual_axis_type=ManualAxisType()) for aval in avals]
        context = context.replace(
            avals_in=unvarying(context.avals_in), avals_out=unvarying(context.avals_out)
        )
        return lower(context, launch, *operands)

    primitive.def_impl(run_eagerly)
    primitive.def_abstract_eval(result_types)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lowering)
    return primitive


def _one_by_one(fn, operands, dims):
    """As jax.vmap(fn, dims), but one member of the mapped axis after the other."""
    mapped = [
        jnp.moveaxis(operand, dim, 0)
        for operand, dim in zip(operands, dims, strict=True)
        if dim is not None
    ]

    def run(members):
        remaining = iter(members)
        return fn(
            *(
                operand if dim is None else next(remaining)
                for operand, dim in zip(operands, dims, strict=True)
            )
        )

    return lax.map(run, mapped)


class _Batched(NamedTuple):
    """A launch for each member of the operands' mapped axes, as one launch with a larger grid."""

    launch: Any
    in_axes: tuple

    @property
    def shapes(self):
        return self.launch.shapes

    @property
    def interpret(self):
        return self.launch.interpret

    @property
    def batchable(self):
        return self.launch.batchable

    def __call__(self, *operands):
        return jax.vmap(self.launch, self.in_axes, 0)(*operands)
