"""JSON text that every reader takes, for everything that the package writes.

Knows nothing of what is written. Invariant: the text holds no NaN or Infinity, which JSON has no words for, and no
character that ends a line or steers a terminal; reading it back gives the same values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# JSON itself escapes the control characters below the blank. These it leaves: DEL and the C1 controls (some terminals
# obey U+009B as ESC [), the line ends that `str.splitlines` sees, and what turns the direction of a text around.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def to_json(value: object, *, indent: int | None = None) -> str:
    """Raises ValueError for numbers that are not finite; `without_nan` is for values that may lack some."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_nan(value: Any) -> Any:
    """The same value with null for every number that is not finite: a figure that could not be measured."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
