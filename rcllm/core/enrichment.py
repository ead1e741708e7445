"""How items are enriched: what is put into their text beside what a catalogue says.

Imports nothing that takes time, because the command line is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rcllm.annotated import Ge, Opt


@dataclass(frozen=True, slots=True)
class NeighbourConfig:
    """Which neighbours stand in an item's text, and how much of each."""

    count: Annotated[int, Ge(1), Opt("Neighbours of an item, at most.", name="--neighbours")] = 4
    words: Annotated[int, Ge(1), Opt("First words of each neighbour's title.")] = 4
    # cosines · n / (n + shrinkage), where n users chose both
    shrinkage: Annotated[float, Ge(0), Opt("How much pairs that few users chose together count for less.")] = 5.0
    # users that chose both; fewer say little, and one would show what that one user did
    min_users: Annotated[int, Ge(1), Opt("Users who must have chosen both.")] = 2
    # by how much another list's likeness must be higher for a list to change
    margin: Annotated[float, Ge(0), Opt("A list stays until another is better by this share.")] = 0.2
