"""JSON: written so that every reader takes it, and read with one set of messages.

Knows nothing of what it says. Invariants: what is written holds no NaN or Infinity, which JSON has no words for, and no
character that ends a line or steers a terminal, and reads back as the same values; whatever is read, the answer is an
object or an error of ours that says where it stood.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcllm.errors import ConfigError, ModelError, RcllmError
from rcllm.words import brief

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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


def as_json(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as JSON would give it back; NaN and infinity become None."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)), parse_constant=lambda name: None)
    return plain


def read_object(text: str | bytes, where: str, error: type[RcllmError] = ConfigError) -> dict[str, Any]:
    """The JSON object that a text holds. Raises `error`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        said = f"it is not JSON: {wrong}" if text.strip() else "expected a JSON object, got nothing"
        raise error(f"{where}{': ' * bool(where)}{said}") from wrong
    if not isinstance(value, dict):
        raise error(f"{where}{': ' * bool(where)}expected a JSON object, got {brief(value)}")
    return value


def read_json(path: Path, of: str = "a Hugging Face model folder") -> dict[str, Any]:
    """The JSON object in `path`, a file of what `of` says in words. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; expected {_told(path.parent, of)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_json_if_there(path: Path, of: str = "a Hugging Face model folder") -> dict[str, Any]:
    """The same, and an empty object where there is no such file. Raises ModelError."""
    return read_json(path, of) if path.exists() else {}


def _told(folder: Path, of: str) -> str:
    return f"{of}, and {folder} is a file" if folder.is_file() else of
