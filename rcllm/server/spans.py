"""Where requests are traced: nowhere, or by OpenTelemetry (`traced.py`) where its variables say where to.

Invariant: nothing is sent anywhere unless an endpoint variable of OpenTelemetry is set.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from rcllm.errors import ConfigError
from rcllm.late import Late
from rcllm.server.backend import Response

if TYPE_CHECKING:
    from rcllm.server import traced
else:
    traced = Late("rcllm.server.traced")  # optional: only those who trace need OpenTelemetry

logger = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


class RequestSpan(Protocol):
    """Of one request; one of these ends it."""

    def answered(self, response: Response) -> None:
        """It has its answer."""

    def failed(self, code: str) -> None:
        """It has an error, by its code."""


class Spans(Protocol):
    """Where requests are traced."""

    def begin(self, kind: str, request_id: str, headers: Mapping[str, str]) -> RequestSpan:
        """`headers`: of the HTTP request, whose `traceparent` names the span that this one is within."""

    def end(self) -> None:
        """Sends what is left."""


class NoSpans:
    """Nothing is traced."""

    def begin(self, kind: str, request_id: str, headers: Mapping[str, str]) -> NoSpans:
        return self

    def answered(self, response: Response) -> None:
        pass

    def failed(self, code: str) -> None:
        pass

    def end(self) -> None:
        pass


def open_spans(environ: Mapping[str, str], model: str) -> Spans:
    """What OpenTelemetry's variables ask for. Raises ConfigError where that cannot be done."""
    asked = next((name for name in _ENDPOINTS if environ.get(name)), None)
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if asked is None or is_off:
        return NoSpans()
    protocol = next((environ[name] for name in _PROTOCOLS if environ.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise ConfigError(f"traces are sent by {_PROTOCOL} alone, and {_PROTOCOLS[1]} asks for {protocol}")
    try:
        spans: Spans = traced.OpenTelemetry(traced.exporting(environ), model)
    except ImportError as error:
        raise ConfigError(
            f"{asked} is set, and traces need OpenTelemetry ({error}): pip install 'rcllm[otel]', or unset it"
        ) from error
    logger.info("requests are traced: %s is set", asked)
    return spans
