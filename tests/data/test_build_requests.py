"""Paper-shaped requests: the split, the shape, the negatives, and that all of it repeats exactly."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Event, Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, Dataset, Negatives, Split, build_requests, histories, split_of
from rcllm.data.negatives import SAMPLERS, NegativePool, Wanted, draw_negatives
from rcllm.data.requests import told_unknown, training_histories
from rcllm.errors import ConfigError, DataError

KINDS: list[Negatives] = ["uniform", "popularity", "retrieved"]


def made_up(num_users: int = 400, num_items: int = 60, events: int = 8) -> Dataset:
    """Users who walk the catalogue in strides; low item numbers are popular."""
    items = [Item(ItemId(f"i{number}"), {"title": f"Item {number}"}) for number in range(num_items)]
    rows = [
        Interaction(UserId(f"u{user}"), items[(user % 11 + step * step) % num_items].item_id, step, f"u{user}: {step}")
        for user in range(num_users)
        for step in range(events)
    ]
    return Dataset("made up", Catalogue(items), tuple(rows))


DATA = made_up()


def test_the_split_is_fixed_for_ever() -> None:
    splits = "train train validation test train train train test train"
    assert [split_of(UserId(f"u{number}")) for number in range(9)] == splits.split()
    assert split_of(UserId("žluťoučký kůň")) == "train"


def test_the_split_is_80_10_10() -> None:
    counted = Counter(split_of(UserId(f"user-{number}")) for number in range(20_000))
    assert counted["train"] / 20_000 == pytest.approx(0.8, abs=0.01)
    assert counted["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert counted["test"] / 20_000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("negatives", KINDS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_requests_have_the_shape_that_was_asked_for(negatives: Negatives, split: Split) -> None:
    by_user = histories(DATA.interactions)
    requests = build_requests(DATA, None, 10, 5, negatives, split, targets_per_user=2)
    assert len(requests) == 2 * sum(split_of(user) == split for user in by_user)
    assert len({request.request_id for request in requests}) == len(requests)
    for request in requests:
        assert request.user_id is not None
        history = [row.item_id for row in by_user[request.user_id]]
        target = int(request.request_id.rsplit("-", 1)[1])
        assert split_of(request.user_id) == split
        assert request.positive == history[target]
        assert [event.item_id for event in request.history] == history[max(0, target - 5) : target]
        assert len(set(request.candidates)) == 10
        assert [item for item in request.candidates if item in history] == [request.positive]
        assert all(item in DATA.catalogue for item in request.candidates)


def test_the_last_targets_come_first_and_need_a_history() -> None:
    requests = build_requests(DATA, None, 5, targets_per_user=100, min_history=3)
    targets = [int(request.request_id.rsplit("-", 1)[1]) for request in requests]
    assert targets == sorted(targets, reverse=True)
    assert set(targets) == {7, 6, 5, 4, 3}


def test_an_item_that_the_user_had_chosen_before_is_no_target() -> None:
    """A regression: it was the one candidate that the history named, for negatives are items that nobody touched."""
    user = next(UserId(f"u{number}") for number in range(99) if split_of(UserId(f"u{number}")) == "test")
    rows = [Interaction(user, ItemId(f"i{number}"), step) for step, number in enumerate([1, 2, 3, 2, 4, 1])]
    data = Dataset("again", DATA.catalogue, tuple(rows))
    assert [each.positive for each in build_requests(data, None, 5, targets_per_user=6)] == ["i4", "i3"]


def test_the_slot_of_the_positive_is_uniform() -> None:
    data = made_up(num_users=4000)
    slots = Counter(
        request.candidates.index(request.positive)
        for request in build_requests(data, None, 5, split="train")
        if request.positive is not None
    )
    total = slots.total()
    assert sorted(slots) == [0, 1, 2, 3, 4]
    assert all(count / total == pytest.approx(0.2, abs=0.03) for count in slots.values())


def test_a_request_does_not_depend_on_how_many_others_are_made() -> None:
    every = build_requests(DATA, None, 10, targets_per_user=3)
    assert build_requests(DATA, 5, 10) == every[:5]
    backwards = Dataset("backwards", DATA.catalogue, DATA.interactions[::-1])
    assert build_requests(backwards, None, 10, targets_per_user=3) == every


def test_another_seed_gives_other_users_and_negatives() -> None:
    one, two = build_requests(DATA, None, seed=1), build_requests(DATA, None, seed=2)
    assert [request.user_id for request in one] != [request.user_id for request in two]
    assert {request.user_id for request in one} == {request.user_id for request in two}
    assert {request.candidates for request in one}.isdisjoint({request.candidates for request in two})


def test_histories_are_of_training_users_and_of_items_that_are_there() -> None:
    rows = [Interaction(UserId(user), ItemId(item), 0) for user in ("u0", "u2", "u4") for item in ("b", "gone", "a")]
    items = Catalogue(Item(ItemId(letter), {}) for letter in "ab")
    assert split_of(UserId("u2")) == "validation"
    assert training_histories(histories(rows), items) == {"u0": ("b", "a"), "u4": ("b", "a")}
    assert training_histories(histories(rows), items, without=[UserId("u0")]) == {"u4": ("b", "a")}
    assert told_unknown(rows, items).startswith("3 of 9 interactions are with items that the catalogue lacks")
    assert told_unknown([row for row in rows if row.item_id != "gone"], items) == ""


# As computed on 64-bit Linux with numpy 2.4; if they change, so does every published figure.
GOLDEN = [
    ("u210", ("i24", "i27", "i42", "i50")),
    ("u210", ("i14", "i15", "i32", "i50")),
    ("u210", ("i14", "i19", "i50", "i11")),
]

PRINTED = """
from tests.data.test_build_requests import DATA, KINDS, build_requests
for kind in KINDS:
    print(build_requests(DATA, 1, 4, 2, kind, seed=3)[0])
"""


def test_requests_are_the_same_in_every_process_and_release() -> None:
    requests = [build_requests(DATA, 1, 4, 2, kind, seed=3)[0] for kind in KINDS]
    here = "".join(f"{request}\n" for request in requests)
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{PRINTED}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert ran.stdout == here
    assert [(request.user_id, request.candidates) for request in requests] == GOLDEN


def test_reviews_are_the_history_where_there_are_any() -> None:
    user = build_requests(DATA, 1, review_history=True)[0].user_id
    rows = [
        Interaction(row.user_id, row.item_id, row.timestamp, None if row.timestamp == 6 else row.text)
        for row in DATA.interactions
    ]
    request = build_requests(Dataset("some", DATA.catalogue, tuple(rows)), 1, num_history=2, review_history=True)[0]
    silent = next(row for row in rows if row.user_id == user and row.timestamp == 6)
    assert request.history == (Event(text=f"{user}: 5"), Event(item_id=silent.item_id))


def test_review_history_needs_reviews() -> None:
    rows = tuple(Interaction(row.user_id, row.item_id, row.timestamp) for row in DATA.interactions)
    with pytest.raises(DataError, match="no interaction has one"):
        build_requests(Dataset("silent", DATA.catalogue, rows), 1, review_history=True)


def test_what_the_data_cannot_give_is_refused_with_advice() -> None:
    with pytest.raises(
        DataError, match=r"expected 1,000 requests, but the split 'test' has \d+ targets .*targets of each user"
    ):
        build_requests(DATA, 1000)
    with pytest.raises(
        DataError, match=r"expected 59 items that user '\w+' never touched, got 5\d .*ask for fewer candidates"
    ):
        build_requests(DATA, 1, num_candidates=60)
    with pytest.raises(ConfigError, match=r"got 'popular'\. Did you mean 'popularity'"):
        build_requests(DATA, 1, negatives="popular")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected split to be one of train, validation, test"):
        build_requests(DATA, 1, split="dev")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_candidates and targets_per_user ≥ 1"):
        build_requests(DATA, 1, num_candidates=0)
    few = Dataset("few", Catalogue([Item(ItemId("i1"), {})]), DATA.interactions)
    with pytest.raises(DataError, match=r"which the catalogue lacks; leave such rows out"):
        build_requests(few, 1)


# ---- samplers -------------------------------------------------------------------------------------------------------

LETTERS = Catalogue(Item(ItemId(letter), {}) for letter in "abcdef")
#                 together with a: b twice, c once; d is popular but never beside a; e and f are untouched
TRAINING = [[ItemId(letter) for letter in word] for word in ("abb", "abc", "d", "d", "d", "d")]
POOL = NegativePool.of(LETTERS, TRAINING)


def numbers(letters: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([POOL.numbers[ItemId(letter)] for letter in letters], dtype=np.int64)


def drawn(kind: Negatives, count: int, banned: str, history: str = "a", seed: int = 0) -> str:
    wanted = Wanted(count, numbers(banned), numbers(history))
    return "".join(POOL.item_ids[number] for number in draw_negatives(POOL, kind, wanted, np.random.default_rng(seed)))


def test_popularity_counts_training_users_not_rows() -> None:
    assert POOL.popularity.tolist() == [2, 2, 1, 4, 0, 0]


def test_retrieved_takes_what_training_users_touched_beside_the_history() -> None:
    assert drawn("retrieved", 2, banned="a") == "bc"
    assert drawn("retrieved", 2, banned="a", history="") != ""
    assert drawn("retrieved", 1, banned="ab") == "c"


def test_samplers_that_run_out_fall_back_to_popularity_and_then_uniform() -> None:
    assert drawn("retrieved", 3, banned="a") == "bcd"
    assert set(drawn("retrieved", 5, banned="a")[3:]) == {"e", "f"}
    assert set(drawn("popularity", 4, banned="ab")[:2]) == {"c", "d"}
    assert drawn("uniform", 9, banned="abcde") == "f"


def test_popularity_draws_in_proportion() -> None:
    first = Counter(drawn("popularity", 1, banned="b", seed=seed) for seed in range(3000))
    assert first["d"] / 3000 == pytest.approx(4 / 7, abs=0.03)
    assert first["a"] / 3000 == pytest.approx(2 / 7, abs=0.03)
    assert first["c"] / 3000 == pytest.approx(1 / 7, abs=0.03)


@given(
    st.sampled_from(KINDS), st.integers(0, 7), st.sets(st.sampled_from("abcdef")), st.text("abcdef"), st.integers(0, 99)
)
def test_draws_are_distinct_and_never_banned(
    kind: Negatives, count: int, banned: set[str], past: str, seed: int
) -> None:
    letters = drawn(kind, count, "".join(sorted(banned)), past, seed)
    assert len(set(letters)) == len(letters) == min(count, 6 - len(banned))
    assert not set(letters) & banned


def test_without_training_users_every_kind_still_draws() -> None:
    pool = NegativePool.of(LETTERS, [])
    for kind in SAMPLERS:
        wanted = Wanted(6, numbers(""), numbers("ab"))
        assert sorted(draw_negatives(pool, kind, wanted, np.random.default_rng(0))) == [0, 1, 2, 3, 4, 5]
