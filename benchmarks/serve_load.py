"""A load generator for one server on this machine: sends each request when it is due, and tells what became of it.

Runs in a process of its own, so that the server's interpreter is the server's alone. Knows nothing of rankings.
Invariants: it speaks to the loopback alone; every request has one outcome; it ends by itself within `Plan.most_s`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

_GRACE_S = 30.0  # for the process to begin and end
_OPEN = httpx.Limits(max_connections=None, max_keepalive_connections=64)


@dataclasses.dataclass(frozen=True)
class Shot:
    """One request."""

    body: str
    at_s: float = 0.0  # from the beginning; of no meaning in a lane
    path: str = "/v1/rank"
    method: str = "POST"
    leave_s: float | None = None  # the client hangs up after so long


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is sent. A lane is asked one after the other: over and over while `shots` are under way, or once without."""

    address: str
    most_s: float  # what is not answered by then is given up
    shots: tuple[Shot, ...] = ()
    lanes: tuple[tuple[Shot, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Sent:
    """What became of one request."""

    path: str
    at_s: float  # when it was sent
    took_s: float
    status: int | None  # None: no answer came
    code: str = ""  # of the error, or what went wrong on the way
    has_left: bool = False  # the client hung up, as it was told to
    in_lane: bool = False
    degraded: bool = False  # the answer says that it gave something up for its deadline


def run_load(plan: Plan, meanwhile: Callable[[], object] = lambda: None) -> list[Sent]:
    """Runs the plan in a process of its own; `meanwhile` is called every second."""
    assert plan.address.startswith("http://127.0.0.1:"), "load is for a server of this benchmark alone"
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "plan.json"), Path(folder, "sent.json")
        asked.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.serve_load", str(asked), str(told)])
        end = time.monotonic() + plan.most_s + _GRACE_S
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(1.0)
                meanwhile()
        finally:
            process.kill()
            process.wait()
        return [Sent(**each) for each in json.loads(told.read_text(encoding="utf-8"))]


def main() -> None:
    asked, told = map(Path, sys.argv[1:])
    read = json.loads(asked.read_text(encoding="utf-8"))
    shots, *lanes = (tuple(Shot(**each) for each in some) for some in (read["shots"], *read["lanes"]))
    plan = Plan(read["address"], read["most_s"], shots, tuple(lanes))
    sent = asyncio.run(_run(plan))
    told.write_text(json.dumps([dataclasses.asdict(each) for each in sent]), encoding="utf-8")


async def _run(plan: Plan) -> list[Sent]:
    async with httpx.AsyncClient(base_url=plan.address, timeout=plan.most_s, limits=_OPEN, trust_env=False) as http:
        return await _Sender(http, plan).run()


class _Sender:
    """Sends one plan."""

    def __init__(self, http: httpx.AsyncClient, plan: Plan) -> None:
        self._http, self._plan = http, plan
        self._start = time.perf_counter()
        self._in_lanes: list[Sent] = []
        self._is_over = not plan.shots  # without any, lanes are gone through once

    async def run(self) -> list[Sent]:
        lanes = [asyncio.create_task(self._lane(each)) for each in self._plan.lanes]
        tasks = {asyncio.create_task(self._due(shot)): shot for shot in self._plan.shots}
        if tasks:
            await asyncio.wait(tasks, timeout=self._plan.most_s)
            self._is_over = True
        if lanes:
            await asyncio.wait(lanes, timeout=max(1.0, self._plan.most_s - self._now()))
        found = [
            task.result() if task.done() else Sent(shot.path, shot.at_s, self._now() - shot.at_s, None, "given up")
            for task, shot in tasks.items()
        ]
        for task in (*tasks, *lanes):
            task.cancel()
        return found + self._in_lanes

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _due(self, shot: Shot) -> Sent:
        await asyncio.sleep(shot.at_s - self._now())
        return await self._send(shot)

    async def _lane(self, shots: Sequence[Shot]) -> None:
        while True:
            for shot in shots:
                self._in_lanes.append(dataclasses.replace(await self._send(shot), in_lane=True))
                if self._is_over and self._plan.shots:
                    return
            if self._is_over:
                return

    async def _send(self, shot: Shot) -> Sent:
        at_s = self._now()
        try:
            async with asyncio.timeout(shot.leave_s):
                reply = await self._http.request(shot.method, shot.path, content=shot.body)
        except TimeoutError:
            return Sent(shot.path, at_s, self._now() - at_s, None, has_left=True)
        except httpx.HTTPError as error:
            return Sent(shot.path, at_s, self._now() - at_s, None, type(error).__name__)
        took_s = self._now() - at_s
        told = reply.json() if reply.headers.get("content-type", "").startswith("application/json") else {}
        code = "" if reply.status_code < 400 else str(told.get("error", {}).get("code", ""))
        return Sent(shot.path, at_s, took_s, reply.status_code, code, degraded="degraded" in told)


if __name__ == "__main__":
    main()
