"""JSON that any reader accepts: numbers of numpy become plain ones, nan and infinities become null."""

import json
import math
from typing import Any

import numpy as np


def to_json(content: Any, indent: int | None = None) -> str:
    """Write plain data as strict JSON.

    Args:
        content: Mappings, sequences, strings, numbers, booleans, None, and numpy's scalars.
        indent: Spaces a level, or None for one line.

    Returns:
        The text, without a final newline.
    """
    return json.dumps(_plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
