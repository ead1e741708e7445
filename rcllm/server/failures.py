"""From the class of an error to what a client is told: one table, in OpenAI's shape.

Knows nothing of endpoints. Invariant: an error that is none of ours is told as one, without its words, which may hold
what a user wrote; the log has where it came from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from rcllm.errors import (
    AccessError,
    CancelledError,
    CapacityError,
    ClosingError,
    ConfigError,
    DataError,
    DeadlineError,
    ForbiddenError,
    ModelError,
    NotServedError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    TenantError,
    TooLargeError,
    UncalibratedError,
    UnknownItemError,
)
from rcllm.words import without_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    status: int
    type: str  # as OpenAI calls the kind of it
    code: str  # for programs


FAILURES: Mapping[type[BaseException], Failure] = {
    AccessError: Failure(401, "authentication_error", "invalid_api_key"),
    ForbiddenError: Failure(403, "permission_error", "admin_key_needed"),
    TenantError: Failure(403, "permission_error", "other_tenant"),
    OverloadedError: Failure(429, "rate_limit_error", "overloaded"),
    DeadlineError: Failure(503, "server_error", "deadline"),
    ClosingError: Failure(503, "server_error", "closing"),
    TimeoutError: Failure(504, "server_error", "timeout"),
    RequestError: Failure(400, "invalid_request_error", "invalid_request"),
    UnknownItemError: Failure(404, "not_found_error", "unknown_item"),
    NotServedError: Failure(404, "not_found_error", "not_served"),
    PromptTooLongError: Failure(400, "invalid_request_error", "context_length_exceeded"),
    TooLargeError: Failure(413, "invalid_request_error", "too_large"),
    CapacityError: Failure(413, "invalid_request_error", "exceeds_cache"),
    CancelledError: Failure(503, "server_error", "cancelled"),
    ConfigError: Failure(400, "invalid_request_error", "invalid_option"),
    DataError: Failure(400, "invalid_request_error", "invalid_file"),
    UncalibratedError: Failure(403, "permission_error", "uncalibrated_level"),
    ModelError: Failure(500, "server_error", "model_error"),
    Exception: Failure(500, "server_error", "internal_error"),
}
_RETRY_S = 1
_TIMEOUT = "the answer took longer than the server allows (server.timeout_s)"
_INTERNAL = "something went wrong that is a mistake of the server; its log has the request's id"


def failure_of(error: BaseException) -> Failure:
    """By the nearest class that the table has."""
    return next(FAILURES[kind] for kind in type(error).__mro__ if kind in FAILURES)


def error_body(error: BaseException) -> tuple[Failure, dict[str, object]]:
    """The status, and OpenAI's body; a mistake of ours is logged without its words."""
    failure = failure_of(error)
    message = str(error)
    if failure is FAILURES[Exception]:
        logger.error("a request ended by a mistake", exc_info=without_words(error))
        message = _INTERNAL
    elif isinstance(error, TimeoutError):
        message = _TIMEOUT
    field = getattr(error, "field", None)
    return failure, {"error": {"message": message, "type": failure.type, "param": field, "code": failure.code}}


def headers_of(failure: Failure, error: BaseException) -> dict[str, str]:
    """When to come back, and how to bring a key."""
    if failure.status in (429, 503):
        return {"retry-after": str(max(1, round(getattr(error, "retry_after_s", _RETRY_S))))}
    return {"www-authenticate": "Bearer"} if failure.status == 401 else {}
