"""Last known scores: bounded, apart by tenant and kind, and gone with the user."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import ItemId, UserId
from rcllm.schedule.last_scores import MAX_CANDIDATES, Known, LastScores

ANN, BOB = UserId("ann"), UserId("bob")
A, B, C = (ItemId(name) for name in "abc")


def test_what_was_kept_last_is_known() -> None:
    last = LastScores(10)
    last.keep(ANN, "", "label", [A, B], [0.1, 0.2], 1.0)
    last.keep(ANN, "", "label", [B, C], [0.5, 0.3], 2.0)
    assert last.known(ANN, "", "label", [C, A, B]) == Known({C: 0.3, A: 0.1, B: 0.5}, 1.0)
    assert last.known(ANN, "", "label", [B, ItemId("x")]) == Known({B: 0.5}, 2.0)
    nothing = Known({}, 0.0)
    assert last.known(BOB, "", "label", [A]) == nothing
    assert last.known(ANN, "shop", "label", [A]) == nothing, "another tenant's user"
    assert last.known(ANN, "", "pointwise", [A]) == nothing, "these are on another scale"


def test_nothing_is_left_of_a_user_or_an_item_that_is_forgotten() -> None:
    last = LastScores(10)
    for tenant in ("", "shop"):
        last.keep(ANN, tenant, "label", [A, B], [0.1, 0.2], 1.0)
    last.keep(BOB, "", "label", [A], [0.7], 1.0)
    last.keep(ANN, "shop", "pointwise", [B], [0.4], 1.0)
    assert last.forget_user(ANN, "shop") == 3
    assert last.forget_user(ANN, "shop") == 0
    assert last.known(ANN, "shop", "label", [A]).scores == {}
    assert last.known(ANN, "", "label", [A]).scores == {A: 0.1}, "another tenant's user of the same name"
    assert last.forget_user(ANN) == 2
    assert last.forget_item(A) == 1
    assert last.known(BOB, "", "label", [A]).scores == {}


@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 900), max_size=600, unique=True)), max_size=10),
)
def test_memory_is_bounded(max_users: int, kept: list[tuple[int, list[int]]]) -> None:
    last = LastScores(max_users)
    for user, items in kept:
        last.keep(UserId(str(user)), "", "k", [ItemId(str(i)) for i in items], [float(i) for i in items], 0.0)
        assert len(last) <= max_users
    for user in range(6):
        known = last.known(UserId(str(user)), "", "k", [ItemId(str(i)) for i in range(901)])
        assert len(known.scores) <= MAX_CANDIDATES
        assert all(float(item) == score for item, score in known.scores.items())
