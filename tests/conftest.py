"""Fixtures that several test folders use."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Kernels for GPUs run in Triton's interpreter where there is none. Triton reads this when torch imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from rcllm.engine.engine import Engine
from tests.engine import tiny

# No example fails because the machine was busy. A commit has one answer in CI; elsewhere each run tries other examples.
settings.register_profile(
    "rcllm", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("rcllm")

_STORES = tempfile.TemporaryDirectory(prefix="rcllm-stores-")  # removed at the end of the run
_NUMBERS = itertools.count()


def pytest_runtest_setup() -> None:
    """Commands keep what they compute. Each test has a place of its own for it, which is made when it is used."""
    os.environ["RCLLM_STORE_FOLDER"] = str(Path(_STORES.name) / str(next(_NUMBERS)))


def assert_no_pins(engine: Engine) -> None:
    engine.pool.check()
    assert not engine.pool._index._pins, f"{len(engine.pool._index._pins)} blocks are still pinned"


@pytest.fixture
def one_compute_thread() -> Iterator[None]:
    """A tiny model gains nothing from two threads, and on a busy machine their waiting costs a hundred times that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine(one_compute_thread: None) -> Iterator[Engine]:
    """A tiny engine on the compiled kernels, with an empty cache; checked afterwards."""
    made = tiny.fresh()
    yield made
    assert_no_pins(made)


@pytest.fixture(params=[tiny.NATIVE, tiny.TORCH])
def any_engine(request: pytest.FixtureRequest, one_compute_thread: None) -> Iterator[Engine]:
    """The same, and once on plain torch."""
    made = tiny.fresh(request.param)
    yield made
    assert_no_pins(made)
