"""Whether a request is taken in, or told at once to come again: a bounded queue, bounded waiting.

A pure decision over what the request would find. Never imports torch. Invariant: an idle engine refuses nobody, and a
tenant that has less than its part of the queue is not refused because others fill it.
"""

from __future__ import annotations

from rcllm.config import ScheduleConfig
from rcllm.errors import OverloadedError
from rcllm.schedule.work import Queue

_SHORTEST_WAIT_S = 0.05


def refusal(config: ScheduleConfig, queue: Queue, running_ms: float = 0.0) -> OverloadedError | None:
    """The error for a request that finds `queue`, None where it is taken in.

    running_ms: until the pass that runs has ended, by estimate. Of a queue of `max_waiting` each of n tenants may fill
    the n-th part while others wait too; who was alone and filled more keeps it, and adds nothing.
    """
    max_waiting = config.max_waiting or 0
    part = max(1, max_waiting // queue.num_tenants)
    if max_waiting and queue.num_own >= part:
        each_ms = queue.ahead_ms / max(queue.num_own, 1)
        return OverloadedError(
            f"{queue.num_waiting} requests wait, {queue.num_own} of this tenant, which may have {part} of the "
            f"{max_waiting} of schedule.max_waiting: ask again later",
            _seconds(running_ms + each_ms * (queue.num_own - part + 1)),
        )
    wait_ms = running_ms + queue.ahead_ms
    if config.max_wait_ms and queue.num_waiting and wait_ms > config.max_wait_ms:
        return OverloadedError(
            f"it would wait {wait_ms:,.0f} ms, longer than the {config.max_wait_ms:,.0f} of schedule.max_wait_ms: ask "
            "again later",
            _seconds(wait_ms - config.max_wait_ms),
        )
    return None


def too_late(deadline_ms: float, wait_ms: float, needs_ms: float) -> OverloadedError:
    """The error for a request that would be in time, were there nobody before it."""
    return OverloadedError(
        f"it would wait {wait_ms:,.0f} ms and take {needs_ms:,.0f}, more than the {deadline_ms:,.0f} until its "
        "deadline: ask again later",
        _seconds(wait_ms + needs_ms - deadline_ms),
    )


def _seconds(ms: float) -> float:
    return max(ms / 1e3, _SHORTEST_WAIT_S)
