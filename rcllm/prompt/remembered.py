"""Texts as token ids, and a memory of recent ones that is bounded in bytes.

Knows nothing of tokenizers. Invariant: what is kept never takes more than its budget, as Python counts its objects,
and one long text cannot push out the many short ones.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from rcllm.core.ranking import TokenIds
from rcllm.prompt.keys import token_bytes

_ENTRY_BYTES = 350  # of the table itself, and of the objects in it, per text
_ID_BYTES = 32
_LARGEST_SHARE = 1 / 256  # of the budget, that one text may take


@dataclass(frozen=True, slots=True)
class Written:
    """The tokens of one text."""

    ids: TokenIds
    cut: bool = False  # there was more
    empty: bool = False  # there was nothing: it reads EMPTY_TEXT
    hashed: bytes = field(init=False, repr=False, compare=False)  # the ids, as keys are made of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "hashed", token_bytes(self.ids))


class Remembered:
    """Calls `write` for a text, and a limit of tokens, that it does not know. The least recently used go first.

    Safe to share. Uses are noted once it is half full.
    """

    def __init__(self, write: Callable[[str, int], Written], max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._write = write
        self._known: OrderedDict[tuple[str, int], Written] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, text: str, max_tokens: int) -> Written:
        name = (text, max_tokens)
        if (known := self._known.get(name)) is not None:
            if self.num_bytes > self.max_bytes // 2:  # before, nothing will have to go for long
                self._note_use(name)
            return known
        written = self._write(text, max_tokens)
        if _bytes(text, written) <= self.max_bytes * _LARGEST_SHARE:
            self._keep(name, written)
        return written

    def __len__(self) -> int:
        return len(self._known)

    def _note_use(self, name: tuple[str, int]) -> None:
        with self._lock:
            if name in self._known:  # another thread may have pushed it out
                self._known.move_to_end(name)

    def _keep(self, name: tuple[str, int], written: Written) -> None:
        with self._lock:
            if name not in self._known:  # another thread may have been faster
                self._known[name] = written
                self.num_bytes += _bytes(name[0], written)
            while self.num_bytes > self.max_bytes:
                (text, _), gone = self._known.popitem(last=False)
                self.num_bytes -= _bytes(text, gone)


def _bytes(text: str, written: Written) -> int:
    sizes = sys.getsizeof(text) + sys.getsizeof(written.ids) + sys.getsizeof(written.hashed)
    return sizes + _ID_BYTES * len(written.ids) + _ENTRY_BYTES
