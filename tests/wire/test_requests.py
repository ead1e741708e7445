"""Requests as JSON lines: a round trip loses nothing, and what is not understood is refused with its line."""

from __future__ import annotations

import gzip
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, ItemId, Level, RankOptions, RankRequest, Selection, UserId
from rcllm.errors import DataError, RequestError
from rcllm.wire.requests import (
    parse_options,
    parse_recommend_request,
    parse_request,
    read_requests,
    request_to_json,
    write_requests,
)

names = st.text(min_size=1, max_size=8)
ids = names.map(ItemId)
levels = st.one_of(
    st.sampled_from([Level("exact"), Level("blocks")]),
    st.integers(0, 10**7).map(lambda k: Level("linked", k)),
    st.floats(0, 1).map(lambda share: Level("tail", share)),
    st.builds(lambda item, history: Level("corrected", item, history), st.floats(0, 1), st.floats(0, 1)),
)
options = st.builds(
    RankOptions,
    level=levels,
    readout=st.sampled_from(["label", "pointwise", "likelihood"]),
    layout=st.sampled_from(["history_first", "items_first"]),
    label_place=st.sampled_from(["before", "after"]),
    parallel=st.booleans(),
    bias=st.sampled_from(["none", "content_free", "running_mean"]),
    history=st.sampled_from(["chain", "shared"]),
)
texts = names.map(str.strip).filter(bool)
requests = st.builds(
    RankRequest,
    request_id=names,
    candidates=st.lists(ids, min_size=1, max_size=5, unique=True).map(tuple),
    history=st.lists(st.one_of(st.builds(Event, item_id=ids), st.builds(Event, text=names)), max_size=4).map(tuple),
    user_id=st.none() | names.map(UserId),
    volatile=st.dictionaries(ids, st.dictionaries(names, texts, max_size=2), max_size=2),
    options=st.none() | options,
    positive=st.none() | ids,
)


@given(st.lists(requests, max_size=4), st.sampled_from(["requests.jsonl", "requests.jsonl.gz"]))
@settings(deadline=None)  # every file waits for the disk
def test_what_is_written_is_read_back_equal(written: list[RankRequest], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / name
        write_requests(path, written)
        found, report = read_requests(path, strict=True)
        assert found == written
        assert (report.rows_read, report.rows_skipped) == (len(written), 0)
        assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_reads_the_form_that_people_write() -> None:
    request = parse_request(
        {
            "request_id": "r1",
            "user_id": 5,
            "history": ["a", 7, {"item_id": "b"}, {"text": "I like tea"}],
            "candidates": ["c", 8],
            "volatile": {"c": {"price": 9.5, "stock": 3}},
            "positive": 8,
            "options": {"level": "tail(0.2)", "readout": "pointwise", "parallel": True},
        }
    )
    assert request == RankRequest(
        request_id="r1",
        user_id=UserId("5"),
        history=(Event(ItemId("a")), Event(ItemId("7")), Event(ItemId("b")), Event(text="I like tea")),
        candidates=(ItemId("c"), ItemId("8")),
        volatile={ItemId("c"): {"price": "9.5", "stock": "3"}},
        positive=ItemId("8"),
        options=RankOptions(level=Level("tail", 0.2), readout="pointwise", parallel=True),
    )


def test_what_is_at_its_default_is_not_written() -> None:
    request = RankRequest("r", (ItemId("a"),), (Event(ItemId("b")), Event(text="x")))
    assert request_to_json(request) == {"request_id": "r", "history": ["b", {"text": "x"}], "candidates": ["a"]}


LINES = """{"request_id": "ok", "candidates": ["a"]}
{"request_id": "r", "candidates": ["a"], "candidate": 1}

{"request_id": "r", "candidates": []}
{"candidates": ["a"]}
{"request_id": "r", "candidates": ["a"], "options": {"levle": "exact"}}
{"request_id": "r", "candidates": ["a"], "options": {"level": "fast"}}
{"request_id": "r", "candidates": ["a"
"""


def test_malformed_rows_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(LINES)
    found, report = read_requests(path)
    assert [request.request_id for request in found] == ["ok"]
    assert [problem.line for problem in report.problems] == [2, 4, 5, 6, 7, 8]
    with pytest.raises(DataError, match=r"requests\.jsonl, line 2: unknown key 'candidate'; did you mean 'candidates"):
        read_requests(path, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": None}, "missing candidates"),
        ({"candidates": []}, "candidates must be a list of at least 1, got a list of 0"),
        ({"candidates": "a"}, "candidates must be a list, got 'a'"),
        ({"candidates": [None]}, r"candidates\[0\]: expected an id .*, got null"),
        ({"candidates": [True]}, r"candidates\[0\]: expected an id .*, got true"),
        ({"request_id": ""}, "request_id: expected an id .*, got ''"),
        ({"positive": ["a"]}, "positive: expected an id .*, got a list of 1"),
        ({"history": [{"item_id": "a", "text": "b"}]}, r"history\[0\]: expected an event to be an item id"),
        ({"history": [{"text": ""}]}, r"history\[0\]: expected an event to be an item id"),
        ({"history": [{}]}, r"history\[0\]: expected an event to be an item id"),
        ({"volatile": ["a"]}, "volatile must be an object, got a list of 1"),
        ({"volatile": {"a": "cheap"}}, r"volatile\.a: expected an object of texts by name, got 'cheap'"),
        ({"options": "fast"}, "options must be a section, got 'fast'"),
        (
            {"options": {"readout": "labels"}},
            r"options\.readout must be one of label, pointwise, likelihood, got 'labels'; did you mean 'label'",
        ),
        ({"options": {"parallel": 1}}, r"options\.parallel must be true or false, got 1"),
        ({"options": {"level": 3}}, r"options\.level: expected a text, got 3"),
        (
            {"options": {"layout": ["items_first"]}},
            r"options\.layout must be one of history_first, items_first, got a list of 1",
        ),
        ({"options": {"readouts": "label"}}, "unknown key 'readouts' in options; did you mean 'readout'"),
    ],
)
def test_malformed_requests_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request({"request_id": "r", "candidates": ["a"]} | change)


def test_options_that_a_request_leaves_out_are_the_given_defaults() -> None:
    defaults = RankOptions(readout="likelihood", level=Level("exact"))
    fields = {"request_id": "r", "candidates": ["a"], "options": {"level": "blocks"}}
    assert parse_request(fields, defaults).options == RankOptions(readout="likelihood", level=Level("blocks"))
    assert parse_request(fields | {"options": None}, defaults).options is None


def test_an_unknown_level_names_the_levels() -> None:
    with pytest.raises(RequestError, match=r"level: unknown reuse level 'fast': expected full"):
        parse_options({"level": "fast"})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, [RankRequest("old", (ItemId("a"),))])
    with pytest.raises(TypeError):
        write_requests(path, [RankRequest("new", (ItemId("a"),)), RankRequest("bad", (b"a",))])  # type: ignore[arg-type]
    assert b'"old"' in gzip.decompress(path.read_bytes())
    assert list(tmp_path.iterdir()) == [path]


def test_a_selection_is_read_over_the_defaults() -> None:
    fields = {"request_id": "r", "candidates": ["a"], "options": {"selection": {"policy": "tail", "window": 3}}}
    defaults = RankOptions(selection=Selection(policy="random", divergence=0.25))
    asked = parse_request(fields, defaults).options
    assert asked is not None
    assert asked.selection == Selection(policy="tail", window=3, divergence=0.25)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"polcy": "tail"}, "unknown key 'polcy' in options.selection; did you mean 'policy'"),
        ({"policy": "best"}, r"options\.selection\.policy must be one of rcllm, .*, got 'best'"),
        ({"window": "3"}, r"options\.selection\.window must be a whole number, got '3'"),
        ({"divergence": math.nan}, r"options\.selection\.divergence must be a finite number, got nan"),
    ],
)
def test_a_wrong_selection_is_refused(selection: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request({"request_id": "r", "candidates": ["a"], "options": {"selection": selection}})


@pytest.mark.parametrize("name", ["history", "items"])
def test_a_users_list_goes_by_either_name(name: str) -> None:
    history = (Event(ItemId("a")), Event(ItemId("7")))
    assert parse_request({"request_id": "r", "candidates": ["b", 10.0], name: ["a", 7.0]}).history == history
    asked = parse_recommend_request({"request_id": "r", name: ["a", 7]}, RecommendRequest(""))
    assert asked.history == history


def test_a_list_under_two_names_is_refused() -> None:
    with pytest.raises(RequestError, match="under one name, got both 'history' and 'items'"):
        parse_request({"request_id": "r", "candidates": ["b"], "history": ["a"], "items": ["b"]})


def test_half_letters_cannot_reach_a_tokenizer() -> None:
    request = parse_request({"request_id": "r\ud83d", "candidates": ["b"], "history": [{"text": "hm \ud83d"}]})
    assert request.request_id == "r\ufffd"
    assert request.history == (Event(text="hm \ufffd"),)
