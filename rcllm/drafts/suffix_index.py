"""A read-only index of answers, by which every place that continues a given text is found in microseconds.

One file in safetensors' layout, used by memory map without parsing. Places are sorted by the text before them, read
backwards, so that those that share a suffix with a text stand together. Knows nothing of weights of evidence or trees.
Invariant: places of private answers are not among the sorted ones: no look-up can return them.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from safetensors.numpy import save_file

from rcllm.core.ranking import IntArray
from rcllm.drafts.draft_tree import END
from rcllm.errors import ConfigError, DataError

VERSION = 1
LONGEST = 12  # tokens of a match that are told apart
_META = "rcllm_draft_pool"
_TOKEN_BITS, _KEY_TOKENS = 21, 3  # so many tokens to a 64-bit key
_DTYPES = {"I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "BOOL": np.bool_, "U8": np.uint8}

NOBODY = bytes(16)  # the owner of answers about items

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Header:
    """What an index was made for; stored in its file."""

    version: int
    fingerprint: str  # of the model and tokenizer that wrote the answers
    sharing: str  # "all", or "own": what users own is private


@dataclass(frozen=True, slots=True)
class PastAnswer:
    """One text that the model wrote."""

    token_ids: IntArray
    owner: bytes = NOBODY  # 16 bytes, see `owner_key`
    private: bool = False  # drafts for its owner alone
    weight: float = 1.0  # how much it counts as evidence; fades with age


@dataclass(frozen=True, slots=True)
class SuffixMatches:
    """Places of an index whose text before them ends like the text asked for."""

    places: Places  # [rows] positions in the index's text; the continuation begins there
    lengths: IntArray  # [rows] tokens that agree, at most LONGEST


def owner_key(owner: str | None) -> bytes:
    """16 bytes that stand for a user, so that files hold no user ids; None: nobody's, as texts about items are."""
    return NOBODY if owner is None else blake3(owner.encode()).digest(16)


class SuffixIndex:
    """Answers and the places in them. `build` one or `open` a saved one."""

    def __init__(self, header: Header, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.header = header
        self._arrays = arrays
        self.text: IntArray = arrays["text"]  # LONGEST ENDs, then the answers, an END after each
        self.starts: Places = arrays["starts"]  # [answers + 1]
        self.weights: npt.NDArray[np.float32] = arrays["weights"]  # [answers]
        self._owners: npt.NDArray[np.uint8] = arrays["owners"]  # [answers, 16]
        self._private: npt.NDArray[np.bool_] = arrays["private"]  # [answers]
        self._keys: npt.NDArray[np.uint64] = arrays["keys"]  # [places], rising: the last tokens before each place
        self._order: IntArray = arrays["order"]  # [places]: the places, sorted
        self._common = frozenset(arrays["common"].tolist())

    # ---- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, header: Header, answers: Iterable[PastAnswer]) -> SuffixIndex:
        """Sorts the places of `answers`: about 2 µs a token. The same text of the same owner is kept once, and
        counts more."""
        kept = merged(answers)
        ends = np.full(1, END, np.int32)
        parts = [np.full(LONGEST, END, np.int32)]
        for answer in kept:
            parts += [answer.token_ids.astype(np.int32), ends]
        text = np.concatenate(parts)
        if text.max() >= 2**_TOKEN_BITS:
            raise ConfigError(f"Draft pools hold token ids below {2**_TOKEN_BITS:,}, got {text.max():,}")
        starts = LONGEST + np.cumsum([0, *(len(answer.token_ids) + 1 for answer in kept)], dtype=np.int64)
        private = np.fromiter((answer.private for answer in kept), np.bool_, len(kept))
        order = sorted_places(text, starts, ~private)
        arrays: dict[str, npt.NDArray[Any]] = {
            "text": text,
            "starts": starts,
            "weights": np.fromiter((answer.weight for answer in kept), np.float32, len(kept)),
            "owners": np.frombuffer(b"".join(answer.owner for answer in kept), np.uint8).reshape(-1, 16),
            "private": private,
            "keys": _keys(text, order),
            "order": order,
            "common": commonest(text[text != END]),
        }
        return cls(header, arrays)

    def save(self, path: Path) -> None:
        """Atomically: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        contiguous = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        save_file(contiguous, partial, {_META: json.dumps(asdict(self.header))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> SuffixIndex:
        """Maps a saved index. Raises DataError for what is no whole index, ConfigError for another model's."""
        try:
            before, described = _described(path)
            meta = json.loads(described.pop("__metadata__")[_META])
            if meta["version"] != VERSION:
                raise ConfigError(f"{path} has format {meta['version']}, expected {VERSION}; build the pool again")
            header = Header(**meta)
            expected = before + max(entry["data_offsets"][1] for entry in described.values())
            if path.stat().st_size != expected:
                raise ValueError(f"{path.stat().st_size:,} bytes, expected {expected:,}")
            mapped = np.asarray(np.memmap(path, np.uint8, "r"))[before:]
            index = cls(header, {name: _view(mapped, entry) for name, entry in described.items()})
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing; expected a draft pool, as `SuffixPool.save` writes it") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise DataError(f"{path} is not a whole draft pool ({error}); remove it, and build it again") from error
        if header.fingerprint != fingerprint:
            raise ConfigError(
                f"{path} was made with model and tokenizer {header.fingerprint}, expected {fingerprint}; "
                "open it with that model, or build another pool"
            )
        return index

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1] - self.starts[0]) - len(self.weights)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def answers(self) -> Iterator[PastAnswer]:
        for i in range(len(self.weights)):
            yield PastAnswer(
                self._token_ids(i), self._owners[i].tobytes(), bool(self._private[i]), float(self.weights[i])
            )

    def private_texts(self, owner: bytes) -> list[IntArray]:
        """The private answers of `owner`, oldest first."""
        own = (self._owners == np.frombuffer(owner, np.uint8)).all(axis=1) & self._private
        return [self._token_ids(i) for i in np.flatnonzero(own).tolist()]

    def find(self, tail: IntArray, max_rows: int) -> SuffixMatches:
        """The places that follow the longest suffixes of `tail`, at most `max_rows`; in no promised order.

        Suffixes are lengthened, from two tokens on, until they have at most `max_rows` places or none. Then what
        room there is goes to places of the suffix one token shorter, evenly spaced over them. Where no place follows
        the last two tokens, those that follow the last one. One common token is no match.
        """
        asked = [int(token) for token in tail[: -LONGEST - 1 : -1]]  # the last token first
        outer = inner = (0, 0)
        length = 0
        while length < len(asked):
            found = self._narrowed(inner, asked[: length + 1])
            if found[0] == found[1]:
                break
            outer, inner, length = inner, found, length + 1
            if length > 1 and found[1] - found[0] <= max_rows:
                break
        if length == 0 or (length == 1 and asked[0] in self._common):
            return SuffixMatches(np.empty(0, np.int64), np.empty(0, np.int32))
        places = spaced(self._order[slice(*inner)], max_rows)
        if length > 1 and not (length == 2 and asked[0] in self._common):
            places = np.union1d(places, spaced(self._order[slice(*outer)], max_rows - len(places)))
        return SuffixMatches(places.astype(np.int64), match_lengths(self.text, places, tail[-LONGEST:]))

    def weights_at(self, places: Places) -> npt.NDArray[np.float32]:
        """[rows]: the weight of each place's answer."""
        return self.weights[np.searchsorted(self.starts, places, "right") - 1]

    def _token_ids(self, answer: int) -> IntArray:
        return self.text[self.starts[answer] : self.starts[answer + 1] - 1]

    def _narrowed(self, within: tuple[int, int], asked: Sequence[int]) -> tuple[int, int]:
        """The range of places with all of `asked` (the last token first) before them; `within`: of all but one."""
        if len(asked) <= _KEY_TOKENS:
            low = sum((token + 1) << _TOKEN_BITS * (_KEY_TOKENS - 1 - i) for i, token in enumerate(asked))
            bounds = np.array([low, low + (1 << _TOKEN_BITS * (_KEY_TOKENS - len(asked)))], np.uint64)
            found = np.searchsorted(self._keys, bounds)
            return int(found[0]), int(found[1])

        def token_before(i: int) -> int:
            return int(self.text[self._order[i] - len(asked)])

        low, token = within[0], asked[-1]
        low += bisect_left(range(*within), token, key=token_before)
        return low, low + bisect_left(range(low, within[1]), token + 1, key=token_before)


def match_lengths(text: IntArray, places: npt.NDArray[np.integer[Any]], tail: IntArray) -> IntArray:
    """[places]: how many tokens before each place agree with the end of `tail`."""
    at = places[:, None] - np.arange(1, len(tail) + 1)
    agree = (text[np.maximum(at, 0)] == tail[::-1]) & (at >= 0)
    lengths: IntArray = np.logical_and.accumulate(agree, axis=1).sum(axis=1, dtype=np.int32)
    return lengths


def merged(answers: Iterable[PastAnswer]) -> list[PastAnswer]:
    """Equal texts of one owner as one, with the sum of their weights; in order of first appearance."""
    found: dict[tuple[bytes, bool, bytes], PastAnswer] = {}
    for answer in answers:
        if not len(answer.token_ids):
            continue
        token_ids = np.asarray(answer.token_ids, np.int32)
        key = (answer.owner, answer.private, token_ids.tobytes())
        earlier = found[key].weight if key in found else 0.0
        found[key] = PastAnswer(token_ids, answer.owner, answer.private, earlier + answer.weight)
    return list(found.values())


def context_ranks(text: IntArray, depth: int) -> npt.NDArray[np.int64]:
    """[positions]: order of the `depth` tokens that end at each position, read backwards; equal where those are.

    depth: a power of two. By doubling (Manber & Myers 1990).
    """
    ranks = np.unique(text, return_inverse=True)[1].astype(np.int64)
    length = 1
    while length < depth:
        earlier = np.zeros_like(ranks)
        earlier[length:] = ranks[:-length]
        ranks = np.unique(ranks * (ranks.max() + 1) + earlier, return_inverse=True)[1].astype(np.int64)
        length *= 2
    return ranks


def sorted_places(text: IntArray, starts: Places, shared: npt.NDArray[np.bool_]) -> IntArray:
    """Positions inside shared answers that have a token before them, sorted by the tokens before, read backwards."""
    inside = np.zeros(len(text), bool)
    inside[starts[0] : starts[-1]] = np.repeat(shared, np.diff(starts))
    places = np.flatnonzero(inside[1:] & (text[1:] != END) & (text[:-1] != END)) + 1
    ranks = context_ranks(text, 16)  # no fewer than LONGEST
    return places[np.argsort(ranks[places - 1], kind="stable")].astype(np.int32)


def commonest(token_ids: IntArray) -> IntArray:
    """Tokens that are more than one in a hundred (and over a hundred): what follows one alone says nothing."""
    if not len(token_ids):
        return np.empty(0, np.int32)
    return np.flatnonzero(np.bincount(token_ids) > max(100, len(token_ids) // 100)).astype(np.int32)


def spaced(places: IntArray, most: int) -> IntArray:
    """At most `most` of `places`, evenly spaced."""
    if len(places) <= most:
        return places
    return places[np.arange(most) * len(places) // max(most, 1)]


def _keys(text: IntArray, order: IntArray) -> npt.NDArray[np.uint64]:
    keys = np.zeros(len(order), np.uint64)
    for back in range(1, _KEY_TOKENS + 1):
        keys = (keys << np.uint64(_TOKEN_BITS)) | (text[order - back].astype(np.int64) + 1).astype(np.uint64)
    return keys


def _described(path: Path) -> tuple[int, dict[str, Any]]:
    """Bytes before the arrays, and safetensors' header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(size))
    return 8 + size, described


def _view(mapped: npt.NDArray[np.uint8], entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    start, stop = entry["data_offsets"]
    return mapped[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
