"""Turns: whoever no longer waits is in nobody's way."""

from __future__ import annotations

import pytest

from rcllm.engine.turns import Turns


def test_an_interrupt_while_waiting_leaves_the_turn_to_others() -> None:
    """A regression: who was interrupted stayed first in the queue, and nobody ever computed again."""
    turns = Turns()

    def interrupted() -> bool:
        raise KeyboardInterrupt

    assert turns.acquire()
    with pytest.raises(KeyboardInterrupt):
        turns.acquire(unless=interrupted)
    turns.release()
    assert turns.acquire_now()
