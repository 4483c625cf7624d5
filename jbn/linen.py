"""A drop-in `flax.linen.BatchNorm`: change the import and nothing else."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jbn.core import flax_common
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
        activation: elementwise function, applied last. jax.nn.relu, leaky_relu, silu and gelu are
            fused.
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
    implementation: str | None = None

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

    Same variables and attributes (there are no virtual batches). Small batches gain from it; so do
    dependent ones, as in reinforcement learning. r_max=1, d_max=0 makes it `BatchNorm`, bit for
    bit.

    Attributes:
        r_max: limit of the correction of the standard deviation, >= 1.
        d_max: limit of the correction of the mean, in running standard deviations, >= 0.

    Reference: Ioffe 2017; its limits start at 1 and 0 and reach 3 and 5: give a schedule's values
        to the call.
    """

    r_max: Any = 3.0
    d_max: Any = 5.0

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
            r_max, d_max: in place of the attributes; may be traced.
        """
        limits = {
            "r_max": self.r_max if r_max is None else r_max,
            "d_max": self.d_max if d_max is None else d_max,
        }
        return _call(self, x, use_running_average, mask=mask, residual=residual, limits=limits)


def _call(layer, x, use_running_average, *, mask, residual, limits=None):
    """The body of both modules: a function, because nn.tabulate shows a row for each method."""
    use_running_average = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    x = jnp.asarray(x)
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
        State(mean.value, var.value, jnp.zeros((), jnp.int32)),
        use_running_average=bool(use_running_average),
        dtype=flax_common.output_dtype(x, params, layer.dtype),
        initializing=layer.is_initializing(),
        mask=mask,
        residual=residual,
        limits=limits,
    )
    if layer.update_stats and not use_running_average and not layer.is_initializing():
        mean.value, var.value = new.mean, new.var
    return y
