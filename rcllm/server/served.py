"""What endpoints work with: the backend, what is kept, what is measured; and one request that asks.

Knows nothing of bodies or of addresses. Invariant: every request to the backend passes `Ask.answer`, where it is
counted, measured, held to the limits and kept; nothing is kept of a user who was erased after the request came.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest

from rcllm.config import ServerConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import RankRequest
from rcllm.errors import CancelledError, DeadlineError, NotServedError, RequestError, TooLargeError
from rcllm.metrics import Clock
from rcllm.plain_json import read_object
from rcllm.schedule.work import Terms
from rcllm.server.backend import KINDS, Asked, Backend, Request, Response
from rcllm.server.failures import failure_of
from rcllm.server.kept import Answers, Histories
from rcllm.server.keys import Caller
from rcllm.server.metrics import Metrics
from rcllm.server.spans import NoSpans, Spans
from rcllm.server.viewers import Viewer
from rcllm.words import nearest

OnTokens = Callable[[Sequence[int]], None]
_MAX_TENANT = 64
_AT_ONCE = 16  # answers of one body that are under way at a time: as many choices as one prompt may have
_TIMEOUT = failure_of(TimeoutError()).code


@dataclass(slots=True)
class Served:
    """One application's state."""

    backend: Backend
    config: ServerConfig
    metrics: Metrics
    answers: Answers
    histories: Histories
    viewers: tuple[Viewer, ...] = ()  # of a published data set, for the page's playground
    spans: Spans = field(default_factory=NoSpans)
    clock: Clock = time.perf_counter
    wall_clock: Clock = time.time
    is_closing: bool = False
    started_s: float = field(default_factory=time.time)

    @property
    def model(self) -> str:
        return self.config.served_name or self.backend.about.model

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name by which clients may call the one model."""
        about = self.backend.about
        return tuple(dict.fromkeys((self.model, about.model, about.model.rstrip("/").rpartition("/")[2], "rcllm")))


@dataclass(slots=True)
class Ask:
    """One HTTP request."""

    served: Served
    http: HttpRequest
    caller: Caller
    request_id: str
    end_s: float  # by the event loop's clock: when it has taken longer than the server allows
    value: dict[str, Any] = field(default_factory=dict)  # its body
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def read(self) -> None:
        """Reads the body. Raises RequestError where it is no JSON object."""
        self.value = read_object(await self.http.body(), "the body", _UnreadableError)

    def path(self, name: str) -> str:
        """A part of the address."""
        return str(self.http.path_params[name])

    @property
    def tenant(self) -> str:
        """Whose user the address names. Raises TenantError."""
        return self.tenant_of(self.http.query_params.get("tenant", ""))

    def tenant_of(self, named: str) -> str:
        """The tenant of a request: as its body names it, as the header X-Tenant does, or as its key is one's own.

        Raises TenantError, TooLargeError.
        """
        named = named or self.http.headers.get("x-tenant", "")
        if len(named) > _MAX_TENANT:
            raise TooLargeError(f"tenant: expected a name of at most {_MAX_TENANT} characters, got more")
        return self.caller.tenant_of(named)

    def check_model(self, name: str) -> None:
        """Raises NotServedError for a model that is not the one here."""
        known = self.served.model_names
        if name and name not in known:
            error = NotServedError(f"model: there is no model of this name here; {nearest(name, known)}")
            error.field = "model"
            raise error

    async def answer(
        self,
        request: Request,
        deadline_ms: float | None = None,
        on_tokens: OnTokens | None = None,
        *,
        prior: tuple[float, ...] = (),
    ) -> Any:
        """The backend's response to one request, once fewer than `_AT_ONCE` of this body are under way.

        Raises RcllmError.
        """
        served, kind, erasures = self.served, KINDS[type(request)], self.served.answers.erasures
        first = _First(served.clock, on_tokens)
        span = served.spans.begin(kind, self.request_id, self.http.headers)
        try:
            request = replace(request, tenant=self.tenant_of(request.tenant))
            self._check(request)
            async with self._turns:
                if served.answers.was_erased(request, erasures):
                    raise CancelledError("its user was erased before its turn came")
                terms = Terms(_left_ms(deadline_ms, first.waited_s), prior)
                asked = Asked(request, terms, on_tokens=first if kind == "generate" else None)
                response = await self._in_time(asked, deadline_ms)
        except asyncio.CancelledError:
            is_late = asyncio.get_running_loop().time() >= self.end_s
            if is_late:
                served.metrics.failed(kind, _TIMEOUT)
            span.failed(_TIMEOUT if is_late else "cancelled")
            raise
        except Exception as error:
            served.metrics.failed(kind, failure_of(error).code)
            span.failed(failure_of(error).code)
            raise
        span.answered(response)
        whole_s = first.waited_s
        served.metrics.answered(kind, response, whole_s, first.first_s or whole_s)
        if not served.answers.was_erased(request, erasures):
            served.answers.add(self.caller.name, replace(asked, on_tokens=None), response)
        return response

    async def _in_time(self, asked: Asked, deadline_ms: float | None) -> Response:
        """An answer after its deadline is of no use; of a text, it is that of the first token, which the schedule
        keeps. `deadline_ms`: as the client gave it."""
        answering, left_ms = self.served.backend.answer(asked), asked.terms.deadline_ms
        if deadline_ms is None or left_ms is None or asked.on_tokens is not None:
            return await answering
        try:
            return await asyncio.wait_for(answering, left_ms / 1e3)
        except TimeoutError:
            raise _too_late(deadline_ms) from None

    def _check(self, request: Request) -> None:
        limits = self.served.config
        if isinstance(request, RankRequest | RecommendRequest) and len(request.history) > limits.max_history:
            raise TooLargeError(
                f"history: expected at most {limits.max_history} events (server.max_history), got "
                f"{len(request.history)}"
            )

    def check_items(self, number: int, field: str) -> None:
        """Raises TooLargeError."""
        if number > (most := self.served.config.max_items):
            error = TooLargeError(f"{field}: expected at most {most} entries (server.max_items), got {number}")
            error.field = field
            raise error

    def check_tokens(self, number: int) -> None:
        """Raises TooLargeError."""
        if number > (most := self.served.config.max_request_tokens):
            raise TooLargeError(f"expected at most {most:,} tokens (server.max_request_tokens), got {number:,}")


def _left_ms(deadline_ms: float | None, waited_s: float) -> float | None:
    """Of a deadline, after the other answers of its body were waited for. Raises DeadlineError."""
    if deadline_ms is None:
        return None
    if (left_ms := deadline_ms - waited_s * 1e3) <= 0:
        raise _too_late(deadline_ms)
    return left_ms


def _too_late(deadline_ms: float) -> DeadlineError:
    return DeadlineError(f"there was no answer within {deadline_ms:g} ms (deadline_ms)")


class _First:
    """When the first token came; hands all of them on."""

    def __init__(self, clock: Clock, on_tokens: OnTokens | None) -> None:
        self.first_s = 0.0  # since the request came
        self._start_s, self._clock, self._on_tokens = clock(), clock, on_tokens

    @property
    def waited_s(self) -> float:
        """Since the request came."""
        return self._clock() - self._start_s

    def __call__(self, token_ids: Sequence[int]) -> None:
        self.first_s = self.first_s or self.waited_s
        if self._on_tokens is not None:
            self._on_tokens(token_ids)


class _UnreadableError(RequestError):
    """A body that is no JSON object."""

    def __init__(self, message: str) -> None:
        super().__init__(message.partition(" (")[0])
