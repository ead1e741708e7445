"""The placement policies by name, from statistics and room to a placement.

    strata → parts (hash, random, popularity, METIS) → halo (none, one pass, in rounds, with load in mind) → owners

With a halo, parts are cut with bytes in balance alone, and owners are chosen among holders, so that heat is too.
Where copies are too few for that, parts are balanced in both from the start, and at last owners stay where they are.
Hot items on each node help the balance, and take room from the halo: with few and with many of them, what is better.
Knows nothing of requests to come.
Invariant: a policy is a pure function, and what it returns passes `check`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rcllm.cluster.evaluate import held_table, shares_on_best
from rcllm.cluster.halo import HaloConfig, grow
from rcllm.cluster.ownership import adopted, imbalance, relabelled
from rcllm.cluster.partition import PARTITIONS, Division, fit
from rcllm.cluster.placement import Placement, Room
from rcllm.cluster.statistics import Statistics
from rcllm.cluster.strata import HEAVY, HOT_SHARE, IMBALANCE, Strata, divide
from rcllm.data.text import did_you_mean
from rcllm.errors import ConfigError

_HEAVY = (0.9, HEAVY)  # of a node's heat: shares with which an item is tried on each node, where there are copies


@dataclass(frozen=True, slots=True)
class Composed:
    """A placement policy of the parts above. See `placement.Place`."""

    name: str
    partition: str = "metis"
    halo: HaloConfig | None = None  # None: no copies
    hot_share: float = HOT_SHARE
    seed: int = 0

    def __call__(self, statistics: Statistics, room: Room) -> Placement:
        """Raises CapacityError, ConfigError."""
        if room.num_nodes < 1:
            raise ConfigError(f"expected one node or more, got {room.num_nodes}")
        if self.halo is None:
            strata = divide(statistics, room, self.hot_share)
            return self.copied(statistics, self.divided(statistics, strata, room), room)
        each = (divide(statistics, room, self.hot_share, heavy) for heavy in _HEAVY)
        different = {strata.replicated.tobytes(): strata for strata in each}.values()
        return _best([self._grown(statistics, self.halo, strata, room) for strata in different], statistics)

    def _grown(self, statistics: Statistics, halo: HaloConfig, strata: Strata, room: Room) -> Placement:
        """The first of the ways to cut parts and to choose owners that keeps the balance, or the last of them."""
        for partition, ways in (("cut", (halo.drifts,)), ("metis", dict.fromkeys((halo.drifts, False)))):
            division = replace(self, partition=partition).divided(statistics, strata, room)
            for drifts in ways:
                placement = replace(self, halo=replace(halo, drifts=drifts)).copied(statistics, division, room)
                if imbalance(placement, statistics.heat) <= IMBALANCE:
                    return placement
        return placement  # there are too few copies to choose owners among

    def divided(self, statistics: Statistics, strata: Strata, room: Room) -> Division:
        """Owners of what is sharded."""
        owner = PARTITIONS[self.partition](statistics, strata, room, self.seed)
        return fit(statistics, Division(strata, owner), room)

    def copied(self, statistics: Statistics, division: Division, room: Room) -> Placement:
        """The placement that a division becomes with its copies."""
        halos, owner = tuple(np.empty(0, np.int64) for _ in range(room.num_nodes)), division.owner
        if self.halo is not None:
            grown = grow(statistics, division, room, self.halo)
            halos, owner = grown.items, grown.owner
        placement = Placement(
            statistics.item_ids,
            statistics.num_bytes,
            room,
            division.strata.replicated,
            division.strata.evicted,
            owner,
            halos,
            self.name,
        )
        return placement if self.halo is None else relabelled(adopted(placement), statistics.heat)


def _best(placements: Sequence[Placement], statistics: Statistics) -> Placement:
    """Of those in balance, or about as near to it as any, the one whose best nodes hold most of the requests' items."""
    if len(placements) == 1:
        return placements[0]
    uneven = [imbalance(placement, statistics.heat) for placement in placements]
    least = min(uneven)
    most = IMBALANCE if least <= IMBALANCE else least + IMBALANCE
    even = [placement for placement, each in zip(placements, uneven, strict=True) if each <= most]
    return max(even, key=lambda placement: float(shares_on_best(held_table(placement), statistics.sample).sum()))


ONE_PASS = HaloConfig(rounds=1, temperature=0.0, smoothing=0.0, drifts=False)

PLACES: dict[str, Callable[..., Composed]] = {
    "hash": lambda **given: Composed("hash", "hash", **given),
    "random": lambda **given: Composed("random", "random", **given),
    "popularity": lambda **given: Composed("popularity", "popularity", **given),
    "metis": lambda **given: Composed("metis", **given),
    "halo": lambda **given: Composed("halo", halo=ONE_PASS, **given),
    "learned": lambda **given: Composed("learned", halo=HaloConfig(), **given),
    "spread": lambda **given: Composed("spread", halo=HaloConfig(spread=True), **given),
}


def make_place(name: str, **parameters: float) -> Composed:
    """The policy of that name. Raises ConfigError."""
    if name not in PLACES:
        raise ConfigError(
            f"expected a placement policy ({', '.join(PLACES)}), got {name!r}.{did_you_mean(name, PLACES)}"
        )
    return PLACES[name](**parameters)
