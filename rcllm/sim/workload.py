"""Requests over time: generated from a few parameters, or those of a log. Knows nothing of nodes or costs.

Items are numbers in the order of their popularity: 0 is asked for most. Nothing is kept per item, so that a catalogue
may have 10^8 of them: what an item is (its topic, its length) is computed from its number. Invariant: equal options and
seeds give equal requests.

Locality comes from retrieval: with the probability `locality` a candidate is drawn from the topic of its request or
from topics near it on a ring, else from the whole catalogue; in both, popularity follows Zipf's law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from rcllm.core.requests import RankRequest
from rcllm.sim.demand import Tokens
from rcllm.sim.options import Workload

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_CHUNK = 2048  # requests that are drawn at a time
_DRAWN = 2  # items drawn for each candidate, so that enough are left when repetitions are dropped
_CALM, _BURST = 0.6, 2.6  # bursty: the rate over the mean; a fifth of the time is burst, so the mean stays
_BURST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request as the simulator sees it."""

    number: int
    arrival_s: float
    user: int
    items: Sequence[int]  # each once
    tokens: Tokens


def generate(workload: Workload, num_requests: int, seed: int) -> Iterator[SimRequest]:
    """Requests in the order of their arrival."""
    rng = np.random.default_rng((seed, 1))
    clock, users = _Clock(workload, seed), _Sessions(workload, seed)
    for start in range(0, num_requests, _CHUNK):
        size = min(_CHUNK, num_requests - start)
        counts = _counts(workload, size, rng)
        who = users.next(size)
        items = draw_items(workload, np.repeat(topic_of_user(who, workload), _DRAWN * counts), rng)
        lengths = item_lengths(items, workload).tolist()
        histories = _history_lengths(who, workload).tolist()
        times, listed, begin = clock.next(size), items.tolist(), 0
        for index, count in enumerate(counts.tolist()):
            end = begin + _DRAWN * count
            drawn = dict(zip(listed[begin:end], lengths[begin:end], strict=True))  # a list names an item once
            once, sizes = tuple(drawn)[:count], tuple(drawn.values())[:count]
            tokens = Tokens(workload.instruction_tokens, histories[index], sizes, workload.fresh_tokens)
            yield SimRequest(start + index, times[index], int(who[index]), once, tokens)
            begin = end


def of_log(
    requests: Sequence[RankRequest],
    numbers: Mapping[str, int],
    workload: Workload,
    num_requests: int,
    seed: int,
) -> Iterator[SimRequest]:
    """The requests of a log in its order, again from its start when it ends; times, lengths as `workload` says.

    `requests`: one or more. `numbers`: of its items, see `number_items`.
    """
    assert requests, "a log has a request"
    users: dict[str, int] = {}
    clock = _Clock(workload, seed)
    number = 0
    while number < num_requests:
        for request, time_s in zip(requests, clock.next(len(requests)), strict=True):
            if number == num_requests:
                return
            user = users.setdefault(request.user_id or f"request {request.request_id}", len(users))
            items = [numbers[item] for item in dict.fromkeys(request.candidates)]
            lengths = item_lengths(np.array(items, dtype=np.int64), workload).tolist()
            history = int(_history_lengths(np.array([user], dtype=np.int64), workload)[0])
            tokens = Tokens(workload.instruction_tokens, history, tuple(lengths), workload.fresh_tokens)
            yield SimRequest(number, time_s, user, tuple(items), tokens)
            number += 1


def number_items(requests: Sequence[RankRequest]) -> dict[str, int]:
    """Items of a log by popularity; ties by who comes first."""
    counts: dict[str, int] = {}
    for request in requests:
        for item in request.candidates:
            counts[item] = counts.get(item, 0) + 1
    return {item: number for number, item in enumerate(sorted(counts, key=lambda each: -counts[each]))}


# ---- items ----------------------------------------------------------------------------------------------------------


def draw_items(workload: Workload, topics: IntArray, rng: np.random.Generator) -> IntArray:
    """One item for each entry of `topics`."""
    of_topic = rng.random(len(topics)) < workload.locality
    uniform = rng.random(len(topics))
    size = max(1, workload.items // workload.topics)
    strayed = topics + np.rint(rng.laplace(0.0, workload.spread * workload.topics, len(topics))).astype(np.int64)
    near = zipf_ranks(uniform, size, workload.zipf) * workload.topics + strayed % workload.topics
    far = zipf_ranks(uniform, workload.items, workload.zipf)
    return np.minimum(np.where(of_topic, near, far), workload.items - 1)


def topic_of_user(users: IntArray, workload: Workload) -> IntArray:
    """Popular topics are scattered over the ring."""
    uniform = (hashed(users, 2).astype(np.float64) + 0.5) / 2.0**64
    ranks = zipf_ranks(np.minimum(uniform, 1 - 1e-12), workload.topics, workload.topic_zipf)
    return ranks * _coprime(workload.topics) % workload.topics


def _coprime(count: int) -> int:
    """A step that visits every place of a ring of that size: near the golden section, so that early steps lie apart."""
    step = max(1, round(count * 0.6180339887))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def zipf_ranks(uniform: FloatArray, count: int, exponent: float) -> IntArray:
    """Ranks 0 … count − 1 with probability ∝ (rank + 1)^−exponent, by inverting the integral of the density.

    The continuous law differs from the discrete one for the first few ranks alone.
    """
    if math.isclose(exponent, 1.0):
        values = np.exp(uniform * math.log(count + 1))
    else:
        power = 1 - exponent
        values = ((float(count + 1) ** power - 1) * uniform + 1) ** (1 / power)
    return np.minimum(values.astype(np.int64) - 1, count - 1)


def zipf_share(first: float, count: int, exponent: float) -> float:
    """Share of draws that fall on the `first` ranks of `count`: the law that `zipf_ranks` draws from."""
    first = min(first, count)
    if math.isclose(exponent, 1.0):
        return math.log(first + 1) / math.log(count + 1)
    power = 1 - exponent
    return float(((first + 1) ** power - 1) / ((count + 1) ** power - 1))


def item_lengths(items: IntArray, workload: Workload) -> IntArray:
    """Tokens of items: log-normal with the mean that the workload names, always the same for an item."""
    median = workload.item_tokens / math.exp(workload.item_spread**2 / 2)
    return _log_normal(items, 3, median, workload.item_spread)


def _history_lengths(users: IntArray, workload: Workload) -> IntArray:
    if not workload.history_tokens:
        return np.zeros(len(users), dtype=np.int64)
    return _log_normal(users, 4, workload.history_tokens, workload.history_spread)


def _log_normal(values: IntArray, salt: int, median: float, spread: float) -> IntArray:
    if not spread:
        return np.full(len(values), max(1, round(median)), dtype=np.int64)
    uniform = (hashed(values, salt).astype(np.float64) + 0.5) / 2.0**64
    normal = ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
    lengths: IntArray = np.maximum(1, np.rint(median * np.exp(spread * normal))).astype(np.int64)
    return lengths


def _counts(workload: Workload, size: int, rng: np.random.Generator) -> IntArray:
    """Candidates of each request."""
    if not workload.candidates_spread:
        return np.full(size, min(workload.candidates, workload.items), dtype=np.int64)
    drawn = workload.candidates * np.exp(workload.candidates_spread * rng.standard_normal(size))
    counts: IntArray = np.clip(np.rint(drawn), 1, workload.items).astype(np.int64)
    return counts


def hashed(values: IntArray, salt: int) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits for each number (splitmix64: Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        mixed = values.astype(np.uint64) + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


# ---- users and times ------------------------------------------------------------------------------------------------


class _Sessions:
    """Who asks: a user goes on with probability 1 − 1/session, beside others who do the same."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        self._rng = np.random.default_rng((seed, 2))
        self._recent = self._rng.integers(workload.users, size=256)

    def next(self, size: int) -> IntArray:
        """The users of the next requests. 256 sessions are under way at a time."""
        new = self._rng.integers(self._workload.users, size=size)
        if self._workload.session <= 1:
            return new
        slots = self._rng.integers(len(self._recent), size=size)
        ends = self._rng.random(size) < 1 / self._workload.session
        users = np.empty(size, dtype=np.int64)
        for index, slot in enumerate(slots.tolist()):
            if ends[index]:
                self._recent[slot] = new[index]
            users[index] = self._recent[slot]
        return users


class _Clock:
    """When requests arrive."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        self._rng = np.random.default_rng((seed, 3))
        self._now = 0.0
        self._burst = False
        self._phase_end = 0.0 if workload.arrivals == "bursty" else math.inf

    def next(self, size: int) -> list[float]:
        """Times of the next arrivals, ascending."""
        if self._workload.arrivals == "poisson":
            times = self._now + np.cumsum(self._rng.exponential(1 / self._workload.qps, size))
            self._now = float(times[-1])
            return [float(time) for time in times]
        return [self._next_bursty() for _ in range(size)]

    def _next_bursty(self) -> float:
        """Poisson with a rate that switches; a time beyond the switch is drawn anew, for waiting has no memory."""
        while True:
            rate = self._workload.qps * (_BURST if self._burst else _CALM)
            time = self._now + self._rng.exponential(1 / rate)
            if time <= self._phase_end:
                self._now = time
                return time
            self._now = self._phase_end
            self._burst = not self._burst if self._phase_end else bool(self._rng.random() < _BURST_SHARE)
            mean = self._workload.burst_s * (1 if self._burst else 1 / _BURST_SHARE - 1)
            self._phase_end += float(self._rng.exponential(mean))


@dataclass(frozen=True, slots=True)
class ItemUpdate:
    """An item gets a new text."""

    time_s: float
    item: int
    tokens: int


def updates(workload: Workload, seed: int) -> Iterator[ItemUpdate]:
    """Without end: a Poisson process, items by popularity."""
    if not workload.updates:
        return
    rng, now = np.random.default_rng((seed, 5)), 0.0
    while True:
        items = zipf_ranks(rng.random(_CHUNK), workload.items, workload.zipf)
        gaps = rng.exponential(1 / workload.updates, _CHUNK)
        lengths = item_lengths(items, workload)
        for gap, item, tokens in zip(gaps.tolist(), items.tolist(), lengths.tolist(), strict=True):
            now += gap
            yield ItemUpdate(now, item, tokens)
