"""The bodies of the TPU kernels.

A block of channels takes its rows one block after the other, so that sums stay in VMEM and are
always taken in the same order.  A block is walked in chunks that fit registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jbn.kernels.seam import (
    Affine,
    StatsGradient,
    input_cotangent,
    pre_activation,
    through_activation,
)


def fwd_stats(x_ref, shift_ref, offset_ref, m2_ref, *, blocks):
    """Each block of rows about the mean of all before it, the first about its own.

    If n rows lie at a distance D from the mean of at least n others, taking their squares about
    that mean loses some roundings of n D^2; but m2 of the whole is then n D^2 / 2 or more, so the
    digits lost are not digits of the result.
    """
    place = _place(blocks)

    @pl.when(place.first)
    def _():
        (total,) = _sums(lambda at: (_load(x_ref, at),), blocks, place)
        # The maximum changes no value. It stops XLA:CPU (interpret mode) from fusing the division
        # into x - shift, which would give `shift` a different rounding there.
        shift_ref[...] = jnp.maximum(total / place.count, jnp.finfo(total.dtype).min)
        offset_ref[...] = jnp.zeros(total.shape, total.dtype)
        m2_ref[...] = jnp.zeros(total.shape, total.dtype)

    shift, offset = shift_ref[...], offset_ref[...]
    center = shift + offset

    def terms(at):
        centered = _load(x_ref, at) - center
        return centered, jnp.square(centered)

    total, squares = _sums(terms, blocks, place)
    delta = (center - shift) + total / place.count - offset
    share = place.count / (place.before + place.count)
    offset_ref[...] = offset + delta * share
    m2_ref[...] += jnp.maximum(squares - total * (total / place.count), 0) + jnp.square(delta) * (
        place.before * share
    )


def fwd_apply(x_ref, residual_ref, affine_ref, y_ref, *, blocks, activation):
    affine = Affine(*_vectors(affine_ref))

    def body(at):
        z = pre_activation(_load(x_ref, at), affine, _load(residual_ref, at))
        y_ref[at] = (z if activation is None else activation(z)).astype(y_ref.dtype)

    _for_chunks(body, blocks)


def bwd_stats(
    x_ref, dy_ref, saved_ref, affine_ref, sum_dz_ref, sum_dz_x_ref, *, blocks, activation
):
    place = _place(blocks)
    affine = Affine(*_vectors(affine_ref))

    @pl.when(place.first)
    def _():
        sum_dz_ref[...] = jnp.zeros(sum_dz_ref.shape, sum_dz_ref.dtype)
        sum_dz_x_ref[...] = jnp.zeros(sum_dz_x_ref.shape, sum_dz_x_ref.dtype)

    def terms(at):
        x, dy, saved = (_load(ref, at) for ref in (x_ref, dy_ref, saved_ref))
        dz = through_activation(x, dy, affine, saved, activation)
        return dz, dz * (x - affine.shift)

    sum_dz, sum_dz_x = _sums(terms, blocks, place)
    sum_dz_ref[...] += sum_dz
    sum_dz_x_ref[...] += sum_dz_x


def bwd_apply(
    x_ref,
    dy_ref,
    saved_ref,
    affine_ref,
    stats_gradient_ref,
    dx_ref,
    dresidual_ref,
    *,
    blocks,
    activation,
):
    affine = Affine(*_vectors(affine_ref))
    stats_gradient = None
    if stats_gradient_ref is not None:
        stats_gradient = StatsGradient(*_vectors(stats_gradient_ref))

    def body(at):
        x, dy, saved = (_load(ref, at) for ref in (x_ref, dy_ref, saved_ref))
        dz = through_activation(x, dy, affine, saved, activation)
        dx = input_cotangent(x, dz, affine, stats_gradient)
        dx_ref[at] = dx.astype(dx_ref.dtype)
        if dresidual_ref is not None:
            dresidual_ref[at] = dz.astype(dresidual_ref.dtype)

    _for_chunks(body, blocks)


def fwd_fused(
    x_ref,
    residual_ref,
    params_ref,
    eps_ref,
    y_ref,
    shift_ref,
    offset_ref,
    m2_ref,
    affine_ref,
    *,
    blocks,
    activation,
):
    """All rows of a block of channels: y after the statistics, from one read of x."""
    fwd_stats(x_ref, shift_ref, offset_ref, m2_ref, blocks=blocks)
    rstd = lax.rsqrt(m2_ref[...] / (blocks.outer * blocks.inner) + eps_ref[0])
    gain = params_ref[0:1] * rstd
    affine_ref[0:1] = shift_ref[...]
    affine_ref[1:2] = gain
    affine_ref[2:3] = params_ref[1:2] - offset_ref[...] * gain
    fwd_apply(x_ref, residual_ref, affine_ref, y_ref, blocks=blocks, activation=activation)


def bwd_fused(
    x_ref,
    dy_ref,
    saved_ref,
    affine_ref,
    through_ref,
    dx_ref,
    dresidual_ref,
    sum_dz_ref,
    sum_dz_x_ref,
    stats_gradient_ref,
    *,
    blocks,
    activation,
):
    """All rows of a block of channels: dx after the sums, from one read of x and dy.

    through_ref holds offset, rstd, dmean and dvar.
    """
    bwd_stats(
        x_ref,
        dy_ref,
        saved_ref,
        affine_ref,
        sum_dz_ref,
        sum_dz_x_ref,
        blocks=blocks,
        activation=activation,
    )
    gain, (offset, rstd, dmean, dvar) = affine_ref[1:2], _vectors(through_ref)
    dmean = dmean - gain * sum_dz_ref[...]
    dvar = dvar - gain * jnp.square(rstd) / 2 * (sum_dz_x_ref[...] - offset * sum_dz_ref[...])
    count = blocks.outer * blocks.inner
    stats_gradient_ref[0:1] = 2 * dvar / count
    stats_gradient_ref[1:2] = dmean / count - 2 * dvar / count * offset
    bwd_apply(
        x_ref,
        dy_ref,
        saved_ref,
        affine_ref,
        stats_gradient_ref,
        dx_ref,
        dresidual_ref,
        blocks=blocks,
        activation=activation,
    )


class _Place(NamedTuple):
    """Where in the array this step of the grid is."""

    first: Array  # whether it is the first of its channels
    count: Array  # rows of the block that exist, a float32 scalar
    before: Array  # rows of the blocks before, a float32 scalar
    left_outer: Array  # rows from the start of the block to the end of the array
    left_inner: Array


def _place(blocks):
    i, j = pl.program_id(1), pl.program_id(2)
    left_outer = blocks.outer - i * blocks.block_outer
    left_inner = blocks.inner - j * blocks.block_inner
    here_outer = jnp.minimum(left_outer, blocks.block_outer)
    here_inner = jnp.minimum(left_inner, blocks.block_inner)
    # All inner blocks of an outer row come before the next outer row; there are several inner
    # blocks only where a block has one outer row.
    to_float = lambda n: n.astype(jnp.float32)
    # In float32, because an int32 ends at 2^31 rows.
    before = to_float(i) * float(blocks.block_outer * blocks.inner)
    before += to_float(j) * float(blocks.block_inner)
    return _Place(
        (i == 0) & (j == 0),
        to_float(here_outer * here_inner),
        before,
        left_outer,
        left_inner,
    )


def _for_chunks(body, blocks):
    """body(index) for the index of every chunk in a block."""
    lax.fori_loop(0, _num_chunks(blocks), lambda k, _: body(_index(k, blocks)[0]), None)


def _sums(terms, blocks, place):
    """Sums over the rows of this block; terms(index) gives the arrays to sum for a chunk."""

    def chunk_sums(k):
        index, outer, inner = _index(k, blocks)
        arrays = terms(index)
        if blocks.ragged:
            iota = lambda start, axis: start + lax.broadcasted_iota(jnp.int32, blocks.chunk, axis)
            exists = (iota(outer, 0) < place.left_outer) & (
                iota(inner, _inner_axis(blocks)) < place.left_inner
            )
            arrays = tuple(jnp.where(exists, a, 0) for a in arrays)
        return tuple(
            a.sum(0, keepdims=True).sum(_inner_axis(blocks), keepdims=True) for a in arrays
        )

    add = lambda k, sums: jax.tree.map(jnp.add, sums, chunk_sums(k))
    return lax.fori_loop(1, _num_chunks(blocks), add, chunk_sums(0))


def _num_chunks(blocks):
    return blocks.block_outer // blocks.chunk_outer * (blocks.block_inner // blocks.chunk_inner)


def _index(k, blocks):
    """Index of chunk k in a block, and where it starts."""
    per_outer = blocks.block_inner // blocks.chunk_inner
    if per_outer == 1:
        outer, inner, inner_index = k * blocks.chunk_outer, 0, slice(None)
    else:
        outer, inner = k // per_outer * blocks.chunk_outer, k % per_outer * blocks.chunk_inner
        inner_index = pl.ds(
            inner if isinstance(inner, int) else pl.multiple_of(inner, blocks.chunk_inner),
            blocks.chunk_inner,
        )
    return blocks.arranged(pl.ds(outer, blocks.chunk_outer), inner_index, slice(None)), outer, inner


def _inner_axis(blocks):
    return blocks.arranged(0, 1, 2).index(1)


def _load(ref, at):
    return None if ref is None else ref[at].astype(jnp.float32)


def _vectors(ref):
    """The vectors of ref, each to broadcast against a chunk."""
    return (ref[k : k + 1] for k in range(ref.shape[0]))
