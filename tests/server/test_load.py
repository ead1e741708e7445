"""The load generator of `benchmarks.serve`: every request has one outcome, and it ends by itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import pytest

from benchmarks.serve_load import Plan, Sent, Shot, run_load
from benchmarks.serve_sweep import Curve, Point, answered, point
from rcllm.config import ServerConfig
from rcllm.server.backend import Asked, Response
from rcllm.server.fake import FakeBackend
from tests.server.live import living

ITEMS = {"a": "red lamp", "b": "blue lamp"}
BODY = json.dumps({"candidates": ["a", "b"]})


class Slow(FakeBackend):
    """Takes a second for each answer."""

    async def answer(self, asked: Asked) -> Response:
        await asyncio.sleep(1.0)
        return await super().answer(asked)


def test_every_request_has_one_outcome() -> None:
    shots = (
        *(Shot(BODY, at_s=0.02 * number) for number in range(10)),
        *(Shot("{", at_s=0.1) for _ in range(3)),
        Shot("", 0.1, "/nowhere"),
    )
    with living(FakeBackend(ITEMS), ServerConfig()) as address:
        sent = run_load(Plan(address, 20.0, shots))
    assert Counter(each.status for each in sent) == {200: 10, 400: 3, 404: 1}
    assert {each.code for each in sent if each.status == 400} == {"invalid_request"}
    assert [each.at_s for each in sent[:10]] == sorted(each.at_s for each in sent[:10])
    assert all(each.at_s >= shot.at_s for each, shot in zip(sent, shots, strict=True)), "none is sent before it is due"


def test_clients_hang_up_and_what_takes_too_long_is_given_up() -> None:
    shots = Shot(BODY, leave_s=0.1), Shot(BODY, at_s=1.5)
    start = time.monotonic()
    with living(Slow(ITEMS), ServerConfig()) as address:
        left, late = run_load(Plan(address, 2.0, shots))
    assert (left.has_left, left.status) == (True, None)
    assert (late.has_left, late.status, late.code) == (False, None, "given up")
    assert time.monotonic() - start < 15


def test_lanes_go_on_while_there_are_shots_and_else_once() -> None:
    lane = (Shot(BODY), Shot(BODY), Shot(BODY))
    with living(FakeBackend(ITEMS), ServerConfig()) as address:
        once = run_load(Plan(address, 20.0, lanes=(lane,)))
        beside = run_load(Plan(address, 20.0, (Shot(BODY, at_s=1.0),), (lane,)))
    assert [each.status for each in once] == [200] * 3
    assert len(answered(beside)) > 10
    assert sum(not each.in_lane for each in beside) == 1


def test_load_is_for_this_machine_alone() -> None:
    with pytest.raises(AssertionError, match="of this benchmark alone"):
        run_load(Plan("http://example.org:80", 1.0))


def test_a_point_of_the_curve() -> None:
    sent = [Sent("/v1/rank", at_s=float(number), took_s=2.0, status=200) for number in range(5)]
    found = point(sent)
    assert (found.offered, found.answered, found.ttft_ms) == (1.0, 5 / 6, (2000.0, 2000.0, 2000.0))
    with pytest.raises(RuntimeError, match="1 of 6 requests were not answered"):
        point([*sent, Sent("/v1/rank", 5.0, 0.1, 503, "deadline")])


def test_saturation_is_the_most_that_was_answered() -> None:
    points = (
        Point(1.0, 1.0, (100.0, 150.0, 200.0), 10),
        Point(4.0, 3.0, (400.0, 900.0, 1000.0), 40),
        Point(8.0, 2.9, (900.0, 2000.0, 3000.0), 80),
    )
    curve = Curve(90.0, points)
    assert (curve.saturation, curve.usable, curve.is_saturated) == (3.0, 1.0, True)
    assert not Curve(90.0, points[:1]).is_saturated
