"""What endpoints work with: the backend, what is kept, what is measured; and one request that asks.

Knows nothing of bodies or of addresses. Invariant: every request to the backend passes `Ask.answer`, where it is
counted, measured, held to the limits and kept.
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
from rcllm.errors import DeadlineError, NotServedError, RequestError, TooLargeError
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
    value: dict[str, Any] = field(default_factory=dict)  # its body

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
        """The backend's response to one request. Raises RcllmError."""
        served, kind = self.served, KINDS[type(request)]
        first = _First(served.clock, on_tokens)
        span = served.spans.begin(kind, self.request_id, self.http.headers)
        try:
            request = replace(request, tenant=self.tenant_of(request.tenant))
            asked = Asked(request, Terms(deadline_ms, prior), on_tokens=first if kind == "generate" else None)
            self._check(request)
            response = await self._in_time(asked)
        except asyncio.CancelledError:
            span.failed("client_gone_or_timeout")
            raise
        except Exception as error:
            served.metrics.failed(kind, failure_of(error).code)
            span.failed(failure_of(error).code)
            raise
        span.answered(response)
        whole_s = served.clock() - first.start_s
        served.metrics.answered(kind, response, whole_s, first.first_s or whole_s)
        served.answers.add(self.caller.name, replace(asked, on_tokens=None), response)
        return response

    async def _in_time(self, asked: Asked) -> Response:
        """An answer after its deadline is of no use; of a text, it is that of the first token, which the schedule
        keeps."""
        answering, deadline_ms = self.served.backend.answer(asked), asked.terms.deadline_ms
        if deadline_ms is None or asked.on_tokens is not None:
            return await answering
        try:
            return await asyncio.wait_for(answering, deadline_ms / 1e3)
        except TimeoutError:
            raise DeadlineError(f"there was no answer within {deadline_ms:g} ms (deadline_ms)") from None

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


class _First:
    """When the first token came; hands all of them on."""

    def __init__(self, clock: Clock, on_tokens: OnTokens | None) -> None:
        self.start_s, self.first_s = clock(), 0.0
        self._clock, self._on_tokens = clock, on_tokens

    def __call__(self, token_ids: Sequence[int]) -> None:
        self.first_s = self.first_s or self._clock() - self.start_s
        if self._on_tokens is not None:
            self._on_tokens(token_ids)


class _UnreadableError(RequestError):
    """A body that is no JSON object."""

    def __init__(self, message: str) -> None:
        super().__init__(message.partition(" (")[0])
