"""Labels of candidates: the names, and the trie of their tokens that the read-out scores.

Knows nothing of prompts. Invariant: the names for one list have equal length in characters, so no name is a prefix
of another and the trie's leaves are exactly the labels.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rcllm.core.ranking import TokenIds
from rcllm.errors import ConfigError


def label_names(count: int) -> tuple[str, ...]:
    """A, B, … for up to 26 candidates, else numbers of equal width: 01, 02, … 27."""
    if count <= len(string.ascii_uppercase):
        return tuple(string.ascii_uppercase[:count])
    width = len(str(count))
    return tuple(str(i).zfill(width) for i in range(1, count + 1))


def check_told_apart(names: Sequence[str], token_ids: Sequence[TokenIds], unknown_id: int | None) -> None:
    """Raises ConfigError where a tokenizer cannot write a name, or no score could tell two of them apart."""
    if mute := [name for name, ids in zip(names, token_ids, strict=True) if not ids or unknown_id in ids]:
        raise ConfigError(
            f"the model's tokenizer cannot write the labels {_some(mute)}, so no score could tell candidates apart; "
            "use another model, or the read-out likelihood"
        )
    begins = {ids[:i]: name for name, ids in zip(names, token_ids, strict=True) for i in range(1, len(ids))}
    seen: dict[TokenIds, str] = {}
    for name, ids in zip(names, token_ids, strict=True):
        if (other := seen.get(ids, begins.get(ids))) is not None:
            raise ConfigError(
                f"the model's tokenizer writes the labels {other!r} and {name!r} alike, or one as the beginning of the "
                "other, so no score could tell candidates apart; use another model, or the read-out likelihood"
            )
        seen[ids] = name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """An inner node of the trie: after `prefix`, one of `token_ids` follows."""

    prefix: TokenIds
    token_ids: TokenIds  # distinct, in order of first label


@lru_cache(maxsize=64)  # lists of one length have the same labels
def choices(labels: tuple[TokenIds, ...]) -> tuple[Choice, ...]:
    """The inner nodes of the labels' trie, the root first, parents before children."""
    children: dict[TokenIds, dict[int, None]] = {}
    for label in labels:
        for i in range(len(label)):
            children.setdefault(label[:i], {})[label[i]] = None
    ordered = sorted(children, key=len)
    return tuple(Choice(prefix, tuple(children[prefix])) for prefix in ordered)
