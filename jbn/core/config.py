"""The options of a layer: all that is known before tracing, in one record."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class Config(NamedTuple):
    """Static options, checked. The functions of the core read what concerns them."""

    axis: tuple[int, ...]  # feature axes, ascending; everything else is reduced
    activation: Callable | None
    dtype: Any  # of y
    implementation: str | None = None
    axis_name: Hashable | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    axis_sizes: tuple[tuple[Hashable, int], ...] = ()  # (name, size), see `sharding.named_axes`
    virtual_batch_size: int | None = None
    unbiased: bool = False
    skip_nonfinite: bool = False
