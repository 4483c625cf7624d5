"""A drop-in `flax.nnx.BatchNorm`: change the import and nothing else."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from jax import Array, lax
from jax.nn import initializers

from jbn.core import flax_common
from jbn.types import Params, State


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
        activation: elementwise function, applied last. jax.nn.relu, leaky_relu, silu and gelu are
            fused.
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
        implementation: str | None = None,
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
        return self._call(x, use_running_average, mask, residual)

    def _call(self, x, use_running_average, mask, residual, limits=None):
        use_running_average = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average is None, expected a bool: give it to the constructor or "
            "to the call, or set it by train(), eval() or nnx.view(model, use_running_average=...)",
        )
        x = jnp.asarray(x)
        state = State(self.mean[...], self.var[...], jnp.zeros((), jnp.int32))
        x, params, dtype = self._promote(x, state)
        y, new = flax_common.batch_norm(
            self,
            x,
            params,
            state,
            use_running_average=bool(use_running_average),
            dtype=dtype,
            mask=mask,
            residual=residual,
            limits=limits,
        )
        if self.update_stats and not use_running_average:
            _store(self.mean, new.mean)
            _store(self.var, new.var)
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

    Same variables and arguments (there are no virtual batches). Small batches gain from it; so do
    dependent ones, as in reinforcement learning. r_max=1, d_max=0 makes it `BatchNorm`, bit for
    bit.

    Arguments:
        r_max: limit of the correction of the standard deviation, >= 1.
        d_max: limit of the correction of the mean, in running standard deviations, >= 0.
        options: those of `BatchNorm`.

    Reference: Ioffe 2017; its limits start at 1 and 0 and reach 3 and 5: give a schedule's values
        to the call.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **options)
        self.r_max = r_max
        self.d_max = d_max

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
            r_max, d_max: in place of the constructor's; may be traced.
        """
        limits = {
            "r_max": self.r_max if r_max is None else r_max,
            "d_max": self.d_max if d_max is None else d_max,
        }
        return self._call(x, use_running_average, mask, residual, limits)


def _store(variable, value):
    """Store a statistic, through which no gradient flows, as in flax.

    A mean that became complex, or statistics that were widened, change the variable's dtype.
    """
    value = lax.stop_gradient(value)
    if value.dtype == variable.dtype:
        variable[...] = value
    else:
        variable.set_value(value)
