"""Token ids of recent texts, bounded in bytes.

Knows nothing of tokenizers. Invariant: what is kept never takes more than its budget, as Python counts its objects,
and one long text cannot push out the many short ones.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable

from rcllm.core.ranking import TokenIds

_ENTRY_BYTES = 200  # of the table itself, per text
_ID_BYTES = 32
_LARGEST_SHARE = 1 / 256  # of the budget, that one text may take


class Remembered:
    """Calls `encode` for a text that it does not know. The least recently used go first. Safe to share.

    Uses are noted once it is half full.
    """

    def __init__(self, encode: Callable[[str], TokenIds], max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._encode = encode
        self._known: OrderedDict[str, TokenIds] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, text: str) -> TokenIds:
        if (known := self._known.get(text)) is not None:
            if self.num_bytes > self.max_bytes // 2:  # before, nothing will have to go for long
                self._note_use(text)
            return known
        ids = self._encode(text)
        if _bytes(text, ids) <= self.max_bytes * _LARGEST_SHARE:
            self._keep(text, ids)
        return ids

    def __len__(self) -> int:
        return len(self._known)

    def _note_use(self, text: str) -> None:
        with self._lock:
            if text in self._known:  # another thread may have pushed it out
                self._known.move_to_end(text)

    def _keep(self, text: str, ids: TokenIds) -> None:
        with self._lock:
            if text not in self._known:  # another thread may have been faster
                self._known[text] = ids
                self.num_bytes += _bytes(text, ids)
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= _bytes(*self._known.popitem(last=False))


def _bytes(text: str, ids: TokenIds) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + _ID_BYTES * len(ids) + _ENTRY_BYTES
