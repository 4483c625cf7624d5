"""The four functions of a GPU backend, from its kernels: arrays folded, vectors stacked, partial results merged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType

from jbn.kernels import shared_pallas as pallas
from jbn.kernels.seam import Affine, Stats, StatsGradient


class Backend(NamedTuple):
    """A kernel for each function, and how to launch one.

    Arrays are folded to [rows, width], where width is a multiple of lanes(itemsize) if it can be;
    vectors are [vectors, width].

        reduce(kernel, arrays, vectors, num_results, interpret, **options) -> (blocks, partials
        [num_chunks, width]) map(kernel, arrays, vectors, dtypes, interpret, **options) -> results
        [rows, width]

    blocks: how the rows were cut, with `rows`, `chunk_rows` and `num_chunks`.
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
        """Count, mean and m2 of each channel; the kernel finds shifts of its own."""
        del shift, axis
        assert weights is None, "weighted statistics run on XLA"
        (folded,), factor = self._widened(x)
        blocks, partials = self.reduce(self.fwd_stats_kernel, [folded], [], 3, interpret)
        rows = jnp.minimum(
            blocks.chunk_rows, blocks.rows - blocks.chunk_rows * jnp.arange(blocks.num_chunks)
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
        """y = activation((x - mean) * gain + bias + residual)."""
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
        *,
        saved,
        weights,
        axis,
        activation,
        interpret: bool,
    ) -> tuple[Array, Array]:
        """The per-channel sums of dz and of dz * (x - mean)."""
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
        *,
        stats_gradient: StatsGradient | None,
        saved,
        weights,
        axis,
        activation,
        residual_dtype,
        interpret: bool,
    ) -> tuple[Array, Array | None]:
        """dx = gain * dz + intercept + slope * (x - mean), and dz itself for the residual where there is one."""
        del axis
        assert weights is None, "weighted gradients run on XLA"
        arrays, factor = self._widened(x, dy, saved)
        stats_gradient = (
            (jnp.zeros_like(affine.gain),) * 2 if stats_gradient is None else stats_gradient
        )
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
        """([those that there are, folded], by how many rows)."""
        channels = x.shape[-1]
        factor = pallas.widening(x.size // channels, channels, self.lanes(x.dtype.itemsize))
        return [pallas.widen(a, factor) for a in (x, *others) if a is not None], factor


def cotangent_dtypes(
    x: Array, activation: Callable | None, residual_dtype: Any
) -> tuple[jnp.dtype, ...]:
    """Of what a kernel stores: dx, and dz for the residual. Without an activation dz is dy: nothing to compute."""
    separate = residual_dtype is not None and activation is not None
    return (x.dtype, jnp.dtype(residual_dtype)) if separate else (x.dtype,)


def cotangents(
    stored: Sequence[Array], x: Array, dy: Array, residual_dtype: Any
) -> tuple[Array, Array | None]:
    """(dx, dresidual) of what a kernel stored, in the dtypes of `cotangent_dtypes`."""
    dx, *dz = (a.reshape(x.shape) for a in stored)
    if residual_dtype is None:
        return dx, None
    return dx, dz[0] if dz else dy.astype(residual_dtype)


def _stack(vectors, factor):
    """Per-channel vectors as one operand [vectors, width]: one small fusion of XLA's, however many there are."""
    return jnp.tile(jnp.stack(vectors), (1, factor))


def launch_primitive(name: str, lower: Callable) -> Primitive:
    """A primitive for the launches of a GPU backend: `bind(*operands, launch=launch)` is
    launch(*operands), lowered apart.

    Interpret mode mixes arrays that vary over manual mesh axes with its own constants; shard_map's
    check of that is long passed at lowering, and would refuse it before.

    Args:
        name: of the primitive.
        lower: lower(context, launch, *operands) -> the values of `mlir.lower_fun`.

    A launch is hashable, and has the `shapes` of its results and `interpret`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    jitted = jax.jit(primitive.bind, static_argnames="launch")

    @primitive.def_impl
    def _(*operands, launch):
        with jax.disable_jit(False):
            return jitted(*operands, launch=launch)

    @primitive.def_abstract_eval
    def _(*avals, launch):
        # plgpu.kernel forgets what its results vary over.
        found = jax.make_jaxpr(launch)(*avals).out_avals
        return [aval.update(manual_axis_type=avals[0].manual_axis_type) for aval in found]

    def batch(operands, dims, *, launch):
        batched = _Batched(launch, tuple(dims))
        return primitive.bind(*operands, launch=batched), [0] * len(launch.shapes)

    def lowering(context, *operands, launch):
        unvarying = lambda avals: [aval.update(manual_axis_type=ManualAxisType()) for aval in avals]
        context = context.replace(
            avals_in=unvarying(context.avals_in), avals_out=unvarying(context.avals_out)
        )
        return lower(context, launch, *operands)

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lowering)
    return primitive


class _Batched(NamedTuple):
    """A launch for each of operands mapped over in_axes."""

    launch: Any
    in_axes: tuple

    @property
    def shapes(self):
        return self.launch.shapes

    @property
    def interpret(self):
        return self.launch.interpret

    def __call__(self, *operands):
        return jax.vmap(self.launch, self.in_axes, 0)(*operands)
