"""One call across devices."""

from jbn import dispatch


def fwd_stats(implementation, x, shift, weights, *, axis):
    return dispatch.functions(implementation).fwd_stats(x, shift, weights, axis=axis)


def fwd_apply(implementation, *args, **kw):
    return dispatch.functions(implementation).fwd_apply(*args, **kw)


def bwd_stats(implementation, *args, **kw):
    return dispatch.functions(implementation).bwd_stats(*args, **kw)


def bwd_apply(implementation, *args, **kw):
    return dispatch.functions(implementation).bwd_apply(*args, **kw)
