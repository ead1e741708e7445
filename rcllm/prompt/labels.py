"""Labels of candidates: the names, and the trie of their tokens that the read-out scores.

Knows nothing of prompts. Invariant: the names for one list have equal length in characters, so no name is a prefix
of another and the trie's leaves are exactly the labels.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from rcllm.core.ranking import TokenIds


def label_names(count: int) -> tuple[str, ...]:
    """A, B, … for up to 26 candidates, else numbers of equal width: 01, 02, … 27."""
    if count <= len(string.ascii_uppercase):
        return tuple(string.ascii_uppercase[:count])
    width = len(str(count))
    return tuple(str(i).zfill(width) for i in range(1, count + 1))


@dataclass(frozen=True, slots=True)
class Choice:
    """An inner node of the trie: after `prefix`, one of `token_ids` follows."""

    prefix: TokenIds
    token_ids: TokenIds  # distinct, in order of first label


def choices(labels: Sequence[TokenIds]) -> tuple[Choice, ...]:
    """The inner nodes of the labels' trie, the root first, parents before children."""
    children: dict[TokenIds, dict[int, None]] = {}
    for label in labels:
        for i in range(len(label)):
            children.setdefault(label[:i], {})[label[i]] = None
    ordered = sorted(children, key=len)
    return tuple(Choice(prefix, tuple(children[prefix])) for prefix in ordered)
