"""JSON files of a folder of a model, tokenizer or adapter, read with one set of messages.

Knows nothing of what they say. Invariant: whatever is in the file, the answer is a JSON object or a ModelError that
names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcllm.errors import ModelError


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
