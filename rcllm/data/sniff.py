"""How a delimited text file is laid out, guessed from its first rows.

Knows nothing of what columns mean. Invariant: what a caller says is never guessed, and a guess that is not what the
name of the file promises is noted with the way to overrule it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

from rcllm.data.content import is_wide, raw_lines, suffix_of
from rcllm.data.raw import Table

_SAMPLE_BYTES, _SAMPLE_LINES = 2**18, 2000  # of the rows that are tried
_ENCODING_BYTES = 2**26  # how far to look for a letter that is not ASCII
_DELIMITERS = ",;\t|"
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_WINDOWS, _LATIN = "cp1252", "latin-1"  # most files that are not UTF-8 are in the first, which lacks five bytes


@dataclass(frozen=True, slots=True)
class _Trial:
    share: float  # of the sampled rows that have as many cells as the header
    num_columns: int
    table: Table


def guessed(path: Path, table: Table, note: Callable[[str], None]) -> Table:
    """`table` with all that it leaves open."""
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    encoding = table.encoding or _encoding(path, note)
    table = replace(table, encoding=encoding)
    if table.delimiter is not None and table.quoted is not None:
        return table
    sample = _sample(path, encoding)
    best = _best(sample, table, usual)
    if table.delimiter is None and best.delimiter != usual:
        note(
            f"cells were taken to be separated by a {_NAMES[best.delimiter or usual]}; if that is wrong, say what "
            "separates them (--delimiter, in Python Table(delimiter=…))"
        )
    if best.escape:
        note(f"quotation marks inside cells were taken to have a {best.escape} before them")
    if table.quoted is None and best.quoted and best.delimiter == "\t":
        note("cells were read as quoted, for quotation marks are doubled; in Python Table(quoted=False) says otherwise")
    return best


def _encoding(path: Path, note: Callable[[str], None]) -> str:
    """UTF-8, unless the file has letters beyond ASCII and no line with any is UTF-8."""
    seen, found = 0, "utf-8"
    for raw in raw_lines(path):
        seen += len(raw)
        if not raw.isascii():
            if _decodes(raw, "utf-8"):
                return "utf-8"
            found = _WINDOWS if found != _LATIN and _decodes(raw, _WINDOWS) else _LATIN
        if seen > _ENCODING_BYTES:
            break
    if found != "utf-8":
        note(
            f"the text is not UTF-8 and was read as {found}; if letters look wrong, name its encoding (--encoding, in "
            "Python Table(encoding=…))"
        )
    return found


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _sample(path: Path, encoding: str) -> list[str]:
    """The first lines, cut where they are very long."""
    plain = "utf-8" if is_wide(encoding) else encoding
    lines: list[str] = []
    size = 0
    for raw in islice(raw_lines(path, encoding), _SAMPLE_LINES):
        size += len(raw)
        if lines and size > _SAMPLE_BYTES:
            break
        lines.append(raw[:_SAMPLE_BYTES].decode(plain, errors="replace"))
    return lines


def _best(sample: list[str], table: Table, usual: str) -> Table:
    """The layout under which most rows have as many cells as the header; of equals, the usual one."""
    delimiters = [table.delimiter] if table.delimiter else [usual, *(each for each in _DELIMITERS if each != usual)]
    escapes = [table.escape] if table.escape else [None, "\\"] if any('\\"' in line for line in sample) else [None]
    trials = []
    for delimiter, escape in product(delimiters, escapes):
        quoted = _is_quoted(sample, delimiter) if table.quoted is None else table.quoted
        if quoted or escape is None:
            trials.append(_trial(sample, replace(table, delimiter=delimiter, quoted=quoted, escape=escape)))
    return max(trials, key=lambda trial: (trial.num_columns > 1, trial.share)).table  # the first of equals


def _is_quoted(sample: list[str], delimiter: str) -> bool:
    """CSV is. Text with tabs is where the header is quoted, or where quotation marks in quoted cells are doubled."""
    if delimiter != "\t":
        return True
    header = sample[0].rstrip("\r\n").split("\t") if sample else []
    if header and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header):
        return True
    return any(map(_is_doubled, (cell for line in sample for cell in line.rstrip("\r\n").split("\t"))))


def _is_doubled(cell: str) -> bool:
    """Whether the cell stands in quotation marks, and each one inside is doubled."""
    inside = cell[1:-1]
    return cell[:1] == cell[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _trial(sample: list[str], table: Table) -> _Trial:
    counts = list(_widths(sample, table))
    width = len(table.header) if table.header else counts[0] if counts else 0
    fitting = sum(count == width for count in counts)
    return _Trial(fitting / max(1, len(counts)), width, table)


def _widths(sample: list[str], table: Table) -> Iterator[int]:
    """The number of cells of each row; 0 for what is no row."""
    delimiter = table.delimiter or ","
    if not table.quoted:
        yield from (len(line.split(delimiter)) for line in sample if line.strip())
        return
    reader = csv.reader(sample, delimiter=delimiter, strict=True, escapechar=table.escape)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield 0
            continue
        if cells:
            yield len(cells)
