"""The moments of what each batch norm of a Flax model reads, under any transform that Flax lifts.

While the model runs, each norm holds one more variable in the collection of its running statistics
(`batch_stats`, `BatchStat`): the moments of what it has read so far. Every lifted transform (scan,
vmap, remat, jit, ...) carries that collection in and out, stacked or shared as the model says, so
the moments travel with it. `input_moments` and `jbn.recalibrate` both read them here.
"""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, errors, linen, nnx
from flax.nnx import bridge
from jax import Array
from jax.core import Tracer

from jbn import linen as jbn_linen
from jbn.core import validate
from jbn.health import totals
from jbn.types import Moments

Path = tuple[Any, ...]
_COLLECTION = "batch_stats"
_VARIABLE = "input_moments"
# Paths of the nnx norms that were called while their model was being traced.
_CALLED: contextvars.ContextVar[set[Path]] = contextvars.ContextVar("called")


def input_moments(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> dict[str, Moments]:
    """The moments of what each batch norm reads in one call: `model_report`'s second argument.

    Args:
        model: a linen or nnx model of jbn's or Flax's BatchNorm.
        args, kwargs: what runs it: (variables, x, train=False) for `model.apply` of a linen model,
            (x,) for an nnx model, which stays as it is. What evaluation reads is what the running
            statistics are for.

    Returns:
        A dict from the layer's name to its moments, each of the shape of its running mean (stacked
        where the layer is), float32 or float64; the mean is complex for complex x. A layer that is
        called several times has the moments of all its calls together. A layer that reads nothing
        is left out. With skip_nonfinite, a call that reads NaN or infinity counts for nothing, as
        in training.

    Raises:
        TypeError: neither a linen nor an nnx model.
        ValueError: no batch norm was called, or one where its variables cannot change, or one in
            nnx.bridge.
    """
    if isinstance(model, nnx.Module):
        found = collect_nnx(lambda copy: copy(*args, **kwargs), nnx.clone(model))
    elif isinstance(model, linen.Module):
        variables = args[0] if args else kwargs.get("variables")
        if not isinstance(variables, Mapping) or _COLLECTION in variables:
            statistics(variables)  # raises; a model without any norm says so itself
        found = collect_linen(lambda: model.apply(*args, **kwargs))
    else:
        raise TypeError(
            f"model is a {type(model).__name__}, expected a flax.linen or flax.nnx module"
        )
    return {"/".join(map(str, path)) or "layer": m for path, m in found.items() if _is_read(m)}


def collect_linen(
    run: Callable[[], Any], handed: Mapping[Path, Array] | None = None
) -> dict[Path, Moments]:
    """The moments of each norm that `run` calls, by the layer's path in batch_stats.

    Args:
        run: function that runs the model.
        handed: the running means of the variables that `run` was given, by path. `run` may give a
            part of these variables to a model of its own: the array then tells the path. None for
            the paths that the model sees.

    Raises:
        ValueError: `run` called no norm, or one where its variables cannot change, or one whose
            path in `handed` cannot be told.
    """

    def watch(call, args, kwargs, context):
        module = context.module
        if isinstance(module, bridge.ToLinen) and context.method_name == "__call__":
            for path in linen_norms(module.variables.get(_COLLECTION, {})):
                raise ValueError(_bridged("/".join(map(str, (*module.path, *path))), "nnx"))
        if not isinstance(module, linen.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        before = module.get_variable(_COLLECTION, _VARIABLE)
        y = call(*args, **kwargs)
        # Where __call__ runs another __call__ of the same layer (of a base class, or inside a
        # lifted transform), that one has recorded what it read.
        if before is not None and module.get_variable(_COLLECTION, _VARIABLE) is before:
            if not module.is_mutable_collection(_COLLECTION):
                raise ValueError(lost("/".join(module.path)))
            norm = jbn_linen.as_called(module)
            m = totals.record(before, norm, type(module).__call__, args, kwargs)
            module.put_variable(_COLLECTION, _VARIABLE, m)
        return y

    found: dict[Path, Moments] = {}
    with _linen_scopes(handed) as scopes, jbn_linen.intercept_methods(watch):
        try:
            run()
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(lost()) from error
    for scope, nothing, paths in scopes:
        for path, norm in linen_norms(scope.variables()[_COLLECTION]).items():
            if _VARIABLE not in norm:  # Flax has made it, as it may in a mutable collection
                raise ValueError(
                    f"{'/'.join(map(str, path)) or 'the layer'} has no mean and var among the "
                    f"variables, expected both in '{_COLLECTION}': look at them with jbn.health"
                )
            m = norm[_VARIABLE]
            if m is nothing[path]:
                continue
            own = paths[path]
            if own is None:
                raise ValueError(
                    f"the batch norm {'/'.join(map(str, path))!r} cannot be found among the "
                    "variables: give the model the arrays of `variables` themselves, or all norms "
                    "of them under their own names"
                )
            m = _outside(m, own)
            found[own] = totals.merge(found[own], m) if own in found else m
    return _some(found)


def _outside(m, path):
    """The moments, where no transform of JAX's has kept them inside."""
    try:
        return jax.tree.map(lambda v: jnp.copy(v) if isinstance(v, Tracer) else v, m)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(lost("/".join(map(str, path)))) from error


@contextlib.contextmanager
def _linen_scopes(handed):
    """Give each norm its variable of moments wherever a model meets its variables, and list these:
    the scope, the moments of nothing, and the path of each norm in `handed`.

    The model may be run without mutable=["batch_stats"], and Flax intercepts no method of a class
    that nn.remat or the like has made. What every `apply` and `bind` calls is `flax.core.bind`,
    which is replaced in this thread until the run ends: nothing public does. `sow`, `perturb` and
    `put_variable` need a mutable collection, which only the caller of `apply` can ask for; running
    the outermost module again from an interceptor draws other random numbers, and misses nn.remat.
    """
    scopes, thread, original = [], threading.get_ident(), core.scope.bind
    known = {id(mean): (mean, path) for path, mean in (handed or {}).items()}

    def path_of(path, mean, norms):
        """The path in `handed`. Where all norms are there, a new mean has the path of the old."""
        if handed is None:
            return path
        return known.get(id(mean), (mean, path if set(norms) == set(handed) else None))[1]

    def bind(variables, rngs=None, mutable=False, flags=None):
        if threading.get_ident() != thread or not variables.get(_COLLECTION):
            return original(variables, rngs, mutable, flags)
        statistics: Any = core.unfreeze(variables[_COLLECTION])
        norms: dict[Path, Any] = linen_norms(statistics)
        paths = {path: path_of(path, norm["mean"], norms) for path, norm in norms.items()}
        nothing = {path: totals.empty(norm["mean"]) for path, norm in norms.items()}
        for path, norm in norms.items():
            norm[_VARIABLE] = nothing[path]
        variables = {**variables, _COLLECTION: statistics}
        scope = original(variables, rngs, core.scope.union_filters(mutable, _COLLECTION), flags)

        def mutable_variables():
            """What the caller of `apply` asked for, without the moments."""
            every = type(scope).mutable_variables(scope)
            asked = {c: tree for c, tree in every.items() if core.scope.in_filter(mutable, c)}
            if _COLLECTION in asked:
                updated: Any = asked[_COLLECTION]
                asked[_COLLECTION] = updated = core.unfreeze(updated)
                norms: dict[Path, Any] = linen_norms(updated)
                for path, norm in norms.items():
                    norm.pop(_VARIABLE, None)
                    if paths.get(path) is not None:  # the array is held, so its id stays its own
                        known[id(norm["mean"])] = (norm["mean"], paths[path])
            return core.freeze(asked) if isinstance(every, core.FrozenDict) else asked

        scope.mutable_variables = mutable_variables
        scopes.append((scope, nothing, paths))
        return scope

    core.scope.bind = core.bind = bind
    try:
        yield scopes
    finally:
        core.scope.bind = core.bind = original


def collect_nnx(run: Callable[[nnx.Module], Any], copy: nnx.Module) -> dict[Path, Moments]:
    """The moments of each norm that `run(copy)` calls, by its path in the model.

    Args:
        run: function that runs the model.
        copy: of the model; its norms are changed.

    Raises:
        ValueError: `run` called no norm, or one where its variables cannot change, or a linen one.
    """

    def watch(call, args, kwargs, context):
        if isinstance(context.module, linen.BatchNorm) and context.method_name == "__call__":
            raise ValueError(_bridged("/".join(context.module.path) or "layer", "linen"))
        return call(*args, **kwargs)

    norms: dict[Any, Any] = nnx_norms(copy)
    nothing = {path: totals.empty(norm.mean[...]) for path, norm in norms.items()}
    for path, norm in norms.items():
        object.__setattr__(norm, "__class__", _recording(type(norm)))
        setattr(norm, _VARIABLE, type(norm.mean)(nothing[path]))
        norm.input_path = path
    called: set[Path] = set()
    token = _CALLED.set(called)
    try:
        with jbn_linen.intercept_methods(watch):
            run(copy)
    finally:
        _CALLED.reset(token)
    found = {path: getattr(norm, _VARIABLE).get_value() for path, norm in norms.items()}
    found = {path: m for path, m in found.items() if m.mean is not nothing[path].mean}
    for path in sorted(called - set(found), key=str):
        raise ValueError(lost("/".join(map(str, path))))
    return _some(found)


def nnx_norms(model: nnx.Module) -> dict[Path, nnx.BatchNorm]:
    """Every batch norm of a model, wherever it is held, by its path."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }


def statistics(variables: Any) -> dict[Path, Mapping[str, Any]]:
    """The `linen_norms` of a linen model's variables.

    Raises:
        TypeError: variables is no mapping.
        ValueError: it holds no running statistics, or a layer's mean and var do not fit each other.
    """
    validate.mapping(variables, "variables", "the dict that model.init returns")
    held = variables.get(_COLLECTION)
    norms = linen_norms(held) if isinstance(held, Mapping) else {}
    if not norms:
        kind = "" if held is None else f" ({_COLLECTION} is {held!r:.60})"
        raise ValueError(
            f"variables hold {sorted(variables)}{kind}, expected '{_COLLECTION}' among them, with "
            "a mean and a var for each batch norm: the running statistics that init makes"
        )
    for path, norm in norms.items():
        mean, var = norm["mean"], norm["var"]
        if getattr(mean, "shape", None) != getattr(var, "shape", ()):
            raise ValueError(
                f"{'/'.join(map(str, path)) or 'the layer'} has a mean of shape {mean.shape} and "
                f"var {getattr(var, 'shape', var)!r:.60}, expected two arrays of one shape: look "
                "at the variables with jbn.health"
            )
    return norms


def linen_norms(batch_stats: Mapping[str, Any], path: Path = ()) -> dict[Path, Mapping[str, Any]]:
    """Every dict of batch_stats that holds a mean and a var, by its path."""
    is_norm = {"mean", "var"} <= set(batch_stats) and hasattr(batch_stats["mean"], "dtype")
    below = {
        at: norm
        for key, held in batch_stats.items()
        if isinstance(held, Mapping)
        for at, norm in linen_norms(held, (*path, key)).items()
    }
    return {path: batch_stats, **below} if is_norm else below


@functools.cache
def _recording(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """A subclass of a norm's class that records what the library's batch norm in it reads.

    A subclass of the user's keeps its own __call__; its super().__call__ is the recording one. If
    it calls none, what it reads itself is recorded.
    """
    library = next(c for c in kind.__mro__ if c.__module__.split(".")[0] in ("flax", "jbn"))
    recorder = _recorder(library)
    if kind is library:
        return recorder
    return _recorder(type(kind.__name__, (kind, recorder), {}))


def _recorder(kind):
    class Recorder(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args, **kwargs):
            moments = getattr(self, _VARIABLE)
            before = moments.get_value()
            y = super().__call__(*args, **kwargs)
            if moments.get_value().mean is not before.mean:
                return y
            _CALLED.get().add(self.input_path)
            try:
                moments.set_value(totals.record(before, self, kind.__call__, args, kwargs))
            except errors.TraceContextError as error:
                raise ValueError(lost("/".join(map(str, self.input_path)))) from error
            return y

    return Recorder


def lost(name: str | None = None) -> str:
    """The message for a norm whose moments cannot come out of the model."""
    which = "a batch norm" if name is None else f"the batch norm {name!r}"
    return (
        f"{which} ran where its variables cannot change, so what it read is lost: use the "
        "transforms of nn or nnx there instead of jax's (jax.jit, jax.checkpoint, jax.lax.scan), "
        "and let them carry or stack the running statistics (not broadcast them in a scan)"
    )


def _bridged(name, library):
    return (
        f"the batch norm {name!r} is one of flax.{library} inside nnx.bridge, where what it reads "
        "is not recorded: expected all norms to be of the library of the model"
    )


def _some(found):
    if not found:
        raise ValueError(
            "no batch norm was called, expected at least one whose running statistics are among "
            "the model's variables: run the model itself, not a function that jax.jit compiled"
        )
    return found


def _is_read(m):
    """Whether a layer counted anything; under jit that is not known, and taken for granted."""
    return isinstance(m.count, Tracer) or bool(np.any(m.count > 0))
