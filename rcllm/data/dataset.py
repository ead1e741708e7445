"""A data set: a catalogue, the interactions with its items, and how reading them went.

Knows nothing of any published format; a format is a pair of sources that `assemble` reads. Invariant of an assembled
data set: every interaction names an item of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from rcllm.core.ranking import Interaction, Item, ItemId
from rcllm.data.catalogue import Catalogue, read_items
from rcllm.data.interactions import ParseInteractions, read_log
from rcllm.data.raw import Fields, Notes, Table
from rcllm.data.rows import ReadReport
from rcllm.data.text import listed
from rcllm.errors import DataError

_Parse = TypeVar("_Parse")
_PARTS = ("train", "valid", "test")  # of a split, as RecBole names them, from the oldest rows to the newest


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    catalogue: Catalogue
    interactions: tuple[Interaction, ...]  # in the order of the files
    reports: tuple[ReadReport, ...] = ()  # one per file
    notes: tuple[str, ...] = ()  # what was guessed about the folder

    def __post_init__(self) -> None:
        """The catalogue knows its interactions, so that what a template shows of them can be made (`popularity`)."""
        object.__setattr__(self, "catalogue", self.catalogue.knowing(self.interactions))

    def __str__(self) -> str:
        first = f"{self.name}: {len(self.catalogue):,} items, {len(self.interactions):,} interactions"
        return "\n".join([first, *(f"  {note}" for note in self.notes), *map(str, self.reports)])


@dataclass(frozen=True)  # without slots, which Python 3.11 cannot join with frozen and Generic
class FileOf(Generic[_Parse]):
    """The files of one kind in a folder, and how to read their rows."""

    patterns: tuple[str, ...]  # globs by preference: all files of the first one that matches are read
    parse: _Parse
    table: Table | None = None  # None: by the suffix of the file
    but_not: str = ""  # a prefix of file names that the globs catch and should not
    notes: Notes = field(default_factory=Notes)  # where `parse` puts what it has to tell

    def files(self, folder: Path) -> list[Path]:
        """In order of name, except that the parts of a split come as train, valid and test."""
        for pattern in self.patterns:
            found = [path for path in folder.glob(pattern) if not (self.but_not and path.name.startswith(self.but_not))]
            if found:
                return sorted(found, key=lambda path: (_part(path), path.name))
        return []

    def unread(self, folder: Path) -> list[str]:
        """Names of files that would do as well, and are not read because others come first."""
        read = self.files(folder)
        others = (path for pattern in self.patterns for path in sorted(folder.glob(pattern)) if path not in read)
        return [
            path.name for path in dict.fromkeys(others) if not (self.but_not and path.name.startswith(self.but_not))
        ]


def _part(path: Path) -> int:
    words = path.name.lower().split(".")
    return next((place for place, name in enumerate(_PARTS) if name in words), 0)


ItemSource = FileOf[Callable[[Fields], Item]]
InteractionSource = FileOf[ParseInteractions]


def assemble(folder: Path, items: ItemSource, interactions: InteractionSource, *, strict: bool) -> Dataset:
    """Reads items, then interactions, of which those that name an unknown item are malformed rows."""
    catalogue, item_reports = _read_catalogue(required_files(folder, items), items, strict)
    rows, reports = _read_interactions(folder, interactions, catalogue, strict)
    notes = _unread(folder, items, interactions)
    return Dataset(folder.name, catalogue, tuple(rows), (*item_reports, *reports), notes)


def assemble_textless(folder: Path, items: ItemSource, interactions: InteractionSource, *, strict: bool) -> Dataset:
    """As `assemble`; where the folder has no items file, the items are those of the interactions, without text."""
    if items.files(folder):
        return assemble(folder, items, interactions, strict=strict)
    rows, reports = _read_interactions(folder, interactions, None, strict)
    catalogue = Catalogue(Item(item_id, {}) for item_id in dict.fromkeys(row.item_id for row in rows))
    return Dataset(folder.name, catalogue, tuple(rows), tuple(reports), _unread(folder, interactions))


def _unread(folder: Path, *sources: ItemSource | InteractionSource) -> tuple[str, ...]:
    """What to say of files that were passed over for others of the same kind."""
    return tuple(
        f"{listed(unread)} stayed unread, because {source.files(folder)[0].name} is there too"
        for source in sources
        if (unread := source.unread(folder))
    )


def required_files(folder: Path, source: ItemSource | InteractionSource) -> list[Path]:
    """The files of a source; raises DataError that says what was looked for and what is there."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with {' or '.join(source.patterns)}; check the path")
    if found := source.files(folder):
        return found
    there = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder}: expected a file named {' or '.join(source.patterns)}, "
        f"got {listed(there) or 'an empty folder'}; download it, or name another format"
    )


def _read_catalogue(paths: list[Path], source: ItemSource, strict: bool) -> tuple[Catalogue, list[ReadReport]]:
    items: dict[ItemId, Item] = {}
    reports: list[ReadReport] = []
    for path in paths:
        part, report = read_items(
            path, source.parse, known=items, strict=strict, table=source.table, notes=source.notes
        )
        items.update(part)
        reports.append(report)
    return Catalogue(items.values()), reports


def _read_interactions(
    folder: Path, source: InteractionSource, catalogue: Catalogue | None, strict: bool
) -> tuple[list[Interaction], list[ReadReport]]:
    rows: list[Interaction] = []
    reports: list[ReadReport] = []
    for path in required_files(folder, source):
        part, report = read_log(
            path, source.parse, items=catalogue, strict=strict, table=source.table, notes=source.notes
        )
        rows += part
        reports.append(report)
    return rows, reports
