"""A drop-in `flax.nnx.BatchNorm`: change the import and nothing else."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from jax import Array, lax
from jax.nn import initializers

from jbn import fusing
from jbn.core import flax_common, switch, validate
from jbn.kernels.backends import Implementation
from jbn.types import Params, State

Model = TypeVar("Model")


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with the arguments, defaults, variables and output dtype of
    `flax.nnx.BatchNorm`.

        scale, bias: nnx.Param of shape (num_features,), param_dtype, or nnx.data(None)
        mean, var: nnx.BatchStat, likewise, float32 and never rounded to `dtype`

    It is exact where flax is not. The variance is right when the mean is far larger than the
    standard deviation. Means over masks and devices are weighted by count. Masked elements have no
    influence, even if they are NaN. A batch that is masked altogether, or has no examples, leaves
    the statistics alone.

    Options are checked in the call, and only in a mode that uses them: a model trained under pmap
    with an axis_name can be evaluated anywhere.

    Arguments of flax's that mean something else here:
        use_fast_variance: accepted for compatibility. Both values give the same, stable variance;
            nothing is slower.
        dtype: of y. Neither x nor the statistics are rounded to it before the mean is subtracted.
        promote_dtype: a function other than flax's own is called as in flax, but the mean and var
            that it returns are not used.
        momentum: in [0, 1]. None (a cumulative average) is refused in training, because flax's
            variables hold no count.

    Arguments that flax's does not have:
        activation: elementwise function, applied last. jax.nn.relu, leaky_relu, relu6, silu, gelu
            are fused.
        virtual_batch_size: examples along axis 0 that are normalized together (ghost batches); None
            for all.
        unbiased: keep n / (n - 1) times the variance in var, as PyTorch does, where a count n of at
            least 2 allows it.
        skip_nonfinite: leave mean and var alone when the batch holds NaN or infinity.
        update_stats: False normalizes by the batch without touching mean and var.
        implementation: None to choose, or a name as in `jbn.batch_norm_train`.

    Reference: Ioffe & Szegedy 2015.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Any = -1,
        momentum: Any = 0.99,
        epsilon: Any = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable = initializers.zeros,
        scale_init: Callable = initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Callable[[Array], Array] | None = None,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        skip_nonfinite: bool = False,
        update_stats: bool = True,
        implementation: Implementation | None = None,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.skip_nonfinite = skip_nonfinite
        self.update_stats = update_stats
        self.implementation = implementation

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize x, and update mean and var unless use_running_average is True.

        Args:
            x: array of any dtype and rank.
            use_running_average: normalize by mean and var instead of by the batch; goes before the
                constructor's.
            mask: bool, broadcastable to x; False elements count for nothing, even if they are NaN.
            residual: floating array of x's shape, added before the activation.

        Returns:
            y, x's shape; its dtype is `dtype`, or what x, scale, bias, mean and var promote to.

        Raises:
            ValueError, TypeError: an option out of range, arrays that do not fit x.
            NotImplementedError: an implementation that cannot run here.
        """
        return self._call(x, self._evaluating(use_running_average), mask, residual)

    def _evaluating(self, use_running_average):
        return bool(
            first_from(
                use_running_average,
                self.use_running_average,
                error_msg="use_running_average is None, expected a bool: give it to the "
                "constructor or to the call, or set it by train(), eval() or "
                "nnx.view(model, use_running_average=...)",
            )
        )

    def _call(self, x, use_running_average, mask, residual, limits=None, steps=None):
        x = validate.jax_array(x)
        count = jnp.zeros((), jnp.int32) if steps is None else steps[...]
        state = State(self.mean[...], self.var[...], count)
        x, params, dtype = self._promote(x, state)
        y, new = flax_common.batch_norm(
            self,
            x,
            params,
            state,
            use_running_average=use_running_average,
            dtype=dtype,
            mask=mask,
            residual=residual,
            limits=limits,
        )
        if self.update_stats and not use_running_average:
            _store(self.mean, new.mean)
            _store(self.var, new.var)
            if steps is not None:
                _store(steps, new.count)
        return y

    def _promote(self, x, state):
        """x and the parameters to compute with, and flax's dtype of y."""
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        params = Params(scale, bias)
        if self.promote_dtype is dtypes.promote_dtype and not jnp.iscomplexobj(x):
            # Flax's own function only casts. Nothing is rounded before the mean is subtracted.
            return x, params, flax_common.output_dtype(x, params, self.dtype, *state[:2])
        with jax.numpy_dtype_promotion("standard"):  # the promotion is asked for
            x, _, _, scale, bias = self.promote_dtype(
                (x, state.mean, state.var, scale, bias), dtype=self.dtype
            )
        params = Params(scale, bias)
        return x, params, flax_common.output_dtype(x, params, self.dtype)


class BatchRenorm(BatchNorm):
    """Batch renormalization: `BatchNorm` whose training output is corrected toward the running
    statistics.

    The arguments are those of `BatchNorm` (virtual batches are refused), and so are the variables,
    with one more where a schedule asks for it:

        steps: nnx.BatchStat, int32 scalar, updates so far; only with warmup_steps or a function

    Small batches gain from it; so do dependent ones, as in reinforcement learning. r_max=1, d_max=0
    makes it `BatchNorm`, bit for bit.

    Arguments:
        r_max: limit of the correction of the standard deviation, >= 1: a number, or a function of
            `steps` such as the paper's optax.linear_schedule(1, 3, 35_000, 5_000).
        d_max: limit of the correction of the mean, in running standard deviations, >= 0: likewise,
            such as the paper's optax.linear_schedule(0, 5, 20_000, 5_000).
        warmup_steps: updates during which the layer is plain batch norm, whatever r_max and d_max
            are; None for none. CrossQ's layer has 100_000.
        options: those of `BatchNorm`.

    Reference: Ioffe 2017; Bhatt et al. 2024 (CrossQ).
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | Callable[[Array], Any] = 3.0,
        d_max: float | Callable[[Array], Any] = 5.0,
        warmup_steps: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **options)
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        if flax_common.needs_steps(self):
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

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
            r_max, d_max: in place of the constructor's, during warmup_steps too; may be traced.
        """
        evaluating = self._evaluating(use_running_average)
        steps = self.steps if flax_common.needs_steps(self) and not evaluating else None
        limits = None
        if not evaluating:
            count = None if steps is None else steps[...]
            limits = flax_common.renorm_limits(self, count, r_max, d_max)
        return self._call(x, evaluating, mask, residual, limits, steps)


def replace(
    model: Model,
    *,
    by_path: Mapping[str, Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> Model:
    """The same model, every `flax.nnx.BatchNorm` in it turned into jbn's `BatchNorm`, in place.

        model = jbn.nnx.replace(SomebodysResNet(rngs=nnx.Rngs(0)), skip_nonfinite=True)

    The layers stay the same objects with the same Variables, so that optimizers, and whatever else
    refers to a layer, go on as before. `restore` is the way back. `fuse` computes the norms of a
    function together with the activations that follow them.

    Subclasses of flax's layer are left alone, with a warning that names them; jbn's own layers are
    left alone without one. A layer that `replace` turned before gets the new options over its old
    ones.

    Args:
        model: an nnx module, such as a BatchNorm itself, or a list or dict of modules.
        by_path: options of some norms only, over the others: patterns of paths, as of
            fnmatch, such as {"layers/0/*": {"unbiased": True}, "stem": None}. Later patterns go
            before earlier ones; None leaves a norm alone. Of a shared norm one path counts, the
            first that nnx.iter_modules gives.
        options: of jbn's BatchNorm, in place of the layer's own: momentum, epsilon, dtype,
            axis_name, axis_index_groups, activation, virtual_batch_size, unbiased, skip_nonfinite,
            update_stats, implementation.

    Returns:
        model.

    Raises:
        TypeError, ValueError: an option that does not exist, or that would change variables; a
            pattern that is no norm's; a model without nnx modules. Nothing has been changed then.
    """
    _expect_modules(model)
    choice = switch.switch(options, by_path)
    norms = _norms(model)
    choice.check_patterns(norms)
    others = {}
    for path, norm in norms.items():
        own = choice.at(path)
        if type(norm) is nnx.BatchNorm or hasattr(norm, "replaced"):
            if own is not None:
                _give(norm, own)
        elif not isinstance(norm, BatchNorm):
            others[path] = norm
    if others:
        warnings.warn(switch.left_alone(others), stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """The same model, every norm that `replace` made jbn's turned back into flax's, in place.

    Args:
        model: what `replace` was given.

    Returns:
        model: with flax's layers, their options as they were, the Variables as training left them.

    Raises:
        TypeError: a model without nnx modules.
    """
    _expect_modules(model)
    for norm in _norms(model).values():
        if hasattr(norm, "replaced"):
            for key, value in norm.replaced:
                setattr(norm, key, value)
            for key in (*_NEW, "replaced"):
                delattr(norm, key)
            _turn(norm, nnx.BatchNorm)
    return model


def fuse(function: Callable) -> Callable:
    """`jbn.fusing.fuse` for a function of nnx modules, which it may change.

        @nnx.jit
        def step(model, optimizer, x):
            gradients = nnx.grad(jbn.nnx.fuse(loss))(model, x)
            optimizer.update(model, gradients)

    Args:
        function: of modules, arrays, trees of them, and Python values, which are static. It may
            change the Variables of the modules that it is given, but not add or remove any.

    Returns:
        A function of the same arguments. It traces `function` at each call: call it inside nnx.jit.
    """

    @functools.wraps(function)
    def fused(*args, **kwargs):
        before, state = nnx.split((args, kwargs))
        after = before

        def pure(state):
            nonlocal after
            copies = nnx.merge(before, state)
            out = function(*copies[0], **copies[1])
            after, state = nnx.split((copies, out))
            return state

        state = fusing.fuse(pure)(state)
        copies, out = nnx.merge(after, state)
        nnx.update((args, kwargs), nnx.state(copies, nnx.Variable))
        return out

    return fused


def _expect_modules(model):
    """A module, or a list or dict with modules in it."""
    if next(iter(nnx.iter_modules(model)), None) is None:
        raise TypeError(
            f"model is a {type(model).__name__} ({model!r:.60}) without nnx modules, expected a "
            "flax.nnx.Module, or a list or dict of them: for linen there is jbn.linen.replacing"
        )


def _norms(model: Any) -> dict[Any, Any]:
    """Every batch norm in a model, subclasses too, by path."""
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)}


def _give(norm: Any, options: dict[str, Any]) -> None:
    """Make a norm jbn's if it is flax's, and give it options; `replaced` keeps what flax's had."""
    kept = dict(getattr(norm, "replaced", ()))
    if type(norm) is nnx.BatchNorm:
        _turn(norm, BatchNorm)
        options = {**_NEW, **options}
    now = {key: getattr(norm, key) for key in options if key not in _NEW}
    # A tuple, because what nnx keeps aside must be hashable.
    aside: Any = norm
    aside.replaced = tuple({**now, **kept}.items())
    for key, value in options.items():
        setattr(norm, key, value)


def _turn(norm, kind):
    """Change the class of an object, which keeps every reference to it."""
    object.__setattr__(norm, "__class__", kind)  # nnx would record it as an attribute


# The options that flax's layer does not have, with their defaults.
_NEW = {
    key: parameter.default
    for key, parameter in inspect.signature(BatchNorm.__init__).parameters.items()
    if key not in inspect.signature(nnx.BatchNorm.__init__).parameters
}


def _store(variable, value):
    """Store a statistic, through which no gradient flows, as in flax.

    A mean that became complex, or statistics that were widened, change the variable's dtype.
    """
    value = lax.stop_gradient(value)
    if value.dtype == variable.dtype:
        variable[...] = value
    else:
        variable.set_value(value)
