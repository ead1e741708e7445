"""Every keeper against a model of it: what it returns was put last, and was not erased, whatever is done."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rcllm.errors import ErasureError
from rcllm.store.contract import Store
from rcllm.store.faulty import InjectedError
from rcllm.store.owners import one_name
from tests.contracts.keepers import (
    BLOCK_BYTES,
    FAULTY,
    KEEPERS,
    LASTING,
    NO_QUEUE,
    Place,
    block,
    check,
    key,
    settle,
    version_of,
)

T = TypeVar("T")
numbers = st.lists(st.integers(0, 11), max_size=5, unique=True)
FEW = settings(max_examples=50, stateful_step_count=40, deadline=None)
FEWER = settings(FEW, max_examples=8)  # each write is forced to the disk


def owner(number: int) -> str | None:
    return f"owner {number % 4}" if number % 4 else None


class StoreMachine(RuleBasedStateMachine):
    """`older_may_stay`: a block that could not be replaced may be read, for its key says that it is as good."""

    def __init__(self, make: Callable[[Random], Store], *, lasts: bool = False, older_may_stay: bool = False) -> None:
        super().__init__()
        self.make, self.lasts, self.older_may_stay = make, lasts, older_may_stay
        self.versions = itertools.cycle(range(256))
        self.put_since_erased: dict[int, list[int]] = defaultdict(list)  # versions of each block, the last one last

    @initialize(seed=st.integers(0, 2**32))
    def open(self, seed: int) -> None:
        self.rng = Random(seed)
        self.store = self.make(self.rng)

    def asked(self, ask: Callable[[], T]) -> T | None:
        """What the store answers; None where a fault was injected."""
        try:
            return ask()
        except InjectedError:
            return None

    @rule(which=numbers)
    def put(self, which: list[int]) -> None:
        version = next(self.versions)
        blocks = {key(n): block(n, owner(n), version) for n in which}
        self.asked(lambda: self.store.put_many(blocks))
        for n in which:
            self.put_since_erased[n].append(version)

    @rule(which=numbers)
    def get(self, which: list[int]) -> None:
        found = self.asked(lambda: self.store.get_many(map(key, which))) or {}
        assert found.keys() <= set(map(key, which))
        for n in which:
            if key(n) in found and (version := version_of(n, found[key(n)])) is not None:
                known = self.put_since_erased[n]
                assert version in (known if self.older_may_stay else known[-1:]), f"{version} of {n}, put: {known}"
                assert one_name(found[key(n)].owner) == one_name(owner(n))

    @rule(which=numbers)
    def look_up(self, which: list[int]) -> None:
        found = self.asked(lambda: self.store.lookup_many(map(key, which))) or {}
        assert found.keys() <= {key(n) for n in which if self.put_since_erased[n]}
        assert all(each.num_bytes == BLOCK_BYTES for each in found.values())

    @rule(which=st.integers(1, 3))
    def delete_owner(self, which: int) -> None:
        while True:
            try:
                count = self.store.delete_owner(f"owner {which}")
                break
            except (InjectedError, ErasureError):
                continue  # erasing is asked for again until it worked
        erased = [n for n in self.put_since_erased if n % 4 == which]
        assert 0 <= count <= len(erased)
        for n in erased:
            del self.put_since_erased[n]

    @rule()
    def settle(self) -> None:
        settle(self.store)
        for tier in self.asked(self.store.stats) or ():
            assert tier.num_bytes <= tier.budget_bytes
            assert tier.num_bytes == tier.num_blocks * BLOCK_BYTES
            assert tier.waiting_bytes == 0
            if not self.older_may_stay:  # a tier that fails is told as it was when it could last tell
                assert tier.num_blocks <= sum(bool(known) for known in self.put_since_erased.values())

    @precondition(lambda self: self.lasts)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.make(self.rng)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "store"):
            check(self.store)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def run(machine: Callable[[], RuleBasedStateMachine], how_many: settings = FEW) -> None:
    run_state_machine_as_test(machine, settings=how_many)  # type: ignore[no-untyped-call]


def places(folder: Path, port: Callable[[], int]) -> Iterable[Place]:
    return (Place(folder / str(number), port) for number in itertools.count())


@pytest.mark.parametrize("name", KEEPERS)
def test_what_is_read_was_put_last(name: str, tmp_path: Path, port: Callable[[], int]) -> None:
    fresh = iter(places(tmp_path, port))

    def machine() -> StoreMachine:
        place = next(fresh)
        make = KEEPERS[name]
        return StoreMachine(lambda rng: make(place), lasts=name in LASTING, older_may_stay=name == NO_QUEUE)

    run(machine, FEWER if "disk" in name else FEW)


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_misses(name: str) -> None:
    run(partial(StoreMachine, FAULTY[name], older_may_stay=True))
