"""Warms an engine in a thread of its own, while requests are served in between.

Knows nothing of who asks for it. Invariant: one run at a time; what is asked meanwhile is done after it; `stop` ends a
run after its pass.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace

from rcllm.core.ranking import ItemId
from rcllm.engine.engine import Engine
from rcllm.engine.warming import WarmProgress
from rcllm.errors import RcllmError, UnknownItemError
from rcllm.server.backend import Warmth

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The server goes down while items are warmed."""


class Warmer:
    """`begin` returns at once; `warmth` says how far it is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._asked = deque[tuple[ItemId, ...] | None]()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.warmth = Warmth()

    def begin(self, item_ids: tuple[ItemId, ...] | None) -> None:
        """Warms these after what was asked before; None: the whole catalogue. Raises UnknownItemError."""
        for item_id in item_ids or ():
            self._engine.prompter.item(item_id)
        with self._lock:
            self._asked.append(item_ids)
            if self._thread is None and not self._stopping:
                self.warmth = replace(self.warmth, running=True, error="")
                self._thread = threading.Thread(target=self._run, name="rcllm-warm", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping, thread = True, self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (item_ids := self._next()) is not _NOTHING:
            try:
                self._warm(item_ids)  # type: ignore[arg-type]
            except _StoppedError:
                continue
            except Exception as error:  # told in the figures; a cold cache serves all the same
                logger.warning("warming ended early: %s", type(error).__name__)
                told = str(error) if isinstance(error, RcllmError) else type(error).__name__
                self.warmth = replace(self.warmth, error=told)

    def _warm(self, item_ids: tuple[ItemId, ...] | None) -> None:
        """Items that are gone since they were asked for are left out."""
        catalogue = self._engine.catalogue
        while True:
            there = None if item_ids is None else [item_id for item_id in item_ids if item_id in catalogue]
            with suppress(UnknownItemError):  # one went just now; what is warm already is not computed again
                self._engine.warm(there, on_progress=self._progress)
                return

    def _next(self) -> object:
        with self._lock:
            if self._asked and not self._stopping:
                return self._asked.popleft()
            self._thread = None
            self.warmth = replace(self.warmth, running=False)
            return _NOTHING

    def _progress(self, now: WarmProgress) -> None:
        self.warmth = replace(
            self.warmth, done_blocks=now.done_blocks, total_blocks=now.total_blocks, full=now.full, error=""
        )
        if self._stopping:
            raise _StoppedError


_NOTHING = object()
