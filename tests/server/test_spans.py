"""Traces of requests: what stands in them and what does not, and when there are any."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from rcllm.errors import ConfigError
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend
from rcllm.server.on_engine import EngineBackend
from rcllm.server.spans import NoSpans, open_spans

pytest.importorskip("opentelemetry.sdk", reason="traces need the extra `otel`")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="traces need the extra `otel`")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from rcllm.server.traced import OpenTelemetry, exporting

TO = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "words-of-ann"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(exporter: InMemorySpanExporter, computing: EngineBackend) -> Iterator[TestClient]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with TestClient(make_app(computing, spans=OpenTelemetry(provider, "tiny"))) as client:
        yield client


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_span_with_its_queue_pass_and_readout(
    traced: TestClient, exporter: InMemorySpanExporter
) -> None:
    body = {"candidates": ["i1", "i2"], "history": [{"text": SECRET}], "user_id": SECRET, "level": "exact"}
    reply = traced.post("/v1/rank", json=body, headers={"x-request-id": "mine", "traceparent": PARENT})
    assert reply.status_code == 200, reply.text
    found = by_name(exporter)
    assert found.keys() == {"rank", "prepare", "queue", "pass", "readout"}
    rank = found["rank"]
    assert rank.attributes is not None
    assert rank.attributes["rcllm.request_id"] == "mine"
    assert rank.attributes["rcllm.level"] == "exact"
    assert rank.attributes["gen_ai.usage.input_tokens"] > 0  # type: ignore[operator]
    assert rank.parent is not None
    assert f"{rank.parent.trace_id:032x}" == PARENT.split("-")[1]
    parts = [found[name] for name in ("prepare", "queue", "pass", "readout")]
    assert rank.context is not None
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == rank.context.span_id
    assert [part.end_time for part in parts[:-1]] == [part.start_time for part in parts[1:]]
    assert parts[2].end_time > parts[2].start_time  # type: ignore[operator]


def test_no_span_holds_what_a_user_wrote(traced: TestClient, exporter: InMemorySpanExporter) -> None:
    traced.post("/v1/rank", json={"candidates": ["i1"], "history": [{"text": SECRET}], "user_id": SECRET})
    traced.post("/v1/rank", json={"candidates": ["i1", SECRET], "history": [{"text": SECRET}], "user_id": SECRET})
    traced.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 2, "user": SECRET, "stop": [SECRET]})
    spans = exporter.get_finished_spans()
    assert {"rank", "generate"} <= {span.name for span in spans}
    assert not any(SECRET in span.to_json() or SECRET in json.dumps(dict(span.attributes or {})) for span in spans)


def test_an_error_stands_by_its_code(traced: TestClient, exporter: InMemorySpanExporter) -> None:
    assert traced.post("/v1/rank", json={"candidates": ["i1", "nobody"]}).status_code == 404
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "unknown_item"
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("environ", [{}, {**TO, "OTEL_SDK_DISABLED": "true"}, {**TO, "OTEL_TRACES_EXPORTER": "none"}])
def test_nothing_is_traced_unless_it_is_asked_for(environ: dict[str, str]) -> None:
    assert isinstance(open_spans(environ, "tiny"), NoSpans)


def test_what_cannot_be_traced_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"http/protobuf alone.*grpc"):
        open_spans({**TO, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "tiny")
    monkeypatch.delitem(sys.modules, "rcllm.server.traced")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*pip install 'rcllm\[otel\]'"):
        open_spans(TO, "tiny")


def test_a_collector_that_is_not_there_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", TO["OTEL_EXPORTER_OTLP_ENDPOINT"])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    spans = OpenTelemetry(exporting(TO), "tiny")
    with TestClient(make_app(FakeBackend({"a": "red lamp"}), spans=spans)) as client:
        assert client.post("/v1/rank", json={"candidates": ["a"]}).status_code == 200
