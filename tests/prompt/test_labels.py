"""Names of labels, and the trie of their tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.errors import ConfigError
from rcllm.prompt.labels import check_told_apart, choices, label_names


@given(st.integers(1, 1200))
def test_names_are_distinct_and_of_one_width(count: int) -> None:
    names = label_names(count)
    assert len(set(names)) == len(names) == count
    assert len({len(name) for name in names}) == 1
    assert all(name.isalpha() for name in names) if count <= 26 else all(name.isdecimal() for name in names)


def test_letters_then_numbers() -> None:
    assert label_names(3) == ("A", "B", "C")
    assert label_names(26)[-1] == "Z"
    assert label_names(27)[:2] == ("01", "02")
    assert label_names(27)[-1] == "27"
    assert label_names(100)[0] == "001"


def test_choices_are_the_inner_nodes_parents_first() -> None:
    nodes = choices(((1, 2), (1, 3), (4,), (5, 6, 7)))
    assert [(node.prefix, node.token_ids) for node in nodes] == [
        ((), (1, 4, 5)),
        ((1,), (2, 3)),
        ((5,), (6,)),
        ((5, 6), (7,)),
    ]


@given(st.sets(st.tuples(*[st.integers(0, 3)] * 3), min_size=1))
def test_every_label_is_one_path(labels: set[tuple[int, ...]]) -> None:
    nodes = {node.prefix: node.token_ids for node in choices(tuple(sorted(labels)))}
    for label in labels:
        assert all(label[i] in nodes[label[:i]] for i in range(3))
    assert sum(len(after) for prefix, after in nodes.items() if len(prefix) == 2) == len(labels)
    seen: set[tuple[int, ...]] = {()}
    for prefix in nodes:
        assert prefix in seen
        seen |= {(*prefix, token) for token in nodes[prefix]}


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([(0,), (0,), (0,)], "cannot write the labels A, B, C,"),  # all unknown
        ([(5,), (), (6,)], "cannot write the labels B,"),
        ([(5,), (5, 0), (6,)], "cannot write the labels B,"),
        ([(5,), (6,), (5,)], "'A' and 'C' alike"),
        ([(5,), (6, 7), (6,)], "'B' and 'C' alike"),
    ],
)
def test_labels_that_no_score_tells_apart_are_refused(token_ids: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_told_apart("ABC", token_ids, unknown_id=0)
    check_told_apart("ABC", [(5, 6), (5, 7), (8,)], unknown_id=0)
    check_told_apart("AB", [(0,), (1,)], unknown_id=None)
