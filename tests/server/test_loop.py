"""The thread that runs passes: it sleeps while nobody waits, and survives mistakes."""

from __future__ import annotations

import threading
import time

from rcllm.server.loop import Loop


class Engine:
    """Has so much work; every pass does one piece."""

    def __init__(self, work: int = 0, breaks_at: int = -1) -> None:
        self.work, self.breaks_at, self.passes = work, breaks_at, 0
        self.idle = threading.Event()

    def turn(self) -> bool:
        self.passes += 1
        if self.passes == self.breaks_at:
            raise ValueError("a mistake")
        self.work -= self.work > 0
        if not self.work:
            self.idle.set()
        return self.work > 0


def test_it_sleeps_until_somebody_waits() -> None:
    engine = Engine()
    loop = Loop([engine], lambda error: None)
    loop.start()
    time.sleep(0.02)
    assert engine.passes == 0
    engine.work = 5
    loop.wake()
    assert engine.idle.wait(5)
    loop.stop()
    assert engine.passes == 5, "it went on after the last work, or stopped before"


def test_two_engines_take_turns() -> None:
    one, other = Engine(3), Engine(6)
    loop = Loop([one, other], lambda error: None)
    loop.start()
    loop.wake()
    assert one.idle.wait(5)
    assert other.idle.wait(5)
    loop.stop()
    assert one.passes == other.passes == 6


def test_a_mistake_is_told_and_the_thread_goes_on() -> None:
    engine, told = Engine(4, breaks_at=2), list[Exception]()
    loop = Loop([engine], told.append)
    loop.start()
    loop.wake()
    assert engine.idle.wait(5)
    loop.stop()
    assert [type(error) for error in told] == [ValueError]
    assert loop.failures == 1


def test_it_ends_though_it_never_began() -> None:
    Loop([], lambda error: None).stop()
