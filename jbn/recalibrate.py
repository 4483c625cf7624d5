"""Running statistics made anew from data, exactly: after averaging weights, quantizing, or moving
to another domain.

The running averages of training belong to the weights of training.  For other weights (SWA, EMA,
schedule-free) they are
wrong, and what inference computes with them is not what was trained.  Here they become the pooled
moments of the data,
weighted by count: no average of averages, and a short last batch counts as short.

Every norm's input depends on the norms before it, so a pass over the data is exact for those whose
predecessors are.  With the model in inference mode, passes repeat until nothing changes any more:
as many as there are norms in the longest chain. With the model in train mode each norm reads what
normalization by batches made (torch.optim.swa_utils.update_bn): one pass, an approximation, that is
better the larger the batches.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array

from jbn import functional
from jbn import linen as jbn_linen
from jbn.core import flax_common, stats
from jbn.types import Moments, State

_Found = dict[Any, Moments]


def pooled_moments(
    batches: Iterable[Array | tuple[Array, Array]], *, axis: int | tuple[int, ...] = -1
) -> Moments:
    """The moments of all batches together.

    Args:
        batches: arrays, or (array, weights), as in `jbn.moments`.
        axis: the feature axis or axes.

    Raises:
        ValueError: no batches.
    """
    total = None
    for batch in batches:
        x, weights = batch if isinstance(batch, tuple) else (batch, None)
        m = functional.moments(x, axis=axis, weights=weights)
        total = m if total is None else stats.merge(total, m)
    if total is None:
        raise ValueError("batches is empty, expected at least one")
    return total


def recalibrate(
    collect: Callable[[dict[Any, State], Any], Mapping[Any, Moments]],
    states: Mapping[Any, State],
    batches: Iterable[Any],
    *,
    unbiased: bool = False,
    passes: int | None = None,
    progress: bool = False,
) -> dict[Any, State]:
    """New states for a model written with the functional API.

    Args:
        collect: function of (states, batch) to the moments of what each norm reads,
            `jbn.moments(x)`, under the same keys. It runs the model in inference mode for exact
            statistics; jit-compiled here.
        states: of all norms, by name.
        batches: iterated once per pass: a list or a data loader, not a generator, unless passes is
            1.
        unbiased: store n / (n - 1) times the variance.
        passes: at most so many; None for as many as there are norms. It ends sooner once nothing
            changes.
        progress: show a bar (needs tqdm, of the extra "examples").

    Returns:
        The states, with count the number of batches. A feature that no batch counted keeps its
        values.

    Raises:
        ValueError: no batches, or an iterator that cannot be iterated again.
    """
    return _run(
        jax.jit(collect), states, batches, unbiased=unbiased, passes=passes, progress=progress
    )


def _run(collect, states, batches, *, unbiased=False, passes=None, progress=False):
    """`recalibrate` with a `collect` that is compiled already."""
    passes = len(states) if passes is None else passes
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, expected one that gives the data {passes} times: a list, or passes=1"
        )
    merge = jax.jit(lambda a, b: {key: stats.merge(a[key], b[key]) for key in a})
    states = dict(states)
    for number in range(passes):
        total, count = None, 0
        for batch in _shown(batches, progress, number):
            found = dict(collect(states, batch))
            total = found if total is None else merge(total, found)
            count += 1
        if total is None:
            raise ValueError("batches is empty, expected at least one")
        before = states
        states = {
            key: _replaced(state, total.get(key), unbiased, count) for key, state in states.items()
        }
        if _equal(before, states):
            break
    return states


def recalibrate_linen(
    apply: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    **options: Any,
) -> dict[str, Any]:
    """New batch_stats for a linen model, of jbn's or Flax's BatchNorm.

    Args:
        apply: function of (variables, batch) that runs the model on a batch, such as `lambda v,
            batch: model.apply(v, batch["image"], train=False)`. In train mode, with
                mutable=["batch_stats"], one pass makes the approximation.
        variables: of the model.
        batches: iterated once per pass; each goes through jit.
        options: unbiased, passes, progress, as in `recalibrate`.

    Returns:
        The variables with new batch_stats. Norms inside nn.scan and nn.vmap cannot be reached: JAX
        reports a leaked tracer.
    """
    flat = dict(_norms(variables["batch_stats"]))

    @jax.jit
    def collect(variables, states, batch):
        found: _Found = {}

        def watch(call, args, kwargs, context):
            if isinstance(context.module, linen.BatchNorm) and context.method_name == "__call__":
                _record(found, context.module.path, context.module, *args, **kwargs)
            return call(*args, **kwargs)

        with jbn_linen.intercept_methods(watch):
            apply({**variables, "batch_stats": _nested(variables["batch_stats"], states)}, batch)
        return found

    states = _run(functools.partial(collect, dict(variables)), flat, batches, **options)
    return {**variables, "batch_stats": _nested(variables["batch_stats"], states)}


def recalibrate_nnx(
    model: nnx.Module, batches: Iterable[Any], apply: Callable = lambda m, x: m(x), **options: Any
) -> None:
    """New statistics, in place, for an nnx model of jbn's or Flax's BatchNorm.

    Args:
        model: in eval mode for exact statistics; in train mode one pass makes the approximation.
        batches: iterated once per pass; each goes through jit.
        apply: function of (model, batch) that runs the model on a batch.
        options: unbiased, passes, progress, as in `recalibrate`.
    """
    norms = {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    graph, variables = nnx.split(model)

    @jax.jit
    def collect(variables, states, batch):
        found: _Found = {}
        copy = nnx.merge(graph, variables)
        copied = {
            path: module
            for path, module in nnx.iter_modules(copy)
            if isinstance(module, nnx.BatchNorm)
        }
        for path, module in copied.items():
            module.mean[...], module.var[...] = states[path].mean, states[path].var
        _watch_children(copy, {id(module): path for path, module in copied.items()}, found)
        apply(copy, batch)
        return found

    flat = {
        path: State(module.mean[...], module.var[...], jnp.int32(0))
        for path, module in norms.items()
    }
    for path, state in _run(
        functools.partial(collect, variables), flat, batches, **options
    ).items():
        norms[path].mean[...], norms[path].var[...] = state.mean, state.var


class _Watched:
    """An nnx BatchNorm's stand-in that records what it reads. A plain object: nnx must not look inside."""

    def __init__(self, norm, path, found):
        self.norm, self.path, self.found = norm, path, found

    def __call__(self, *args, **kwargs):
        _record(self.found, self.path, self.norm, *args, **kwargs)
        return self.norm(*args, **kwargs)


def _watch_children(model, paths, found):
    """Put a `_Watched` wherever a module holds one of the norms."""
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    for parent in modules:
        for key, child in list(nnx.iter_children(parent)):
            if id(child) in paths:
                watched = _Watched(child, paths[id(child)], found)
                if isinstance(key, int):
                    parent[key] = watched
                else:
                    object.__setattr__(parent, str(key), watched)


def _record(found, path, layer, x, *_, mask=None, **__):
    """The moments of one call; a layer that is called twice has those of both."""
    x = jnp.asarray(x)
    m = functional.moments(x, axis=flax_common.feature_axes(layer.axis, x.ndim), weights=mask)
    found[path] = m if path not in found else stats.merge(found[path], m)


def _replaced(state, m, unbiased, batches):
    if m is None:  # the model has this norm but did not call it
        return state
    m = Moments(*(value.reshape(state.mean.shape) for value in m))
    new = functional.update_state(state, m, momentum=0.0, unbiased=unbiased)
    return new._replace(count=jnp.asarray(batches, state.count.dtype))


def _equal(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _norms(tree, path=()):
    """(path, State) of each norm in a batch_stats tree."""
    if set(tree) == {"mean", "var"} and not isinstance(tree["mean"], Mapping):
        yield path, State(tree["mean"], tree["var"], jnp.int32(0))
        return
    for key, below in tree.items():
        if isinstance(below, Mapping):
            yield from _norms(below, (*path, key))


def _nested(tree, states, path=()):
    """The tree with the norms' values from `states`."""
    if path in states:
        return {"mean": states[path].mean, "var": states[path].var}
    return {
        k: _nested(v, states, (*path, k)) if isinstance(v, Mapping) else v for k, v in tree.items()
    }


def _shown(batches, progress, number):
    if not progress:
        return batches
    try:
        import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'jbn[examples]'") from error
    return tqdm.tqdm(batches, desc=f"recalibrate, pass {number + 1}")
