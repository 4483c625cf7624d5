"""Which options each norm of a switched model gets.

`jbn.linen.replacing` and `jbn.nnx.replace` share this; how a norm is replaced, each of them knows.
"""

import dataclasses
import fnmatch
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from jbn.core import validate

# The options that change neither the variables of a norm nor how the model calls it.
ALLOWED = (
    "momentum",
    "epsilon",
    "dtype",
    "axis_name",
    "axis_index_groups",
    "activation",
    "virtual_batch_size",
    "unbiased",
    "skip_nonfinite",
    "update_stats",
    "implementation",
)


@dataclasses.dataclass(frozen=True)
class Switch:
    """The options of one switch. Hashable, as a part of the key of jit's caches.

    Attributes:
        everywhere: (name, value) of each option that all norms get.
        by_path: (pattern, options) in the order given; options None leaves the norm to flax.
    """

    everywhere: tuple[tuple[str, Hashable], ...]
    by_path: tuple[tuple[str, tuple[tuple[str, Hashable], ...] | None], ...]

    def at(self, path: Iterable[Hashable]) -> dict[str, Any] | None:
        """The options of the norm at `path`, later patterns first; None leaves the norm alone."""
        merged: dict[str, Any] | None = dict(self.everywhere)
        for pattern, own in self.by_path:
            if fnmatch.fnmatchcase(name(path), pattern):
                merged = None if own is None else {**(merged or dict(self.everywhere)), **dict(own)}
        return merged

    def check_patterns(self, paths: Iterable[Iterable[Hashable]]) -> None:
        """Raise ValueError for a pattern that matches none of `paths`."""
        names = [name(path) for path in paths]
        for pattern, _ in self.by_path:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"by_path has the pattern {pattern!r}, which is no norm's path, expected one "
                    f"that matches some of {', '.join(names) or 'no norms at all'}"
                )


def name(path: Iterable[Hashable]) -> str:
    """The path of a norm as patterns and messages have it, such as "Block_0/BatchNorm_1"."""
    return "/".join(map(str, path))


def left_alone(layers: Mapping[Any, Any]) -> str:
    """The warning about layers, by path, whose own code a switch could break."""
    which = ", ".join(f"{name(path)} ({type(layer).__name__})" for path, layer in layers.items())
    return (
        f"left alone: {which}. A subclass of flax's BatchNorm may compute something else; derive "
        "it from jbn's BatchNorm to switch it"
    )


def switch(
    options: Mapping[str, Any], by_path: Mapping[str, Mapping[str, Any] | None] | None
) -> Switch:
    """A Switch of checked options.

    Raises:
        TypeError: an option that norms do not have or that a switch cannot change; a value that is
            not hashable; a by_path that is no dict of dicts.
        ValueError: an implementation that does not exist.
    """
    own = {} if by_path is None else by_path
    validate.mapping(own, "by_path", 'a dict of options by pattern, such as {"head/*": {...}}')
    return Switch(_checked(options), tuple(map(_of_pattern, own.items())))


def _of_pattern(item):
    pattern, own = item
    if not isinstance(pattern, str):
        raise TypeError(
            f"by_path has the pattern {pattern!r}, expected a string with / between the names of a "
            'path, such as "head/*"'
        )
    if own is None:
        return pattern, None
    expected = 'a dict of options, such as {"momentum": 0.9}, or None'
    return pattern, _checked(validate.mapping(own, f"by_path[{pattern!r}]", expected))


def _checked(options):
    if unknown := sorted(map(str, set(options) - set(ALLOWED))):
        raise TypeError(
            f"options {', '.join(unknown)} cannot be given to the norms of a model that exists, "
            f"expected {', '.join(ALLOWED)}: its variables and its calls stay as they are"
        )
    validate.activation(options.get("activation"))
    validate.implementation(options.get("implementation"))
    frozen = tuple((key, _frozen(options[key])) for key in sorted(options))
    for key, value in frozen:
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{key} is {value!r}, which is not hashable, expected a Python value: the options "
                "are part of the key of jit's caches"
            ) from error
    return frozen


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
