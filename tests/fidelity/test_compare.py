"""Levels side by side: what is asked, and of whom."""

from __future__ import annotations

from dataclasses import replace

from rcllm.core.ranking import Level, RankOptions, RankRequest, UserId
from rcllm.fidelity.compare import compare_levels
from tests.engine import tiny


def test_what_is_made_for_a_user_is_made_before_the_user_is_left_out(one_compute_thread: None) -> None:
    engine, seen = tiny.fresh(), list[UserId | None]()

    def complete(request: RankRequest) -> RankRequest:
        if not request.volatile:
            seen.append(request.user_id)
        return replace(request, volatile={item_id: {"price": "1"} for item_id in request.candidates})

    engine.prompter._complete = complete
    rows = compare_levels(engine, [tiny.request(4), tiny.request(4, user="u2")], [Level("blocks")], RankOptions())
    assert [row.level for row in rows] == ["full", "exact", "blocks"]
    assert seen == ["u1", "u2"]
