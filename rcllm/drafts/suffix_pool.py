"""A draft pool: the answers of one group of users or items, of one model, saved ones and those being written now.

A memory-mapped `SuffixIndex` plus a small overlay in memory. Used by one thread at a time. Knows nothing of groups or
trees. Invariants: what a private answer says is drafted for its owner alone. After `erase`, no text of the owner is in
memory, and after the next `save` none is in the file. `max_tokens` holds after every `compact`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from rcllm.core.ranking import IntArray
from rcllm.drafts.draft_tree import END
from rcllm.drafts.suffix_index import (
    LONGEST,
    NOBODY,
    VERSION,
    Header,
    PastAnswer,
    SuffixIndex,
    context_ranks,
    merged,
    owner_key,
)
from rcllm.errors import ConfigError

Sharing = Literal["all", "own"]  # "own": a user's text drafts for this user alone; texts about items for everybody

_NGRAMS = (4, 2, 1)  # lengths by which the overlay finds places
_COMMON_PLACES = 256  # a token with so many places in the overlay is too common to match alone


@dataclass(frozen=True, slots=True)
class DraftPoolLimits:
    max_tokens: int = 1_000_000  # 16 bytes each; beyond it, older and rarer answers are forgotten
    overlay_tokens: int = 32_768  # beyond it the overlay is sorted into the index


@dataclass(slots=True, eq=False)
class Running:
    """An answer that is being written, or that no index holds yet."""

    owner: bytes
    private: bool
    token_ids: list[int] = field(default_factory=list)
    ended: bool = False
    erased: bool = False  # nothing more is kept of it


@dataclass(frozen=True, slots=True)
class OverlayMatch:
    """A place in the overlay: `length` tokens before it agree with the text asked for."""

    window: list[int]  # what follows, at least one token
    length: int


class SuffixPool:
    """`open` a saved pool, or start an empty one with `create`."""

    def __init__(self, index: SuffixIndex, limits: DraftPoolLimits) -> None:
        self.index = index
        self.limits = limits
        self._overlay: list[Running] = []
        self._overlay_tokens = 0
        self._places: dict[tuple[int, ...], list[tuple[Running, int]]] = defaultdict(list)

    @classmethod
    def create(cls, fingerprint: str, sharing: Sharing = "all", limits: DraftPoolLimits | None = None) -> SuffixPool:
        """fingerprint: names the model and the tokenizer whose answers the pool will hold."""
        return cls(SuffixIndex.build(Header(VERSION, fingerprint, sharing), []), limits or DraftPoolLimits())

    @classmethod
    def open(cls, path: Path, fingerprint: str, limits: DraftPoolLimits | None = None) -> SuffixPool:
        """Maps a saved pool. Raises DataError for a broken file, ConfigError for one of another model."""
        return cls(SuffixIndex.open(path, fingerprint), limits or DraftPoolLimits())

    @classmethod
    def merge(cls, pools: Sequence[SuffixPool], limits: DraftPoolLimits | None = None) -> SuffixPool:
        """One pool of all ended answers of `pools`, which must be of one model and one way of sharing."""
        headers = {pool.index.header for pool in pools}
        if len(headers) != 1:
            raise ConfigError(f"Only pools of one model, format and way of sharing can be merged, got {headers}")
        pool = cls.create(pools[0].index.header.fingerprint, pools[0].sharing, limits or pools[0].limits)
        pool._replace_index(answer for other in pools for answer in other.answers())
        return pool

    @property
    def sharing(self) -> Sharing:
        return "own" if self.index.header.sharing == "own" else "all"

    @property
    def num_tokens(self) -> int:
        return self.index.num_tokens + self._overlay_tokens

    def answers(self) -> list[PastAnswer]:
        """All ended answers, those of the index first."""
        ended = (PastAnswer(np.asarray(a.token_ids, np.int32), a.owner, a.private) for a in self._overlay if a.ended)
        return [*self.index.answers(), *ended]

    # ---- learning ---------------------------------------------------------------------------------------------------

    def begin(self, owner: str | None = None, *, private: bool = False) -> Running:
        """A new answer; feed it with `extend`, then `end` it. private: the owner opted out of helping others."""
        running = Running(owner_key(owner), owner is not None and (private or self.sharing == "own"))
        self._overlay.append(running)
        return running

    def extend(self, running: Running, token_ids: Iterable[int]) -> None:
        """The next tokens of an answer. They draft for others at once, unless the answer is private."""
        if running.erased:
            return
        tokens = running.token_ids
        for token in token_ids:
            if tokens and not running.private:  # this token continues what stands before it
                for n in _NGRAMS:
                    if n <= len(tokens):
                        self._places[tuple(tokens[-n:])].append((running, len(tokens)))
            tokens.append(token)
            self._overlay_tokens += 1

    def end(self, running: Running) -> None:
        """The answer is whole. Sorts the overlay into the index where it has grown too large."""
        running.ended = True
        if self._overlay_tokens > max(self.limits.overlay_tokens, self.index.num_tokens // 8):
            self.compact()

    def learn(self, token_ids: Iterable[int], owner: str | None = None, *, private: bool = False) -> None:
        """Adds a whole answer at once, so that later drafts can be taken from it."""
        running = self.begin(owner, private=private)
        self.extend(running, token_ids)
        self.end(running)

    def compact(self) -> None:
        """Sorts all ended answers into a new index in memory, forgetting what does not fit `max_tokens`."""
        self._replace_index(self.answers())

    def save(self, path: Path) -> None:
        """Compacts, then writes atomically; the pool goes on from the file's memory map."""
        self.compact()
        self.index.save(path)
        self.index = SuffixIndex.open(path, self.index.header.fingerprint)

    # ---- privacy ----------------------------------------------------------------------------------------------------

    def erase(self, owners: Collection[str]) -> None:
        """Removes all text of `owners`, running answers too. A saved file holds it until the next `save`."""
        keys = {owner_key(owner) for owner in owners}
        for running in self._overlay:
            if running.owner in keys:
                running.erased, running.token_ids = True, []
        self._overlay = [running for running in self._overlay if not running.erased]
        self._replace_index(answer for answer in self.answers() if answer.owner not in keys)

    def withdraw(self, owners: Collection[str]) -> None:
        """Makes all text of `owners` private, as if they had opted out from the start."""
        keys = {owner_key(owner) for owner in owners}
        for running in self._overlay:
            running.private |= running.owner in keys
        self._replace_index(replace(a, private=a.private or a.owner in keys) for a in self.answers())

    def private_texts(self, owner: str | None) -> list[IntArray]:
        """The owner's ended private answers, for drafts of this owner's next one."""
        key = owner_key(owner)
        if key == NOBODY:
            return []
        ended = [np.asarray(a.token_ids, np.int32) for a in self._overlay if a.ended and a.private and a.owner == key]
        return [*self.index.private_texts(key), *ended]

    # ---- look-up in the overlay -------------------------------------------------------------------------------------

    def find_recent(
        self, tail: Sequence[int], branch: int, max_rows: int, but: Running | None = None
    ) -> list[OverlayMatch]:
        """The newest shared places of the overlay, other than in `but`, that follow the last 4, 2 or 1 tokens."""
        for n in _NGRAMS:
            places = self._places.get(tuple(tail[-n:]), ()) if n <= len(tail) else ()
            if n == 1 and len(places) > _COMMON_PLACES:
                break
            found = [
                OverlayMatch(running.token_ids[place : place + branch], agreeing(running.token_ids, place, tail))
                for running, place in places[-max_rows:]
                if running is not but
            ]
            if found:
                return found
        return []

    def _replace_index(self, answers: Iterable[PastAnswer]) -> None:
        kept = forgotten(merged(answers), self.limits.max_tokens)
        self.index = SuffixIndex.build(self.index.header, kept)
        running = [answer for answer in self._overlay if not answer.ended]
        self._overlay, self._overlay_tokens = running, 0
        self._places.clear()
        for answer in running:
            token_ids, answer.token_ids = answer.token_ids, []
            self.extend(answer, token_ids)


def agreeing(token_ids: Sequence[int], place: int, tail: Sequence[int]) -> int:
    """How many tokens before `place` agree with the end of `tail`; at most LONGEST."""
    most = min(place, len(tail), LONGEST)
    for n in range(most):
        if token_ids[place - 1 - n] != tail[-1 - n]:
            return n
    return most


def forgotten(answers: list[PastAnswer], max_tokens: int) -> list[PastAnswer]:
    """`answers` as they are where they fit; else all with half their weight, without those that say least.

    What stays fills at most three quarters of `max_tokens`. An answer says much when it is new (a weight not yet
    halved) and when its phrases, runs of four tokens, occur in many answers. (LASER halves and prunes likewise.)
    """
    sizes = np.array([len(answer.token_ids) for answer in answers], np.int64)
    if sizes.sum() <= max_tokens:
        return answers
    faded = [replace(answer, weight=answer.weight / 2) for answer in answers]
    text = np.concatenate([np.append(answer.token_ids, END) for answer in faded]).astype(np.int32)
    ranks = context_ranks(text, 4)
    counts = np.log2(1.0 + np.bincount(ranks)[ranks])
    starts = np.concatenate([[0], np.cumsum(sizes + 1)[:-1]])
    worth = np.add.reduceat(counts, starts) / (sizes + 1) * [answer.weight for answer in faded]
    best = np.argsort(-worth, kind="stable")
    kept = np.sort(best[np.cumsum(sizes[best]) <= max_tokens * 3 // 4])
    return [faded[i] for i in kept.tolist()]
