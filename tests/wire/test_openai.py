"""Pieces of a stream: whole characters that begin no stop string, and joined the whole answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.errors import RequestError
from rcllm.wire.bodies import served
from rcllm.wire.openai import Pieces, parse_chat, parse_completion


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=30), st.lists(st.integers(1, 4), max_size=40), st.lists(st.text("ab", min_size=1, max_size=3)))
def test_pieces_join_to_the_text_before_the_first_stop(text: str, sizes: list[int], stops: list[str]) -> None:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    whole = text[: min(places)] if places else text
    pieces, ids, shown = Pieces(decode, stops), list(text.encode("utf-8", "replace")), ""
    for size in [*sizes, len(ids)]:
        taken, ids = ids[:size], ids[size:]
        shown += pieces.more(taken)
        assert whole.encode("utf-8", "replace").decode("utf-8").startswith(shown), "more was shown than there will be"
    shown += pieces.rest(whole)
    assert shown == whole


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces = Pieces(decode, ())
    assert [pieces.more([byte]) for byte in "é!".encode()] == ["", "é", "!"]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces = Pieces(decode, ("STOP",))
    assert [pieces.more(part) for part in (b"a ST", b"O", b"R")] == ["a ", "", "STOR"]
    assert pieces.more(b" STOP b") == " "
    assert pieces.rest("a STOR ") == ""


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_neutral_values_of_what_is_not_served_pass(value: object) -> None:
    assert served({"frequency_penalty": value, "a": 1, "store": True}, {"frequency_penalty": (0, 0.0)}, ("store",)) == {
        "a": 1
    }
    with pytest.raises(RequestError, match="not served"):
        served({"frequency_penalty": False}, {"frequency_penalty": (0, 0.0)}, ())


def test_values_are_held_to_their_limits() -> None:
    for wrong in (
        {"temperature": 3},
        {"top_p": 0},
        {"n": 0},
        {"n": 99},
        {"max_tokens": 0},
        {"seed": "x"},
        {"stop": ""},
    ):
        with pytest.raises(RequestError):
            parse_completion({"prompt": "x", **wrong})
    assert parse_chat({"messages": [{"role": "user", "content": "x"}], "stop": ["a", "b"]}).stop == ("a", "b")
