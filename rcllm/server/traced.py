"""Spans of OpenTelemetry (extra `otel`): one for each request to the backend, with its queue, pass and read-out inside.

Knows receipts, no engine: what is inside a request is laid end to end by the times of its receipt. Invariant: no
attribute holds what a user wrote, or a user's name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rcllm.core.decoding import Generated
from rcllm.core.receipts import Receipt
from rcllm.server.backend import Response
from rcllm.server.spans import RequestSpan
from rcllm.version import __version__

_PART_OF = {"prompt": "prepare", "lookup": "prepare", "wait": "queue", "readout": "readout", "sort": "readout"}
_PARTS = ("prepare", "queue", "pass", "readout")  # in the order in which a ranking comes to them
_END_MS = 5000  # for what is left to be sent


def exporting(environ: Mapping[str, str]) -> TracerProvider:
    """Sends spans by OTLP over HTTP to where OpenTelemetry's own variables say."""
    about = {SERVICE_NAME: environ.get("OTEL_SERVICE_NAME", "rcllm"), SERVICE_VERSION: __version__}
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class OpenTelemetry:
    """Spans of one provider, which ends with this. `model`: what clients call it."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider, self._tracer, self._model = provider, provider.get_tracer("rcllm", __version__), model

    def begin(self, kind: str, request_id: str, headers: Mapping[str, str]) -> RequestSpan:
        parent = TraceContextTextMapPropagator().extract(headers)
        about = {"rcllm.request_id": request_id, "rcllm.kind": kind, "gen_ai.request.model": self._model}
        start_ns = time.time_ns()
        span = self._tracer.start_span(kind, parent, SpanKind.SERVER, about, start_time=start_ns)
        return _Traced(self, span, start_ns)

    def parts(self, span: Span, start_ns: int, receipt: Receipt) -> None:
        """What is inside a request. A text comes to its passes by turns; their times are added up."""
        ms = dict.fromkeys(_PARTS, 0.0)
        for stage, each in receipt.stage_ms.items():
            if stage != "total":
                ms[_PART_OF.get(stage, "pass")] += each
        within = set_span_in_context(span)
        for name, took_ms in ms.items():
            end_ns = start_ns + round(took_ms * 1e6)
            self._tracer.start_span(name, within, start_time=start_ns).end(end_ns)
            start_ns = end_ns

    def end(self) -> None:
        self._provider.force_flush(_END_MS)
        self._provider.shutdown()


class _Traced:
    """One request."""

    def __init__(self, spans: OpenTelemetry, span: Span, start_ns: int) -> None:
        self._spans, self._span, self._start_ns = spans, span, start_ns

    def answered(self, response: Response) -> None:
        receipt = response.receipt
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": receipt.num_tokens,
                "gen_ai.usage.output_tokens": len(response.token_ids) if isinstance(response, Generated) else 0,
                "rcllm.reused_tokens": receipt.num_reused,
                "rcllm.level": receipt.level,
                "rcllm.batch_size": receipt.batch_size,
                "rcllm.degraded": receipt.degraded,
            }
        )
        self._spans.parts(self._span, self._start_ns, receipt)
        self._span.end()

    def failed(self, code: str) -> None:
        self._span.set_attribute("error.type", code)
        self._span.set_status(StatusCode.ERROR)
        self._span.end()
