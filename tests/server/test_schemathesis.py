"""Requests made from the server's own document, right and wrong: none of them is answered with a mistake."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.serve_document import PATIENCE_S, making, schema

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool and what it is made of

_SCHEMA = schema()


def _check(case: Any) -> None:
    """A deadline of a thousandth of a millisecond is fine, and cannot be kept."""
    reply = case.call(timeout=PATIENCE_S)
    assert reply.status_code < 500 or reply.json()["error"]["code"] == "deadline", reply.text


@_SCHEMA.parametrize()
@making(3)
def test_a_few_requests_of_each_kind(case: Any) -> None:
    _check(case)


@pytest.mark.slow
@_SCHEMA.parametrize()
@making(300)
def test_many_requests_of_each_kind(case: Any) -> None:
    _check(case)
