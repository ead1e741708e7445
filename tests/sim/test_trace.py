"""The trace file has the form that chrome://tracing and Perfetto read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rcllm.sim.cluster import Simulation
from rcllm.sim.spec import Failure
from rcllm.sim.trace import Trace
from tests.sim.small import PASS_S, placed, prefer, request, spec


def traced(tmp_path: Path, max_events: int = 100) -> dict[str, list[dict[str, object]]]:
    trace = Trace(max_events)
    asked = [request(0, 0.0), request(1, 0.5), request(2, 9.0)]
    simulation = Simulation(spec(2), placed([0], [0]), prefer(0, 1), failures=[Failure(0, 5.0)], on_pass=trace.on_pass)
    trace.add_requests(simulation.run(asked))
    trace.write(tmp_path / "trace.json")
    loaded: dict[str, list[dict[str, object]]] = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    return loaded


def test_passes_are_bars_and_requests_are_begun_and_ended(tmp_path: Path) -> None:
    events = traced(tmp_path)["traceEvents"]
    assert Counter(event["ph"] for event in events) == {"M": 2, "X": 3, "b": 3, "e": 3}
    bars = [event for event in events if event["ph"] == "X"]
    assert [bar["pid"] for bar in bars] == [0, 0, 1]
    assert [bar["ts"] for bar in bars] == pytest.approx([0.0, PASS_S * 1e6, 9e6])
    assert [bar["dur"] for bar in bars] == pytest.approx([PASS_S * 1e6] * 3)
    begun = {event["id"]: event["ts"] for event in events if event["ph"] == "b"}
    ended = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert begun == {0: 0.0, 1: 0.5e6, 2: 9e6}
    assert ended == pytest.approx({0: PASS_S * 1e6, 1: 2 * PASS_S * 1e6, 2: 9e6 + PASS_S * 1e6})


def test_every_event_names_a_process_that_has_a_name(tmp_path: Path) -> None:
    events = traced(tmp_path)["traceEvents"]
    named = {event["pid"] for event in events if event["ph"] == "M"}
    assert named == {event["pid"] for event in events} == {0, 1}


def test_what_is_left_out_is_counted_and_pairs_stay_whole(tmp_path: Path) -> None:
    found = traced(tmp_path, max_events=6)
    assert Counter(event["ph"] for event in found["traceEvents"]) == {"M": 2, "X": 3, "b": 1, "e": 1}
    assert found["otherData"] == {"dropped_events": 4}
