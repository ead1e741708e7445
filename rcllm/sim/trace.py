"""A simulation as a trace that chrome://tracing and ui.perfetto.dev open: a process for each node, with its
passes and, from arrival to answer, its requests.

Knows nothing of how it ran. Invariant: at most `max_events` are kept, and how many were not is told in the file.
"""

from __future__ import annotations

from pathlib import Path

from rcllm.durable import renamed, writing
from rcllm.plain_json import to_json
from rcllm.sim.node import PassRecord
from rcllm.sim.outcome import Outcome

_US = 1e6  # the format counts microseconds


class Trace:
    """Collects passes as they run: give `on_pass` to a simulation."""

    def __init__(self, max_events: int = 200_000) -> None:
        self.num_dropped = 0
        self._max_events = max_events
        self._events: list[dict[str, object]] = []

    def on_pass(self, record: PassRecord) -> None:
        """One bar in the row of the node's device."""
        args = {
            "requests": record.num_requests,
            "rows": round(record.shape.rows),
            "kv_mb": round(record.shape.kv_bytes / 1e6, 1),
        }
        duration = (record.end_s - record.start_s) * _US
        bar = {"name": "pass", "ph": "X", "pid": record.node, "tid": 0, "ts": record.start_s * _US, "dur": duration}
        self._add({**bar, "args": args})

    def add_requests(self, outcome: Outcome) -> None:
        """From arrival to answer, at the node that answered."""
        for each in sorted(outcome.answers, key=lambda answer: answer.arrival_s):
            args = {
                "hits": f"{each.num_hits}/{each.num_items}",
                "fetched": each.num_fetched,
                "fresh_tokens": each.num_fresh,
                "built_tokens": each.num_built,
                "queue_ms": round(each.queue_s * 1e3, 3),
                "retries": each.retries,
            }
            # requests overlap and bars of one row must nest, so these are asynchronous: begun and ended
            shared = {"name": f"request {each.number}", "cat": "request", "id": each.number, "pid": each.node}
            begin = {**shared, "ph": "b", "ts": each.arrival_s * _US, "args": args}
            self._add(begin, {**shared, "ph": "e", "ts": each.answered_s * _US})

    def write(self, path: Path) -> None:
        """Raises DataError where the file cannot be written."""
        nodes = sorted({int(str(event["pid"])) for event in self._events})
        names: list[dict[str, object]] = [
            {"name": "process_name", "ph": "M", "pid": node, "args": {"name": f"node {node}"}} for node in nodes
        ]
        whole = {
            "traceEvents": names + self._events,
            "displayTimeUnit": "ms",
            "otherData": {"dropped_events": self.num_dropped},
        }
        with writing(path), renamed(path) as partial:
            partial.write_text(to_json(whole) + "\n", encoding="utf-8")

    def _add(self, *events: dict[str, object]) -> None:
        """All of them or none."""
        if len(self._events) + len(events) <= self._max_events:
            self._events.extend(events)
        else:
            self.num_dropped += len(events)
