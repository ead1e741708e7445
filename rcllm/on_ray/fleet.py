"""Replicas as Ray Serve reaches them, the ledger as a Ray actor, and questions from one replica to others.

Invariant: the death of a replica is told as `LostError`, and nothing else is; what a replica raises otherwise is a
mistake of ours and goes up as it is.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import Context
from typing import Any, cast

import ray
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from rcllm.core.ranking import ContentKey
from rcllm.on_ray.aim import Named
from rcllm.on_ray.envelope import Envelope, Get, Has, LostError, Outcome
from rcllm.on_ray.ledger import Ledger, Page

_NAMESPACE = "rcllm"


class RayFleet:
    """See `backend.Fleet`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._whole = handle.options(method_name="handle")
        self._stream = handle.options(method_name="stream", stream=True)

    async def ask(self, envelope: Envelope) -> Outcome:
        response = _apart(self._whole, envelope)
        try:
            return cast(Outcome, await response)
        except RayActorError as error:
            raise LostError(type(error).__name__) from error
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, envelope: Envelope) -> AsyncIterator[tuple[int, ...] | Outcome]:
        parts = _apart(self._stream, envelope)
        try:
            async for part in parts:
                yield part
        except RayActorError as error:
            raise LostError(type(error).__name__) from error
        finally:
            parts.cancel()


class PeerQuestions:
    """`peers.Question`, for threads that may wait."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float) -> None:
        self._handle, self._timeout_s = handle.options(method_name="handle"), timeout_s

    def __call__(self, nodes: Sequence[int], ask: Has | Get) -> Mapping[int, Mapping[ContentKey, object]]:
        end = time.monotonic() + self._timeout_s
        asked = {
            node: _apart(self._handle, Envelope(uuid.uuid4().hex, ask, node=node, aim=Named(node))) for node in nodes
        }
        answers = {}
        for node, response in asked.items():
            try:
                outcome = response.result(timeout_s=max(0.0, end - time.monotonic()))
            except (RayActorError, TimeoutError):
                response.cancel()
                continue
            if not outcome.missed and outcome.error is None:
                answers[node] = outcome.value
        return answers


def _apart(handle: DeploymentHandle, envelope: Envelope) -> Any:
    """Sends it as a request of its own.

    Ray Serve gives what is asked during one request the identity of that request, and of two such questions that wait
    to be routed at the same time it loses one (2.60).
    """
    return Context().run(handle.remote, envelope)


# ---- the ledger ------------------------------------------------------------------------------------------------------


class _LedgerActor:
    """A ledger in a process of its own: replicas and the HTTP side may die without it."""

    def __init__(self) -> None:
        self._ledger = Ledger()

    def version(self) -> int:
        return self._ledger.version

    def adopt(self, ledger: Ledger) -> int:
        self._ledger.adopt(ledger)
        return self._ledger.version

    def since(self, version: int) -> Page:
        return self._ledger.since(version)

    def whole(self) -> Ledger:
        return self._ledger


class RayLedger:
    """See `backend.Keeper` and `worker.Changes`. `run`: names the start of the cluster that it belongs to."""

    def __init__(self, run: str) -> None:
        actor = ray.remote(_LedgerActor)
        options: dict[str, Any] = {"lifetime": "detached", "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._actor = actor.options(
            name=_ledger_name(run), namespace=_NAMESPACE, get_if_exists=True, **options
        ).remote()

    async def version(self) -> int:
        return int(await self._actor.version.remote())

    async def adopt(self, ledger: Ledger) -> int:
        return int(await self._actor.adopt.remote(ledger))

    async def since(self, version: int) -> Page:
        return cast(Page, await self._actor.since.remote(version))

    async def whole(self) -> Ledger:
        """A copy of all of it."""
        return cast(Ledger, await self._actor.whole.remote())


def end_ledger(run: str) -> None:
    """Lets the ledger of a run go."""
    try:
        ray.kill(ray.get_actor(_ledger_name(run), namespace=_NAMESPACE))
    except ValueError:  # nobody has begun it
        return


def _ledger_name(run: str) -> str:
    return f"ledger of {run}"
