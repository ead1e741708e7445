"""When an answer is complete, and its text. Never imports torch.

Knows nothing of how tokens come about. Invariant: the text of an answer holds none of its stop strings, wherever token
boundaries fall, and no token after the one that ended it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rcllm.core.decoding import FinishReason

Decode = Callable[[Sequence[int]], str]


class Ending:
    """Of one answer. Ask `reason` after every token."""

    def __init__(self, decode: Decode, eos_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> None:
        self._decode, self._eos_ids = decode, frozenset(eos_ids)
        self._stop, self.max_tokens = tuple(stop), max_tokens
        # A token has at least one byte, so a stop string that just became complete lies within so many tokens; three
        # more, for the other bytes of a character that the window cuts.
        self._window = max((len(text.encode()) for text in stop), default=0) + 3

    def reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Why the answer ends with the last of `token_ids`; None: it goes on."""
        if token_ids[-1] in self._eos_ids:
            return "eos"
        if self._stop and self._first_stop(self._decode(token_ids[-self._window :])) is not None:
            return "stop"
        return "length" if len(token_ids) >= self.max_tokens else None

    def text(self, token_ids: Sequence[int]) -> str:
        """Of a complete answer."""
        text = self._decode(token_ids[:-1] if token_ids[-1] in self._eos_ids else token_ids)
        return text[: self._first_stop(text)]

    def _first_stop(self, text: str) -> int | None:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(places, default=None)
