"""A drop-in `flax.linen.BatchNorm`: change the import and nothing else."""

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jbn.core import flax_common, switch, validate
from jbn.kernels.backends import Implementation
from jbn.types import Params, State


class BatchNorm(nn.BatchNorm):
    """Batch normalization with the arguments, defaults, variables and output dtype of
    `flax.linen.BatchNorm`.

        params/{scale,bias}: param_dtype          batch_stats/{mean,var}: float32

    It is exact where flax is not. The variance is right when the mean is far larger than the
    standard deviation. Means over masks and devices are weighted by count. Masked elements have no
    influence, even if they are NaN. A batch that is masked altogether, or has no examples, leaves
    the statistics alone.

    Options are checked in the call, and only in a mode that uses them: a model trained under pmap
    with an axis_name can be evaluated anywhere.

    Attributes of flax's that mean something else here:
        use_fast_variance: accepted for compatibility. Both values give the same, stable variance;
            nothing is slower.
        force_float32_reductions: False stores the statistics in param_dtype until x is wider, as
            flax does; sums are at least float32 either way. True widens narrower statistics to
            float32 at the first update: in bfloat16 a running average stalls.
        momentum: in [0, 1]. None (a cumulative average) is refused in training, because flax's
            variables hold no count.

    Attributes that flax's does not have:
        activation: elementwise function, applied last. jax.nn.relu, leaky_relu, relu6, silu, gelu
            are fused.
        virtual_batch_size: examples along axis 0 that are normalized together (ghost batches); None
            for all.
        unbiased: keep n / (n - 1) times the variance in batch_stats, as PyTorch does, where a count
            n of at least 2 allows it.
        skip_nonfinite: leave batch_stats alone when the batch holds NaN or infinity.
        update_stats: False normalizes by the batch without touching batch_stats, which then need
            not be mutable.
        implementation: None to choose, or a name as in `jbn.batch_norm_train`.

    Reference: Ioffe & Szegedy 2015.
    """

    activation: Callable[[Array], Array] | None = None
    virtual_batch_size: int | None = None
    unbiased: bool = False
    skip_nonfinite: bool = False
    update_stats: bool = True
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize x, and update batch_stats unless use_running_average is True.

        While initializing, nothing is updated and axis_name need not exist.

        Args:
            x: array of any dtype and rank.
            use_running_average: normalize by batch_stats instead of by the batch.
            mask: bool, broadcastable to x; False elements count for nothing, even if they are NaN.
            residual: floating array of x's shape, added before the activation.

        Returns:
            y, x's shape; its dtype is `dtype`, or what x, scale and bias promote to.

        Raises:
            ValueError, TypeError: an option out of range, arrays that do not fit x.
            NotImplementedError: an implementation that cannot run here.
        """
        return _call(self, x, use_running_average, mask=mask, residual=residual)


class BatchRenorm(BatchNorm):
    """Batch renormalization: `BatchNorm` whose training output is corrected toward the running
    statistics.

    The attributes are those of `BatchNorm` (virtual batches are refused), and so are the variables,
    with one more where a schedule asks for it:

        batch_stats/steps: int32 scalar, updates so far; only with warmup_steps or a function

    Small batches gain from it; so do dependent ones, as in reinforcement learning. r_max=1, d_max=0
    makes it `BatchNorm`, bit for bit.

    Attributes:
        r_max: limit of the correction of the standard deviation, >= 1: a number, or a function of
            `steps` such as the paper's optax.linear_schedule(1, 3, 35_000, 5_000).
        d_max: limit of the correction of the mean, in running standard deviations, >= 0: likewise,
            such as the paper's optax.linear_schedule(0, 5, 20_000, 5_000).
        warmup_steps: updates during which the layer is plain batch norm, whatever r_max and d_max
            are; None for none. CrossQ's layer has 100_000.

    Reference: Ioffe 2017; Bhatt et al. 2024 (CrossQ).
    """

    r_max: Any = 3.0
    d_max: Any = 5.0
    warmup_steps: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Array | None = None,
        r_max: float | Array | None = None,
        d_max: float | Array | None = None,
    ) -> Array:
        """As `BatchNorm`.

        Args:
            x, use_running_average, mask, residual: as in `BatchNorm`.
            r_max, d_max: in place of the attributes, during warmup_steps too; may be traced.
        """
        evaluating = not self.is_initializing() and nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        steps = None
        if flax_common.needs_steps(self) and not evaluating:
            steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        limits = None
        if not evaluating:
            count = None if steps is None else steps.value
            limits = flax_common.renorm_limits(self, count, r_max, d_max)
        return _call(
            self, x, use_running_average, mask=mask, residual=residual, limits=limits, steps=steps
        )


@contextlib.contextmanager
def replacing(
    *, by_path: Mapping[str, Mapping[str, Any] | None] | None = None, **options: Any
) -> Iterator[None]:
    """A context, or a decorator, in which every `flax.linen.BatchNorm` computes as jbn's.

        with jbn.linen.replacing(skip_nonfinite=True):
            variables = model.init(key, x, train=False)
            y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])

    The model is somebody else's, and stays as it is; so do its variables, their names and paths.
    Lifted transforms (nn.scan, nn.vmap, nn.remat, nn.jit) and nn.share_scope make no difference.
    Outside the context the same model computes by flax again: jax.jit traces a function anew where
    it is called inside and outside, or under other options. A thread starts outside, and of nested
    contexts the innermost alone decides.

    Subclasses of flax's layer are left alone, with a warning that names them; jbn's own layers are
    left alone without one. An interceptor of `flax.linen.intercept_methods` that is entered inside
    does not see the replaced layers; `jbn.linen.intercept_methods` does. `jbn.fusing.fuse` computes
    the norms of a function together with the activations that follow them.

    Args:
        by_path: options of some norms only, over the others: patterns of paths, as of
            fnmatch, such as {"head/*": {"unbiased": True}, "stem/BatchNorm_0": None}. Later
            patterns go before earlier ones; None leaves a norm to flax. A pattern that no norm's
            path matches does nothing: which norms there are shows only in their calls.
        options: of jbn's BatchNorm, in place of the layer's own: momentum, epsilon, dtype,
            axis_name, axis_index_groups, activation, virtual_batch_size, unbiased, skip_nonfinite,
            update_stats, implementation.

    Raises:
        TypeError, ValueError: an option that does not exist, or that would change variables.
    """
    with _entered(switch.switch(options, by_path)):
        yield


@contextlib.contextmanager
def intercept_methods(interceptor: Callable) -> Iterator[None]:
    """`flax.linen.intercept_methods` that sees the layers of a `replacing` around it, too.

    Args:
        interceptor: function of (call, args, kwargs, context), as flax's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(nn.intercept_methods(interceptor))
        if _ACTIVE.value is not None:  # again, inside: it decides what the interceptor calls
            stack.enter_context(_entered(dataclasses.replace(_ACTIVE.value)))
        yield


# The innermost `replacing` of this thread. JAX makes it part of the key of every jit's cache.
_ACTIVE = jax.make_user_context(None)


@contextlib.contextmanager
def _entered(current):
    reported = set()

    def compute(call, args, kwargs, context):
        layer = context.module
        flaxs = isinstance(layer, nn.BatchNorm) and not isinstance(layer, BatchNorm)
        if not flaxs or context.method_name != "__call__" or _ACTIVE.value is not current:
            return call(*args, **kwargs)
        if type(layer) is not nn.BatchNorm:
            if layer.path not in reported:
                warnings.warn(switch.left_alone({layer.path: layer}), stacklevel=2)
            reported.add(layer.path)
            return call(*args, **kwargs)
        norm = as_called(layer)
        return call(*args, **kwargs) if norm is layer else _by_jbn(norm, *args, **kwargs)

    with _ACTIVE(current), nn.intercept_methods(compute):
        yield


def _by_jbn(layer, x, use_running_average=None, *, mask=None):
    """The call of flax's layer, by jbn: with its signature."""
    return _call(layer, x, use_running_average, mask=mask)


def as_called(layer: nn.BatchNorm) -> Any:
    """The layer as a `replacing` around its call has it: what `_call` reads of a layer, with the
    options given there. The layer itself where none replaces it."""
    options = None
    if type(layer) is nn.BatchNorm and _ACTIVE.value is not None:
        options = _ACTIVE.value.at(layer.path)
    if options is None:
        return layer
    new = {field.name: field.default for field in dataclasses.fields(BatchNorm)}
    own = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    scope = {key: getattr(layer, key) for key in ("variable", "param", "is_initializing")}
    return types.SimpleNamespace(**{**new, **own, **options}, **scope)


def _call(layer, x, use_running_average, *, mask=None, residual=None, limits=None, steps=None):
    """The body of both modules: a function, because nn.tabulate shows a row for each method."""
    use_running_average = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    x = validate.jax_array(x)
    features = tuple(x.shape[a] for a in flax_common.feature_axes(layer.axis, x.ndim))
    stats_dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    mean = layer.variable("batch_stats", "mean", jnp.zeros, features, stats_dtype)
    var = layer.variable("batch_stats", "var", jnp.ones, features, stats_dtype)
    params = Params(
        scale=layer.param("scale", layer.scale_init, features, layer.param_dtype)
        if layer.use_scale
        else None,
        bias=layer.param("bias", layer.bias_init, features, layer.param_dtype)
        if layer.use_bias
        else None,
    )
    y, new = flax_common.batch_norm(
        layer,
        x,
        params,
        State(mean.value, var.value, jnp.zeros((), jnp.int32) if steps is None else steps.value),
        use_running_average=bool(use_running_average),
        dtype=flax_common.output_dtype(x, params, layer.dtype),
        initializing=layer.is_initializing(),
        mask=mask,
        residual=residual,
        limits=limits,
    )
    if layer.update_stats and not use_running_average and not layer.is_initializing():
        mean.value, var.value = new.mean, new.var
        if steps is not None:
            steps.value = new.count
    return y
