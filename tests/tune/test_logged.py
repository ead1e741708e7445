"""A log of requests as training data: a ranker is converted on what it was asked, without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcllm.core.ranking import Event, ItemId, RankRequest, UserId
from rcllm.data import split_of
from rcllm.errors import ConfigError, DataError
from rcllm.tune.examples import joined_catalogue
from rcllm.tune.logged import LoggedSet
from rcllm.tune.setup import make_trainer
from tests.engine import tiny
from tests.tune.test_teacher import MODEL, PROMPT, STUDENT, teacher
from tests.tune.test_train import CONFIG, EXAMPLES, log

__all__ = ["teacher"]


def requests(count: int = 40) -> list[RankRequest]:
    """What a log holds: users, lists and histories, and nothing of what was chosen."""
    return [
        RankRequest(
            f"r{n}",
            tuple(tiny.IDS[(n * 3 + step) % 40] for step in range(5)),
            (Event(item_id=tiny.IDS[n % 40]), Event(text="something in their own words")),
            UserId(f"u{n}") if n % 2 else None,
        )
        for n in range(count)
    ]


def _split(request: RankRequest) -> str:
    return split_of(UserId((request.user_id or request.request_id).removeprefix("log/")))


def test_users_are_learnt_from_or_held_out_and_ids_are_prefixed() -> None:
    source = LoggedSet(log(), requests(), EXAMPLES)
    held_out = source.validation(1000)
    assert {_split(request) for request in source.requests} == {"train"}
    assert {_split(request) for request in held_out} == {"validation"}, "test users choose no checkpoint"
    num_test = 40 - len(source.requests) - len(held_out)
    assert source.notes == (f"{num_test} of 40 requests are of test users, and are left out",)
    names = {item for r in (*source.requests, *held_out) for item in r.candidates}
    assert names <= joined_catalogue([source]).keys()
    batch = source.batch(np.random.default_rng(0))
    assert batch == source.batch(np.random.default_rng(0))
    assert len({request.request_id for request in batch}) == EXAMPLES.prompts_per_batch


def test_scores_are_filled_in_where_they_are_shown() -> None:
    source = LoggedSet(log(), requests(), EXAMPLES, (), ("rank", "match"))
    for request in source.requests:
        assert all(request.volatile[item_id].keys() == {"rank", "match"} for item_id in request.candidates)


def test_a_log_teaches_what_a_teacher_answers_to_it(tmp_path: Path, teacher: Path, one_compute_thread: None) -> None:
    template = str(tiny.template_path())
    config = replace(STUDENT, losses=64)
    made = make_trainer(MODEL, PROMPT, [log()], config, tmp_path, None, teacher, template, requests())
    curve = made.run()
    assert made.baselines == {"teacher": 1.0}, "its own first candidate counts as the right one"
    assert all(point.tau is not None for point in curve)
    learnt = [point.train_loss for point in curve if point.train_loss is not None]
    assert learnt[-1] < learnt[0]


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got 0 and 0 \(40 of 40 requests do not say .*, give a teacher"):
        make_trainer(MODEL, PROMPT, [log()], CONFIG, tmp_path, requests=requests())
    with pytest.raises(ConfigError, match=r"shows 'neighbours'.*Use another template, or leave out the log"):
        LoggedSet(log(), requests(), EXAMPLES, ("title", "neighbours"))
    with pytest.raises(ConfigError, match="one data set, got 2"):
        make_trainer(MODEL, PROMPT, [log(), log(name="b")], CONFIG, tmp_path, requests=requests())
    with pytest.raises(DataError, match="'nowhere', which log lacks"):
        LoggedSet(log(), [RankRequest("r", (ItemId("nowhere"),))], EXAMPLES)
    with pytest.raises(DataError, match="give a longer log"):
        LoggedSet(log(), requests(1), EXAMPLES)


def test_without_a_teacher_requests_whose_choice_is_known_are_learnt_from(
    tmp_path: Path, one_compute_thread: None
) -> None:
    """A regression: a positive that is no candidate ended in a ValueError, and a batch without any in another."""
    asked = [
        replace(each, positive=(each.candidates[0], None, ItemId("elsewhere"))[number % 3])
        for number, each in enumerate(requests(120))
    ]
    made = make_trainer(MODEL, PROMPT, [log()], replace(CONFIG, losses=8), tmp_path, requests=asked)
    assert made.notes[0] == (
        "log: 40 of 120 requests name a positive that is none of their candidates, so that it counts as not known"
    )
    assert made.notes[1].startswith("log: 80 of 120 requests do not say which candidate was chosen, and are left out")
    source = made.sources[0]
    assert isinstance(source, LoggedSet)
    assert all(each.positive in each.candidates for each in (*source.requests, *source.validation(1000)))
    assert made.run()[-1].losses >= 8


def test_what_a_request_brings_is_part_of_what_is_learnt() -> None:
    plain = requests()
    for change in ({"texts": {tiny.IDS[0]: {"title": "a"}}}, {"volatile": {tiny.IDS[0]: {"price": "1"}}}):
        changed = [replace(each, **change) for each in plain]  # type: ignore[arg-type]
        assert LoggedSet(log(), changed, EXAMPLES).identity() != LoggedSet(log(), plain, EXAMPLES).identity()
