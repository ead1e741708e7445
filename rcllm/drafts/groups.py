"""Which group a user or an item belongs to, so that its answers are drafted from answers about its like.

Groups are k-means clusters of collaborative vectors; who is too new for those is sent, by the value of an attribute,
to the group where most of those with that value are. Knows nothing of pools or texts. Invariant: a router depends on
its data, options and seed alone, and sends everything somewhere: to a default group where nothing is known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from rcllm.drafts.lightgcn import Vectors, interaction_matrix, item_vectors, numbered, unit_rows, user_vector
from rcllm.durable import renamed
from rcllm.errors import ConfigError, DataError

Kind = Literal["user", "item"]

VERSION = 1
KINDS: tuple[Kind, ...] = ("user", "item")


@dataclass(frozen=True, slots=True)
class Member:
    """Who or what is described, as far as grouping goes."""

    kind: Kind
    profile_id: str  # user id or item id
    item_ids: tuple[str, ...] = ()  # what the user touched; for an item: nothing
    attributes: tuple[str, ...] = ()  # values of the field to group by: of the item, or of the user's items


@dataclass(frozen=True, slots=True)
class GroupOptions:
    num_groups: int = 8  # per kind
    dimensions: int = 64
    least_items: int = 3  # a user with fewer known items is grouped by attribute
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Router:
    """From profile to the name of a group: `user-0`, `item-7`, …"""

    options: GroupOptions
    item_ids: tuple[str, ...] = ()  # known items
    vectors: Vectors = field(default_factory=lambda: np.zeros((0, 1), np.float32))  # [items, dimensions]
    centres: Mapping[Kind, Vectors] = field(default_factory=dict)  # [groups, dimensions]
    by_attribute: Mapping[Kind, Mapping[str, int]] = field(default_factory=dict)
    default: Mapping[Kind, int] = field(default_factory=dict)  # where those go of whom nothing is known
    _number: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._number.update((item, i) for i, item in enumerate(self.item_ids))

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of all groups, each of which has a pool of its own."""
        return tuple(f"{kind}-{i}" for kind in KINDS for i in range(self._num_groups(kind)))

    def route(self, profile: Member) -> str:
        """By vector where enough is known, else by the most frequent attribute that has a group, else the default."""
        group = self.by_vector(profile)
        if group is None:
            group = self._by_attribute(profile)
        return f"{profile.kind}-{self.default.get(profile.kind, 0) if group is None else group}"

    def save(self, path: Path) -> None:
        """Writes the router as one .npz file."""
        described = {
            "version": VERSION,
            "options": asdict(self.options),
            "item_ids": self.item_ids,
            "by_attribute": self.by_attribute,
            "default": self.default,
        }
        centres = {f"centres_{kind}": centres for kind, centres in self.centres.items()}
        with renamed(path) as partial, partial.open("wb") as file:
            np.savez(
                file, allow_pickle=False, described=np.array(json.dumps(described)), vectors=self.vectors, **centres
            )

    @classmethod
    def open(cls, path: Path) -> Router:
        """Raises DataError for what is no whole router, ConfigError for one of another version."""
        try:
            with path.open("rb") as file, np.load(file) as saved:
                described = json.loads(str(saved["described"]))
                if described.pop("version") != VERSION:
                    raise ConfigError(f"{path} is of another version, expected {VERSION}; build the groups again")
                centres = {kind: saved[f"centres_{kind}"] for kind in KINDS if f"centres_{kind}" in saved}
                described["options"] = GroupOptions(**described["options"])
                described["item_ids"] = tuple(described["item_ids"])
                return cls(vectors=saved["vectors"], centres=centres, **described)
        except ConfigError:
            raise
        except Exception as error:  # the zip reader raises many kinds
            raise DataError(f"{path} is not a whole router ({error}); build the groups again") from error

    def _num_groups(self, kind: Kind) -> int:
        named = [*self.by_attribute.get(kind, {}).values(), self.default.get(kind, 0)]
        return max(len(self.centres.get(kind, ())), 1 + max(named))

    def by_vector(self, profile: Member) -> int | None:
        """The number of the nearest centre; None where too little is known of the profile."""
        if profile.kind not in self.centres:
            return None
        known = profile.item_ids if profile.kind == "user" else (profile.profile_id,)
        numbers = [self._number[item] for item in known if item in self._number]
        if len(numbers) < (self.options.least_items if profile.kind == "user" else 1):
            return None
        vector = user_vector(numbers, self.vectors)
        if not vector.any():
            return None
        return int(np.argmin(((self.centres[profile.kind] - vector) ** 2).sum(axis=1)))

    def _by_attribute(self, profile: Member) -> int | None:
        groups = self.by_attribute.get(profile.kind, {})
        for value, _ in Counter(profile.attributes).most_common():  # ties by first appearance
            if value in groups:
                return groups[value]
        return None


def one_group() -> Router:
    """All users in one group and all items in another."""
    return Router(GroupOptions(num_groups=1))


def build_router(
    histories: Mapping[str, Sequence[str]],
    profiles: Iterable[Member],
    options: GroupOptions,
) -> Router:
    """Clusters users and items.

    histories: user id → the items they touched. profiles: of users and items whose attributes are known, so that
    attributes lead to groups; without histories, each of the commonest values is a group, and the rest is one more.
    """
    item_ids, numbers = numbered(histories)
    vectors = item_vectors(interaction_matrix(numbers, len(item_ids)), options.dimensions, options.seed)
    enough = [items for items in numbers if len(items) >= options.least_items]
    users = unit_rows(np.array([user_vector(items, vectors) for items in enough]).reshape(-1, vectors.shape[1]))
    touched = vectors[vectors.any(axis=1)]
    points: dict[Kind, Vectors] = {"user": users[users.any(axis=1)], "item": touched}
    centres = {kind: clusters(rows, options) for kind, rows in points.items() if len(rows)}
    profiles = tuple(profiles)
    placed = Router(options, tuple(item_ids), vectors, centres)
    by_attribute: dict[Kind, dict[str, int]] = {}
    default: dict[Kind, int] = {}
    for kind in KINDS:
        grouped = [(placed.by_vector(profile), profile) for profile in profiles if profile.kind == kind]
        if kind in centres:
            by_attribute[kind] = majority(grouped)
            default[kind] = largest(group for group, _ in grouped)
        else:
            by_attribute[kind] = commonest_values((profile for _, profile in grouped), options.num_groups - 1)
            default[kind] = len(by_attribute[kind])
    return Router(options, tuple(item_ids), vectors, centres, by_attribute, default)


def clusters(rows: Vectors, options: GroupOptions) -> Vectors:
    """[groups, dimensions]: k-means centres; fewer than asked where there are fewer distinct rows."""
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415  the one place that needs it here: an optional dependency
    except ImportError as error:
        raise ConfigError("Groups need scikit-learn; install it with: pip install 'rcllm[report]'") from error
    wanted = min(options.num_groups, len(np.unique(rows, axis=0)))
    return np.asarray(KMeans(wanted, n_init=4, random_state=options.seed).fit(rows).cluster_centers_, np.float32)


def majority(grouped: Iterable[tuple[int | None, Member]]) -> dict[str, int]:
    """Attribute value → the group where most profiles with this value are; ties to the lower number."""
    voters: dict[str, list[int | None]] = {}
    for group, profile in grouped:
        if group is not None:
            for value in set(profile.attributes):
                voters.setdefault(value, []).append(group)
    return {value: largest(voters[value]) for value in sorted(voters)}


def largest(groups: Iterable[int | None]) -> int:
    """The commonest number; the lowest of several, and 0 of none."""
    sizes = Counter(group for group in groups if group is not None)
    return min(sizes, key=lambda group: (-sizes[group], group), default=0)


def commonest_values(profiles: Iterable[Member], most: int) -> dict[str, int]:
    """Attribute value → a group of its own, for the values that most profiles have; ties alphabetically."""
    counts = Counter(value for profile in profiles for value in set(profile.attributes))
    best = sorted(counts, key=lambda value: (-counts[value], value))[: max(most, 0)]
    return {value: group for group, value in enumerate(best)}
