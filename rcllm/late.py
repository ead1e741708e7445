"""A module that is imported when it is first used: the one place where the product waits with an import.

`rcllm --help` needs the names of options, not torch, numpy or pydantic. Knows nothing of what it imports.
"""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """Stands for a module, and imports it at the first look for one of its names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def look_up(where: str) -> Any:
    """The object at `package.module:name`."""
    module, _, name = where.partition(":")
    return getattr(Late(module), name)
