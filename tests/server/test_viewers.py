"""Viewers of a published data set, to try the playground with."""

from __future__ import annotations

from starlette.testclient import TestClient

from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend
from rcllm.server.viewers import viewers_of


def events(user: str, items: range) -> list[Interaction]:
    """The latest stands first in the file."""
    return [Interaction(UserId(user), ItemId(str(item)), float(item)) for item in reversed(items)]


LOG = [*events("u", range(0, 20)), *events("v", range(30, 60)), *events("short", range(60, 65))]


def test_what_was_chosen_next_comes_after_the_history() -> None:
    by_name = {viewer.name: viewer for viewer in viewers_of(LOG)}
    assert sorted(by_name) == ["viewer u", "viewer v"], "one has too few choices"
    viewer = by_name["viewer u"]
    assert viewer.history == tuple(map(str, range(6, 16)))
    assert viewer.chosen == ("16", "17", "18", "19")
    assert set(viewer.chosen) < set(viewer.candidates)
    others = set(viewer.candidates) - set(viewer.chosen)
    assert len(others) == 12
    assert not others & set(map(str, range(20))), "none that the viewer has seen"


def test_they_are_drawn_by_the_seed() -> None:
    assert viewers_of(LOG, seed=3) == viewers_of(LOG, seed=3)
    assert viewers_of(LOG, seed=3) != viewers_of(LOG, seed=4)
    many = [event for user in range(60) for event in events(f"u{user}", range(user, user + 20))]
    assert len(viewers_of(many)) == 40
    assert viewers_of([]) == ()


def test_the_server_tells_of_those_that_it_was_given() -> None:
    with TestClient(make_app(FakeBackend({"a": "red"}), viewers=viewers_of(LOG))) as client:
        told = client.get("/v1/viewers").json()["viewers"]
    assert [viewer["name"] for viewer in told] == ["viewer u", "viewer v"]
    assert set(told[0]) == {"name", "history", "candidates", "chosen"}
    with TestClient(make_app(FakeBackend({"a": "red"}))) as client:
        assert client.get("/v1/viewers").json() == {"viewers": []}
