"""A server that all contract tests share, each under a prefix of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.contracts.keepers import Place
from tests.valkey_server import serving


@pytest.fixture(scope="session")
def port() -> Iterator[Callable[[], int]]:
    """Starts a server when it is first called; skips the test where none is installed."""
    with ExitStack() as running:

        @cache
        def started() -> int:
            return running.enter_context(serving())

        yield started


@pytest.fixture
def place(tmp_path: Path, port: Callable[[], int]) -> Place:
    return Place(tmp_path, port)
