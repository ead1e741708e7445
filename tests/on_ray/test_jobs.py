"""Offline work on Ray: every part once and in order, also where a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rcllm.config import ClusterConfig
from rcllm.errors import ConfigError, DataError
from rcllm.late import Late
from tests.on_ray.test_cluster import pytestmark as pytestmark
from tests.on_ray.tiny_recipe import TinyRecipe

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")

jobs = Late("rcllm.on_ray.jobs")

NUM_PARTS = 12
TWO = ClusterConfig(replicas=2, cpus=1.0)


def squares(folder: Path, number: int) -> Callable[[int], tuple[int, int]]:
    """A process that dies when it first sees part 3, and cannot do part 99."""

    def work(part: int) -> tuple[int, int]:
        if part == 99:
            raise DataError("part 99 cannot be read")
        died = folder / "died"
        if part == 3 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part, part * part

    return work


def test_each_part_comes_back_once_and_in_order_though_a_process_is_killed(tmp_path: Path) -> None:
    made: list[int] = []
    ahead: list[int] = []

    def parts() -> Iterator[int]:
        for part in range(NUM_PARTS):
            made.append(part)
            yield part

    with jobs.processes(partial(squares, tmp_path), TWO) as over:
        found = []
        for each in over(parts()):
            found.append(each)
            ahead.append(len(made) - len(found))
        with pytest.raises(DataError, match="part 99 cannot be read"):
            list(over([99]))
    assert (tmp_path / "died").exists()
    assert found == [(part, part * part) for part in range(NUM_PARTS)]
    assert max(ahead) <= 2 * TWO.replicas  # of any number of parts, few are under way


def cannot(number: int) -> Callable[[int], int]:
    raise DataError("this model cannot be read")


def test_a_process_that_cannot_begin_says_why() -> None:
    with jobs.processes(cannot, TWO) as over, pytest.raises(ConfigError, match="DataError: this model cannot be read"):
        list(over([1, 2]))


def test_shards_are_warmed_into_the_stores_of_their_replicas_and_not_twice(tmp_path: Path) -> None:
    recipe = TinyRecipe.of(TWO, store=tmp_path)
    shards = jobs.shards(recipe, TWO)
    with jobs.processes(partial(jobs.warms, recipe), TWO) as over:
        first, again = (list(over(enumerate(shards))) for _ in range(2))
    assert [each.num_items for each in first] == [len(shard) for shard in shards]
    assert sum(map(len, shards)) >= len(recipe.item_ids())
    assert all(each.done.computed_tokens > 0 for each in first)
    assert [each.done.computed_bytes for each in again] == [0, 0]
    assert all((tmp_path / f"node-{node}" / "data.mdb").exists() for node in (0, 1))
