"""Work that shares a machine: tasks beyond its cores wait for one another, and each pass slows everything else down.

Knows nothing of requests. Cores share memory, caches and, where two of them are threads of one, what computes; so a
pass goes on more slowly beside another one, and so does what comes in and goes out. Tasks that outnumber the cores
have equal shares of them. Invariant: a task ends once, when it has done its seconds at the paces that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.sim.loop import EventKind, Loop


@dataclass(slots=True, eq=False)
class Task:
    """One that runs."""

    left_s: float  # at pace 1
    since_s: float  # when it was last looked at
    kind: EventKind
    action: Callable[[], None]
    node: int | None  # whose pass it is; None: it is none
    pace: float = 1.0  # how many times longer it takes at present
    told: int = 0  # how often its end was foretold: earlier words are void


class Machine:
    """`cores`: tasks that run at once; `crowding`: by how much each pass slows another task down."""

    def __init__(self, loop: Loop, cores: float, crowding: float, free_s: npt.NDArray[np.float64]) -> None:
        """`free_s`: [nodes], where it is noted when the pass of a node will end."""
        self._loop, self._cores, self._crowding, self._free_s = loop, cores, crowding, free_s
        self._tasks: list[Task] = []

    def begin(self, seconds: float, kind: EventKind, action: Callable[[], None], node: int | None = None) -> Task:
        """Calls `action` when so many seconds' work is done."""
        task = Task(seconds, self._loop.now, kind, action, node)
        self._tasks.append(task)
        self._set_paces(task)
        return task

    def drop(self, task: Task) -> None:
        """It ends undone."""
        if task in self._tasks:
            self._tasks.remove(task)
            self._set_paces()

    def _set_paces(self, new: Task | None = None) -> None:
        now, num_passes = self._loop.now, sum(task.node is not None for task in self._tasks)
        waits = max(1.0, len(self._tasks) / self._cores)
        for task in self._tasks:
            pace = waits * (1.0 + self._crowding * (num_passes - (task.node is not None)))
            if pace == task.pace and task is not new:
                continue
            task.left_s -= (now - task.since_s) / task.pace
            task.pace, task.since_s, task.told = pace, now, task.told + 1
            ends_s = now + max(0.0, task.left_s) * pace
            if task.node is not None:
                self._free_s[task.node] = ends_s
            self._loop.at(ends_s, task.kind, self._end, (task, task.told))

    def _end(self, what: tuple[Task, int]) -> None:
        task, told = what
        if told != task.told or task not in self._tasks:
            return
        self._tasks.remove(task)
        self._set_paces()
        task.action()
