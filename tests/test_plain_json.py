"""JSON that strict readers, line readers and terminals take."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.plain_json import to_json, without_nan

TEXTS = st.text(st.characters(codec=None, categories=None), max_size=20)


@given(TEXTS)
def test_one_line_that_reads_back_and_steers_no_terminal(text: str) -> None:
    line = to_json({"title": text})
    assert json.loads(line)["title"] == text
    assert len(line.splitlines()) == 1
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in line)
    line.encode("utf-8")  # also where a text holds half a surrogate pair


def test_letters_stay_letters() -> None:
    assert to_json({"title": "Žižek 北京 🦆"}) == '{"title": "Žižek 北京 🦆"}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_or_null(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": [value]})
    assert to_json(without_nan({"a": (1.5, [value]), "b": "NaN"})) == '{"a": [1.5, [null]], "b": "NaN"}'
