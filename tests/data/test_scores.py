"""Scores as words: what they say, whom they do not see, and when they are made."""

from __future__ import annotations

import itertools

import pytest

from rcllm.core.ranking import Event, Interaction, Item, ItemId, RankRequest, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.data.scores import MATCH, RANK, ScoreField, ScoreWords, made_scores
from rcllm.errors import ConfigError

EDGES = ScoreWords((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
_NAMES = (UserId(f"u{n}") for n in itertools.count())
TRAINING = [name for name in itertools.islice(_NAMES, 40) if split_of(name) == "train"]
HELD_OUT = next(UserId(f"h{n}") for n in itertools.count() if split_of(UserId(f"h{n}")) == "test")


def _data() -> Dataset:
    """Users who choose two neighbouring items of six."""
    items = Catalogue(Item(ItemId(f"i{n}"), {"title": f"thing {n}"}) for n in range(6))
    rows = [
        Interaction(user, ItemId(f"i{(place + step) % 6}"), float(step))
        for place, user in enumerate(TRAINING)
        for step in range(2)
    ]
    return Dataset("six", items, tuple(rows))


def _asked(user: UserId, *candidates: str) -> RankRequest:
    return RankRequest("r", tuple(map(ItemId, candidates)), (Event(item_id=ItemId("i0")),), user)


def test_ranks_and_grades() -> None:
    words = EDGES.write([3.0, 0.0, 9.5, 3.0, 0.5, -1.0])
    assert [fields[RANK] for fields in words] == ["second", "none", "first", "second", "fourth", "none"]
    assert [fields[MATCH] for fields in words] == ["four", "zero", "nine", "four", "one", "zero"]
    assert EDGES.write([float(n + 1) for n in range(12)])[0][RANK] == "later"


def test_grades_hold_equally_many() -> None:
    scores = [float(n) for n in range(1, 91)]
    grades = [fields[MATCH] for fields in ScoreWords.of([0.0, *scores]).write(scores)]
    assert {grade: grades.count(grade) for grade in grades} == dict.fromkeys(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 10
    )


def test_edges_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 ascending numbers"):
        ScoreWords((1.0, 2.0))


def test_a_training_user_is_not_scored_by_their_own_choices() -> None:
    data = _data()
    rows = [*data.interactions, *(Interaction(TRAINING[0], ItemId(f"i{n}"), 5.0) for n in (0, 3))]
    field = ScoreField.of(data.catalogue, rows)
    alone = _asked(TRAINING[0], "i3")
    assert field.scores(alone) == [0.0], "nobody else chose both"
    assert field.scores(_asked(HELD_OUT, "i3"))[0] > 0


def test_held_out_users_change_nothing() -> None:
    data = _data()
    more = [*data.interactions, *(Interaction(HELD_OUT, ItemId(f"i{n}"), float(n)) for n in (0, 3))]
    asked = _asked(HELD_OUT, "i1", "i3", "i5")
    before, after = (ScoreField.of(data.catalogue, rows) for rows in (data.interactions, more))
    assert before.words == after.words
    assert before.fill(asked) == after.fill(asked)


def test_the_field_is_filled_in_unless_it_is_given() -> None:
    field = ScoreField.of(_data().catalogue, _data().interactions)
    filled = field.fill(_asked(HELD_OUT, "i1", "i3", "unknown"))
    assert filled.volatile[ItemId("i1")][RANK] == "first"
    assert filled.volatile[ItemId("i3")] == filled.volatile[ItemId("unknown")] == {RANK: "none", MATCH: "zero"}
    assert field.fill(filled) is filled


def test_it_is_made_where_the_template_shows_it_and_interactions_are_known() -> None:
    data = _data()
    assert made_scores(data.catalogue, ["rank"]) is not None
    assert made_scores(data.catalogue, ["availability"]) is None
    assert made_scores(Catalogue(data.catalogue.values()), ["rank"]) is None
    given = Catalogue(Item(i.item_id, i.fields, {"rank": "first"}) for i in data.catalogue.values())
    assert made_scores(given.knowing(data.interactions), ["rank"]) is None
