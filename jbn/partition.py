"""One call across devices: the four functions of the seam, on the whole array wherever its parts are."""

from jax import Array

from jbn import dispatch
from jbn.kernels.seam import Affine, Pull, Stats


def fwd_stats(implementation, x: Array, shift: Array, weights: Array | None, *, axis) -> Stats:
    return dispatch.run("fwd_stats", implementation, {"x": x, "shift": shift, "weights": weights}, {"axis": axis})


def fwd_apply(implementation, x: Array, affine: Affine, residual: Array | None, *, axis, activation, dtype) -> Array:
    arrays = {"x": x, "affine": affine, "residual": residual}
    return dispatch.run("fwd_apply", implementation, arrays, {"axis": axis, "activation": activation, "dtype": dtype})


def bwd_stats(implementation, x: Array, dy: Array, affine: Affine, *, saved, weights, axis, activation) -> tuple[Array, Array]:
    arrays = {"x": x, "dy": dy, "affine": affine, "saved": saved, "weights": weights}
    return dispatch.run("bwd_stats", implementation, arrays, {"axis": axis, "activation": activation})


def bwd_apply(
    implementation, x: Array, dy: Array, affine: Affine, *, pull: Pull | None, saved, weights, axis, activation, residual_dtype
) -> tuple[Array, Array | None]:
    arrays = {"x": x, "dy": dy, "affine": affine, "pull": pull, "saved": saved, "weights": weights}
    static = {"axis": axis, "activation": activation, "residual_dtype": residual_dtype}
    return dispatch.run("bwd_apply", implementation, arrays, static)
