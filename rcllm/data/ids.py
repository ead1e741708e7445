"""Lists of ids in text files, one a line: items to allow or deny, users to leave out.

Knows nothing of what the ids stand for. Invariant: what editors leave in a file (a byte order mark, line ends of any
system, blank lines) is never part of an id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rcllm.data.content import text_lines
from rcllm.data.text import did_you_mean, listed, other_spelling

_FEW = 3  # ids that a message names


def read_ids(path: Path) -> tuple[str, ...]:
    """The ids in the order of the file, each once. Raises DataError."""
    return tuple(dict.fromkeys(text_lines(path)))


def tell_unknown(source: str, ids: Sequence[str], known: Collection[str], where: str = "the catalogue") -> str | None:
    """Says how many of the ids are not among the `known`, and names the first few; None where all are.

    An id that nobody knows changes nothing, so that a misspelt one is a sold-out item that is recommended after all.
    """
    unknown = [each for each in ids if each not in known]
    if not unknown:
        return None
    spelt = other_spelling(unknown[0])
    hint = f" Did you mean {spelt!r}?" if spelt in known else did_you_mean(unknown[0], known)
    are = "is" if len(unknown) == 1 else "are"
    return f"{len(unknown):,} of {len(ids):,} ids of {source} {are} not in {where}: {listed(unknown, _FEW)}.{hint}"
