"""Offline work in parts, on processes of a Ray cluster.

Knows nothing of what the parts are. Invariant: results come back in the order in which parts went in, one for each, and
no more than two parts for each process are under way, so that parts are made no faster than they are worked on. A
process that dies is begun again, and its part with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.actor_pool import ActorPool

from rcllm.config import ClusterConfig
from rcllm.core.ranking import ItemId
from rcllm.engine.warming import WarmProgress
from rcllm.errors import ConfigError
from rcllm.on_ray.application import begin_ray, last_line, placement_of
from rcllm.on_ray.recipe import Recipe
from rcllm.on_ray.worker import shard_of

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")
_UNDER_WAY = 2  # parts for each process: one that it works on, and one that waits for it

# Called in each process with its number; gives what is then called with each part. Pickled.
Make = Callable[[int], Callable[[PartT], ResultT]]


class _Process(Generic[PartT, ResultT]):
    def __init__(self, make: Make[PartT, ResultT], number: int) -> None:
        self._work = make(number)

    def work(self, part: PartT) -> ResultT:
        return self._work(part)


@contextmanager
def processes(
    make: Make[PartT, ResultT], cluster: ClusterConfig
) -> Iterator[Callable[[Iterable[PartT]], Iterator[ResultT]]]:
    """`cluster.replicas` processes, each with its cores or cards, while the block runs; yields what maps parts.

    What a part raises, the map raises; ConfigError where a process cannot begin.
    """
    begin_ray(cluster)
    try:
        kind: Any = ray.remote(_Process).options(
            num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=-1, max_task_retries=-1
        )
        actors = [kind.remote(make, number) for number in range(cluster.replicas)]
        yield lambda parts: _in_order(actors, parts)
    finally:
        ray.shutdown()


def _in_order(actors: list[Any], parts: Iterable[PartT]) -> Iterator[ResultT]:
    pool, under_way = ActorPool(actors), 0
    for part in parts:
        if under_way == _UNDER_WAY * len(actors):
            yield _next(pool)
            under_way -= 1
        pool.submit(lambda actor, each: actor.work.remote(each), part)
        under_way += 1
    while pool.has_next():
        yield _next(pool)


def _next(pool: ActorPool) -> Any:
    try:
        return pool.get_next()
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise ConfigError(f"a process ended: {last_line(str(error))}") from error


# ---- warming ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of one replica's shard."""

    node: int
    num_items: int
    done: WarmProgress


def shards(recipe: Recipe, cluster: ClusterConfig) -> list[tuple[ItemId, ...]]:
    """The items of each replica, replicated ones first. Raises DataError, ConfigError."""
    item_ids = recipe.item_ids()
    placement, there = placement_of(item_ids, cluster), set(item_ids)
    return [shard_of(placement, node, there) for node in range(cluster.replicas)]


def warms(recipe: Recipe, number: int) -> Callable[[tuple[int, Sequence[ItemId]]], Warmed]:
    """A `Make`: warms the shard of any replica, in that replica's own store, as far as it is not there yet."""

    def warm(part: tuple[int, Sequence[ItemId]]) -> Warmed:
        node, items = part
        built = recipe.build(node, None)
        try:
            return Warmed(node, len(items), built.engine.warm(items))
        finally:
            built.close()

    return warm
