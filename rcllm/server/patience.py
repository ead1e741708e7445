"""Connections that wait too long for the head of a request are closed: those of clients that trickle bytes, or fell.

On top of uvicorn's protocol, which waits for ever. Knows nothing of what is asked; how long a body may take is part of
`server.timeout_s`. Invariant: a connection whose request is being answered, or that rests between two, is left alone.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 20.0  # from the first byte, or from the connection, to the end of the head


class Patience(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with a clock beside it."""

    head_s = HEAD_S
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._unwatch()
        elif self._due is None:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        self._due = self.loop.call_later(self.head_s, self._give_up)

    def _unwatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        self._due = None
        if not self._is_answering and not self.transport.is_closing():
            self.transport.close()
