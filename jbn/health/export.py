"""Reports as plain Python values and strict JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The value made of dicts, lists, strings, numbers and None; numbers not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON: it holds no NaN or Infinity, which JSON does not have."""
    return json.dumps(plain(value), allow_nan=False, **options)
