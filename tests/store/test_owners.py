"""Owners without their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.store.owners import DIGEST_BYTES, NOBODY, alias, digest

names = st.text(st.characters(), max_size=20)


@given(names)
def test_an_alias_stands_for_the_name_and_for_itself(name: str) -> None:
    stands = alias(digest(name))
    assert stands is not None
    assert digest(stands) == digest(name) != NOBODY
    assert alias(digest(stands)) == stands
    assert len(digest(name)) == DIGEST_BYTES


@given(names, names)
def test_names_that_differ_have_digests_that_differ(one: str, other: str) -> None:
    assert (digest(one) == digest(other)) == (one == other)


def test_no_owner_has_no_alias() -> None:
    assert digest(None) == NOBODY
    assert alias(NOBODY) is None


@pytest.mark.parametrize(
    ("name", "kind"), [("user:7", "user"), ("item:7", "item"), ("7", "other"), ("users:7", "other")]
)
def test_the_kind_stays_readable(name: str, kind: str) -> None:
    assert str(alias(digest(name))).startswith(f"{kind}#")
    assert str(alias(digest(name))).partition("#")[2] != "7"


@pytest.mark.parametrize("name", ["user#12", "user#" + "g" * 32, "nobody#" + "0" * 32, "#" + "0" * 32])
def test_what_looks_like_an_alias_and_is_none_is_a_name(name: str) -> None:
    assert alias(digest(name)) != name
