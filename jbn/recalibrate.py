"""New running statistics from data, after averaging weights, quantizing, or changing domain.

The running averages of training belong to the weights of training. For other weights (SWA, EMA,
schedule-free) they are wrong, and inference then computes something that was not trained. The
functions here replace them by the pooled moments of the data, weighted by count: a short last batch
weighs less than a full one.

The input of a norm depends on the norms before it, so one pass over the data is exact for those
norms whose predecessors are exact. With the model in inference mode, passes repeat until nothing
changes any more: as many as there are norms in the longest chain. With the model in train mode each
norm reads what the batches were normalized to (as in torch.optim.swa_utils.update_bn): one pass,
an approximation, which is better the larger the batches are.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jbn import functional
from jbn.core import flax_common, validate
from jbn.health import inputs, totals
from jbn.types import Moments, State


def pooled_moments(
    batches: Iterable[Array | tuple[Array, Array]], *, axis: int | tuple[int, ...] = -1
) -> Moments:
    """The moments of all batches together.

    Args:
        batches: arrays, or (array, weights), as in `jbn.moments`.
        axis: the feature axis or axes.

    Raises:
        ValueError: no batches, or features that differ between them.
        TypeError: batches is no iterable of these.
    """
    total = None
    for batch in _iterable(batches):
        if isinstance(batch, tuple) and len(batch) != 2:
            raise ValueError(
                f"batches holds a tuple of {len(batch)}, expected an array or (array, weights)"
            )
        x, weights = map(_array, batch if isinstance(batch, tuple) else (batch, None))
        m = functional.moments(x, axis=axis, weights=weights)
        total = m if total is None else functional.merge_moments(total, m)
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
        passes: at most so many, at least 1; None for as many as there are norms. It ends sooner
            once nothing changes.
        progress: show a bar (needs tqdm, of the extra "examples").

    Returns:
        The states, with count the number of batches. A feature that no batch counted keeps its
        values, and so does a norm whose moments `collect` never returns.

    Raises:
        ValueError: no batches, an iterator that cannot be iterated again, passes below 1, a key
            that no state has, or keys that differ between batches.
        TypeError: an argument of another kind, or what `collect` returns is no mapping to
            `jbn.Moments`.
    """
    validate.function(collect, "collect", "of (states, batch) to a dict of jbn.moments")
    validate.mapping(states, "states", "a dict from the name of each norm to its jbn.State")
    for key, state in states.items():
        validate.state(state, f"states[{key!r}]", prefix=f"states[{key!r}].")
    return _run(
        jax.jit(collect), states, batches, unbiased=unbiased, passes=passes, progress=progress
    )


def _run(
    collect, states, batches, *, chain=None, unbiased=False, passes=None, progress=False
) -> dict[Any, State]:
    """`recalibrate` with a `collect` that is compiled already.

    chain: how many norms there are, where one state may hold those of several layers.
    """
    if passes is None:
        passes = max(1, len(states) if chain is None else chain)
    passes = validate.positive(passes, "passes", ", or None for as many as needed")
    unbiased = validate.flag(unbiased, "unbiased")
    progress = validate.flag(progress, "progress")
    batches = _iterable(batches)
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, expected one that gives the data {passes} times: "
            "a list, or passes=1"
        )
    merge = jax.jit(lambda a, b: {key: totals.merge(a[key], b[key]) for key in a})
    states = dict(states)
    for number in range(passes):
        total, count = None, 0
        for batch in _shown(batches, progress, number):
            batch = jax.tree.map(_checked_leaf, batch)
            found = _checked_moments(collect(states, batch), states, total)
            total = found if total is None else merge(total, found)
            count += 1
        if total is None:
            raise ValueError("batches is empty, expected at least one")
        before = states
        states = {
            key: _replaced(state, total[key], unbiased, count) if key in total else state
            for key, state in states.items()
        }
        if _equal(before, states):
            break
    return states


def _iterable(batches):
    single = isinstance(batches, str | Mapping)
    if single or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches is a {type(batches).__name__} ({batches!r:.60}), expected an iterable of "
            "batches: for a single one, [batch]"
        )
    return batches


def _array(value: Any) -> Any:
    """An array of another library, such as torch, as one of NumPy; anything else as it is."""
    known = isinstance(value, Array | np.ndarray | np.generic) or not hasattr(value, "__array__")
    return value if known else np.asarray(value)


def _checked_leaf(leaf):
    leaf = _array(leaf)
    kind = getattr(getattr(leaf, "dtype", None), "kind", "O")
    if isinstance(leaf, int | float | complex | Array) or kind not in "OSU":
        return leaf
    raise TypeError(
        f"a batch holds a {type(leaf).__name__} ({leaf!r:.60}), expected arrays and numbers: each "
        "batch goes through jit"
    )


def _checked_moments(found, states, total):
    """What `collect` returned for one batch, as a dict."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"collect returned a {type(found).__name__}, expected a dict from a norm's name to the "
            "jbn.moments of what it reads"
        )
    for key, m in found.items():
        if not isinstance(m, Moments):
            raise TypeError(
                f"collect returned a {type(m).__name__} for {key!r}, expected jbn.Moments: "
                "jbn.moments(x)"
            )
        if key not in states:
            raise ValueError(
                f"collect returned moments of {key!r}, expected only keys of states: {list(states)}"
            )
        if m.mean.size != states[key].mean.size:
            raise ValueError(
                f"collect returned moments of shape {m.mean.shape} for {key!r}, expected that of "
                f"its state, {states[key].mean.shape}"
            )
    if total is not None and set(total) != set(found):
        differing = sorted(map(repr, set(total) ^ set(found)))
        raise ValueError(
            f"collect returned moments of {', '.join(differing)} for some batches only, expected "
            "the same keys for every batch"
        )
    return dict(found)


def recalibrate_linen(
    apply: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    unbiased: bool = False,
    passes: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """New batch_stats for a linen model, of jbn's or Flax's BatchNorm.

    Norms are found wherever they are, also inside nn.scan, nn.vmap, nn.remat and nn.jit; only a
    scan that broadcasts batch_stats (instead of carrying or stacking it) is refused.

    Args:
        apply: function of (variables, batch) that runs the model on a batch, such as `lambda v,
            batch: model.apply(v, batch["image"], train=False)`. In train mode, with
            mutable=["batch_stats"], one pass makes the approximation.
        variables: of the model. `apply` may run a model on a part of them, of unchanged arrays.
        batches: iterated once per pass; each goes through jit.
        unbiased, passes, progress: as in `recalibrate`.

    Returns:
        The variables with new batch_stats; containers and arrays keep their types. With
        skip_nonfinite, a layer counts no batch in which it reads NaN or infinity.

    Raises:
        ValueError: as `recalibrate`; no batch_stats, no norm called, a norm inside jax.jit or
            another transform of jax's, in nnx.bridge, or whose place in `variables` cannot be told.
        TypeError: as `recalibrate`; a mapping in `variables` that JAX does not know.
    """
    example = "of (variables, batch), such as lambda v, batch: model.apply(v, batch, train=False)"
    apply = _uncompiled(validate.function(apply, "apply", example))
    found = inputs.statistics(variables)
    for held in jax.tree.leaves(variables):
        if isinstance(held, Mapping):
            raise TypeError(
                f"variables hold a {type(held).__name__}, expected a dict or a FrozenDict: JAX "
                "does not look into others"
            )
    norms = {path: State(norm["mean"], norm["var"], jnp.int32(0)) for path, norm in found.items()}

    @jax.jit
    def collect(variables, states, batch):
        means = {path: state.mean for path, state in states.items()}
        run = lambda: apply(_with(variables, states), batch)
        return _for_all(states, inputs.collect_linen(run, means))

    def compiled(states, batch):
        try:
            return collect(variables, states, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(inputs.lost()) from error

    # Where nn.scan or nn.vmap stacks layers, the leading axes of a mean count them.
    chain = sum(math.prod(state.mean.shape[:-1]) for state in norms.values())
    options = {"unbiased": unbiased, "passes": passes, "progress": progress}
    return _with(variables, _run(compiled, norms, batches, chain=chain, **options))


def recalibrate_nnx(
    model: nnx.Module,
    batches: Iterable[Any],
    apply: Callable = lambda m, x: m(x),
    *,
    unbiased: bool = False,
    passes: int | None = None,
    progress: bool = False,
) -> None:
    """New statistics, in place, for an nnx model of jbn's or Flax's BatchNorm.

    Norms are found wherever they are, also inside nnx.scan, nnx.vmap, nnx.remat and nnx.jit; only a
    scan that broadcasts the norm (in_axes None) is refused. With skip_nonfinite, a layer counts no
    batch in which it reads NaN or infinity.

    Args:
        model: in eval mode for exact statistics; in train mode one pass makes the approximation.
        batches: iterated once per pass; each goes through jit.
        apply: function of (model, batch) that runs the model on a batch.
        unbiased, passes, progress: as in `recalibrate`.

    Raises:
        ValueError: as `recalibrate`; no norm called, a norm inside jax.jit or another transform of
            jax's, or a linen norm in nnx.bridge.
        TypeError: as `recalibrate`; model is no nnx.Module.
    """
    flax_common.expect_nnx(model, "recalibrate_linen")
    validate.function(apply, "apply", "of (model, batch), such as lambda m, x: m(x)")
    norms = inputs.nnx_norms(model)
    graph, variables = nnx.split(model)
    apply = _uncompiled(apply)

    @jax.jit
    def collect(variables, states, batch):
        copy = nnx.merge(graph, variables)
        for path, norm in inputs.nnx_norms(copy).items():
            norm.mean.set_value(states[path].mean)
            norm.var.set_value(states[path].var)
        return _for_all(states, inputs.collect_nnx(lambda m: apply(m, batch), copy))

    states = {
        path: State(norm.mean[...], norm.var[...], jnp.int32(0)) for path, norm in norms.items()
    }
    chain = sum(norm.mean.size // norm.num_features for norm in norms.values())
    options = {"unbiased": unbiased, "passes": passes, "progress": progress}
    new = _run(functools.partial(collect, variables), states, batches, chain=chain, **options)
    for path, state in new.items():
        norms[path].mean.set_value(state.mean)
        norms[path].var.set_value(state.var)


def _uncompiled(apply):
    """What jax.jit compiles would keep the moments inside: the function under it."""
    while hasattr(apply, "lower") and hasattr(apply, "__wrapped__"):
        apply = apply.__wrapped__
    return apply


def _for_all(states, found):
    """Moments for every state: those of nothing where the model did not call the norm."""
    return {path: found.get(path, totals.empty(state.mean)) for path, state in states.items()}


def _replaced(state, m, unbiased, batches):
    """The state by the moments of all batches; what they did not count keeps its values.

    A state narrower than float32 is no obstacle here, as nothing is averaged into its old values.
    """
    m = Moments(*(value.reshape(state.mean.shape) for value in m))
    wide = lambda value: value.astype(jnp.promote_types(value.dtype, jnp.float32))
    old = state._replace(mean=wide(state.mean.real), var=wide(state.var))
    new = functional.update_state(
        old, m._replace(mean=m.mean.real), momentum=0.0, unbiased=unbiased
    )
    mean = new.mean.astype(state.mean.real.dtype)
    if jnp.iscomplexobj(m.mean):
        imaginary = jnp.where(m.count > 0, m.mean.imag, jnp.imag(state.mean))
        mean = jax.lax.complex(new.mean, imaginary.astype(new.mean.dtype))
    return State(mean, new.var.astype(state.var.dtype), jnp.asarray(batches, state.count.dtype))


def _equal(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _with(variables, states):
    """The variables with the statistics of `states`, in containers of the same types."""

    def replaced(keys, value):
        collection, *path = (getattr(key, "key", None) for key in keys)
        name = path.pop() if path else None
        state = states.get(tuple(path)) if collection == "batch_stats" else None
        return getattr(state, name) if state is not None and name in ("mean", "var") else value

    return jax.tree_util.tree_map_with_path(replaced, variables)


def _shown(batches, progress, number):
    if not progress:
        return batches
    try:
        import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'jbn[examples]'") from error
    return tqdm.tqdm(batches, desc=f"recalibrate, pass {number + 1}")
