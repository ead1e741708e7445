"""Requests made from the server's own document, right and wrong: none of them is answered with a mistake."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from rcllm.config import ServerConfig
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool and what it is made of

_APP = make_app(FakeBackend({"a": "red lamp", "b": "blue lamp"}), ServerConfig(warm=False))
_CONFIG = schemathesis.config.SchemathesisConfig.from_dict({"generation": {"mode": "all"}})
_SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", _APP, config=_CONFIG)


def _settings(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )


def _check(case: Any) -> None:
    """A deadline of a thousandth of a millisecond is fine, and cannot be kept."""
    reply = case.call(timeout=300)  # seconds: the machine may be busy
    assert reply.status_code < 500 or reply.json()["error"]["code"] == "deadline", reply.text


@_SCHEMA.parametrize()
@_settings(3)
def test_a_few_requests_of_each_kind(case: Any) -> None:
    _check(case)


@pytest.mark.slow
@_SCHEMA.parametrize()
@_settings(300)
def test_many_requests_of_each_kind(case: Any) -> None:
    _check(case)
