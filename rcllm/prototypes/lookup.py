"""Which prototype, if any, stands for each token of a history: the look-up of the semantic pool, without its KV.

Knows nothing of tensors; never imports torch. Invariant: a token of a kind that is always fresh is never matched, and
no token is matched to a prototype whose embedding is beyond the threshold. Equal tokens in equal buckets always match.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import BoolArray, Matches, TokenIds
from rcllm.errors import ConfigError
from rcllm.prompt.template import Template
from rcllm.prompt.tokenizer import Tokenizer
from rcllm.prototypes.config import FRESH_PATTERN
from rcllm.prototypes.lsh import Floats, Ints, Lsh, Rows, Words, embed

_MAX_PER_BUCKET = 16  # prototypes of a crowded bucket that are compared: those that stand for most tokens


def always_fresh(tokenizer: Tokenizer, template: Template, pattern: str = FRESH_PATTERN) -> BoolArray:
    """[vocab]: tokens whose text matches `pattern`, and those that the template itself writes around an event.

    Only natural language is taken from the pool (RcLLM §III-B): timestamps, ids, delimiters and field names are not.
    """
    try:
        excluded = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the pattern of tokens that are always fresh, {pattern!r}, is not one: {error}") from error
    fresh = np.array([bool(excluded.search(tokenizer.decode((i,)))) for i in range(tokenizer.vocab_size)], dtype=bool)
    for part in (*template.event, template.event_text):
        for literal, *_ in string.Formatter().parse(part):
            fresh[list(tokenizer.encode(literal))] = True
    return fresh


def words_of(token_ids: npt.ArrayLike, start_position: int, bucket_width: int) -> Words:
    """A run of tokens as words."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    return Words(tokens, (np.arange(len(tokens)) + start_position) // bucket_width)


class PrototypeIndex:
    """Finds the nearest prototype of many words at once."""

    def __init__(self, words: Words, covered: Ints, lsh: Lsh, rows: Rows, signatures: Ints | None = None) -> None:
        """`words`: distinct, ordered by code; `covered`: tokens each stands for; `signatures` [tables, n]: of them."""
        self.words, self.lsh, self._rows = words, lsh, rows
        self.signatures = lsh.signatures(rows, words) if signatures is None else signatures
        self._codes = words.codes
        # within a bucket, the prototypes that stand for most tokens come first
        self._members = np.stack([np.lexsort((-covered, table)) for table in self.signatures])
        self._sorted = np.take_along_axis(self.signatures, self._members, axis=1)

    def __len__(self) -> int:
        return len(self.words)

    def nearest(self, words: Words, near_enough: float = 1.0) -> tuple[Ints, Floats]:
        """Per word, the nearest prototype that is found, and the cosine; where there is none, that is 0.

        First the same token in the next buckets, without hashing; only where that is not `near_enough`, the nearest of
        those that share an LSH bucket with the word in any table. The same token is worth preferring: its K and V are
        right in layer 0, whatever the place.
        """
        found, cosine = np.zeros(len(words), np.int64), np.zeros(len(words), np.float32)
        if not len(self) or not len(words):
            return found, cosine
        above = np.minimum(np.searchsorted(self._codes, words.codes), len(self) - 1)
        for neighbour in (above, np.maximum(above - 1, 0)):
            same = np.flatnonzero(self.words.token_ids[neighbour] == words.token_ids)
            self._take_nearer(words, same, neighbour[same], found, cosine)
        left = np.flatnonzero(cosine < near_enough)
        if len(left):
            word, candidates = self._candidates(self.lsh.signatures(self._rows, words[left]))
            self._take_nearer(words, left[word], candidates, found, cosine)
        return found, cosine

    def _take_nearer(self, words: Words, word: Ints, candidates: Ints, found: Ints, cosine: Floats) -> None:
        """Updates `found` and `cosine` of words[word] with the best of their candidates; ties by the smaller code."""
        asked, place_asked = np.unique(word, return_inverse=True)
        distinct, place = np.unique(candidates, return_inverse=True)
        points, prototypes = embed(self._rows, words[asked]), embed(self._rows, self.words[distinct])
        near = np.einsum("nd,nd->n", points[place_asked], prototypes[place])
        near[self._codes[candidates] == words.codes[word]] = 1.0
        order = np.lexsort((candidates, -near, word))
        best = order[np.unique(word[order], return_index=True)[1]]
        best = best[near[best] > cosine[word[best]]]
        found[word[best]], cosine[word[best]] = candidates[best], near[best]

    def _candidates(self, signatures: Ints) -> tuple[Ints, Ints]:
        """Distinct pairs (word, prototype) that share a bucket."""
        pairs = []
        for table, asked in enumerate(signatures):
            first = np.searchsorted(self._sorted[table], asked, side="left")
            count = np.minimum(np.searchsorted(self._sorted[table], asked, side="right") - first, _MAX_PER_BUCKET)
            word = np.repeat(np.arange(len(asked)), count)
            place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
            pairs.append(word * len(self) + self._members[table, place])
        distinct = np.unique(np.concatenate(pairs))
        return distinct // len(self), distinct % len(self)


@dataclass(frozen=True, slots=True)
class Matcher:
    """Look-up of whole runs of tokens."""

    index: PrototypeIndex
    fresh: BoolArray  # [vocab], tokens that are never taken from the pool
    bucket_width: int  # positions that count as one place
    threshold: float  # least cosine

    def match(self, token_ids: TokenIds, start_position: int) -> Matches:
        """`start_position`: of the first token, counted as the pool was built: see `PrototypePool.borrow`."""
        words = words_of(token_ids, start_position, self.bucket_width)
        reused, prototype = np.zeros(len(words), bool), np.zeros(len(words), np.int64)
        cosine = np.zeros(len(words), np.float32)
        if len(asked := np.flatnonzero(~self.fresh[words.token_ids])):
            codes, place = np.unique(words[asked].codes, return_inverse=True)
            found, near = self.index.nearest(Words.of_codes(codes), self.threshold)
            prototype[asked], cosine[asked] = found[place], near[place]
            reused[asked] = near[place] >= self.threshold
        return Matches(reused, prototype, cosine)
