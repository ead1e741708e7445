"""All engine tests run on one compute thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_compute_thread: None) -> None: ...
