"""Requests that Schemathesis makes from the server's own OpenAPI document: is any answered with a fault of the server?

Regime: every operation of the app over an engine that answers by rule, in this process; up to 300 requests of each,
valid and invalid (`--quick`: 10). Wanted: none is answered 5xx, but for 503 and 504 where the deadline that it named
cannot be kept.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.harness import Options, show
from rcllm.config import ServerConfig
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend

PATIENCE_S = 300  # for an answer: the machine may be busy


def schema() -> Any:
    """Of the server's document, for valid and invalid requests to a server that answers by rule."""
    app = make_app(FakeBackend({"a": "red lamp", "b": "blue lamp"}), ServerConfig(warm=False))
    config = schemathesis.config.SchemathesisConfig.from_dict({"generation": {"mode": "all"}})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


def making(examples: int) -> settings:
    """At most so many requests, the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )


def document(chosen: Options) -> dict[str, float]:
    operations = [found.ok() for found in schema().get_all_operations()]
    statuses = Counter[int]()
    for operation in operations:
        _ask(operation, chosen.requests or (10 if chosen.quick else 300), statuses)
    late = statuses[503] + statuses[504]
    rows = [[str(status), f"{count:,}"] for status, count in sorted(statuses.items())]
    show(f"{sum(statuses.values()):,} requests to {len(operations)} operations", ["status", "answers"], rows)
    return {
        "schemathesis_operations": len(operations),
        "schemathesis_requests": sum(statuses.values()),
        "schemathesis_ok": sum(count for status, count in statuses.items() if status < 300),
        "schemathesis_500": sum(count for status, count in statuses.items() if status >= 500) - late,
        "schemathesis_late": late,
    }


def _ask(operation: Any, examples: int, statuses: Counter[int]) -> None:
    """Asks as many requests as are made, and counts how they were answered."""

    @making(examples)
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        statuses[case.call(timeout=PATIENCE_S).status_code] += 1

    ask()
