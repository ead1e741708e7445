"""Generated requests have the shape that their parameters say, and are equal for equal seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.core.requests import ItemId, RankRequest, UserId
from rcllm.errors import ConfigError
from rcllm.sim.options import Workload, check_workload
from rcllm.sim.workload import (
    SimRequest,
    generate,
    item_lengths,
    number_items,
    of_log,
    topic_of_user,
    updates,
    zipf_ranks,
    zipf_share,
)

PLAIN = Workload(items=10_000, topics=100, spread=0.0, locality=0.8, qps=50.0)


def made(workload: Workload, count: int = 3000, seed: int = 0) -> list[SimRequest]:
    return list(generate(workload, count, seed))


def test_equal_seeds_give_equal_requests() -> None:
    workload = replace(PLAIN, arrivals="bursty", candidates_spread=0.4, session=3.0)
    assert made(workload, 300, 1) == made(workload, 300, 1)
    assert made(workload, 300, 1) != made(workload, 300, 2)


def test_every_item_is_named_once_and_arrivals_ascend() -> None:
    requests = made(PLAIN)
    assert [each.number for each in requests] == list(range(3000))
    assert all(len(set(each.items)) == len(each.items) == len(each.tokens.items) for each in requests)
    assert all(0 <= item < PLAIN.items for each in requests for item in each.items)
    times = [each.arrival_s for each in requests]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(50.0, rel=0.06)


@pytest.mark.parametrize("locality", [0.0, 0.5, 1.0])
def test_locality_is_the_share_from_the_topic(locality: float) -> None:
    workload = replace(PLAIN, locality=locality, zipf=0.0)
    requests = made(workload)
    topics = topic_of_user(np.array([each.user for each in requests]), workload)
    own = [item % workload.topics == topic for each, topic in zip(requests, topics, strict=True) for item in each.items]
    assert np.mean(own) == pytest.approx(locality + (1 - locality) / workload.topics, abs=0.02)


def test_candidates_stray_to_neighbouring_topics() -> None:
    workload = replace(PLAIN, locality=1.0, spread=0.03)
    requests = made(workload)
    topics = topic_of_user(np.array([each.user for each in requests]), workload)
    steps = [
        (item - topic + 50) % 100 - 50 for each, topic in zip(requests, topics, strict=True) for item in each.items
    ]
    assert np.mean(np.abs(steps)) == pytest.approx(3.0, rel=0.08)
    assert abs(np.mean(steps)) < 0.1


def test_some_topics_are_asked_for_more_than_others() -> None:
    users = np.random.default_rng(0).integers(10**6, size=50_000)
    for exponent, low, high in ((0.0, 0.8, 1.25), (0.8, 8.0, 30.0)):
        counts = np.bincount(topic_of_user(users, replace(PLAIN, topic_zipf=exponent)), minlength=100)
        assert low <= counts.max() / counts.mean() <= high
        assert counts.min() > 0


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.3])
def test_popularity_follows_zipf(exponent: float) -> None:
    ranks = zipf_ranks(np.random.default_rng(0).random(200_000), 1000, exponent)
    assert (ranks.min(), ranks.max()) >= (0, 900)
    for first in (10, 100, 500):
        assert (ranks < first).mean() == pytest.approx(zipf_share(first, 1000, exponent), abs=0.005)
    weights = np.arange(1, 1001) ** -exponent
    assert (ranks < 100).mean() == pytest.approx(weights[:100].sum() / weights.sum(), abs=0.06)


@given(st.integers(1, 10**8), st.floats(0, 1.5), st.lists(st.floats(0, 0.999999), min_size=1, max_size=5))
def test_ranks_are_within_the_catalogue(count: int, exponent: float, uniform: list[float]) -> None:
    ranks = zipf_ranks(np.array(uniform), count, exponent)
    assert 0 <= ranks.min() <= ranks.max() < count


def test_the_length_of_an_item_is_its_own() -> None:
    items = np.arange(100_000)
    lengths = item_lengths(items, PLAIN)
    assert lengths.mean() == pytest.approx(PLAIN.item_tokens, rel=0.01)
    assert (item_lengths(items[::-1], PLAIN)[::-1] == lengths).all()


def test_paper_shaped_prompts() -> None:
    """RcLLM: median 2.2–3.0K tokens, P90 4.0–4.3K, items 66–82 %, history 11–26 %, instruction 7–10 %."""
    workload = Workload(candidates=21, candidates_spread=0.45, history_tokens=400, history_spread=0.7)
    tokens = [each.tokens for each in made(workload, 5000)]
    totals = np.array([each.total for each in tokens])
    assert 2200 <= np.median(totals) <= 3000
    assert 3700 <= np.percentile(totals, 90) <= 4300
    assert 0.66 <= sum(sum(each.items) for each in tokens) / totals.sum() <= 0.82
    assert 0.11 <= sum(each.history for each in tokens) / totals.sum() <= 0.26


def test_bursts_keep_the_mean_rate_and_are_bursts() -> None:
    steady, bursty = (made(replace(PLAIN, arrivals=kind), 60_000) for kind in ("poisson", "bursty"))
    counts = [np.histogram([each.arrival_s for each in some], bins=600)[0] for some in (steady, bursty)]
    assert len(bursty) / bursty[-1].arrival_s == pytest.approx(50.0, rel=0.12)
    assert counts[1].var() / counts[1].mean() > 4 * counts[0].var() / counts[0].mean()


def test_sessions_have_the_mean_length_that_is_asked_for() -> None:
    def mean_requests(session: float) -> float:
        users = [each.user for each in made(replace(PLAIN, session=session), 20_000)]
        return len(users) / len(set(users))

    assert mean_requests(1.0) == pytest.approx(1.0, abs=0.05)
    assert mean_requests(5.0) == pytest.approx(5.0, rel=0.15)


def test_updates_come_at_their_rate_and_hit_what_is_popular() -> None:
    found = list(islice(updates(replace(PLAIN, updates=20.0), 0), 4000))
    assert len(found) / found[-1].time_s == pytest.approx(20.0, rel=0.06)
    assert np.median([each.item for each in found]) < PLAIN.items / 4
    assert list(updates(PLAIN, 0)) == []


def test_more_topics_than_items_is_refused() -> None:
    check_workload(PLAIN)
    with pytest.raises(ConfigError, match="--topics 100 exceeds --items 50"):
        check_workload(replace(PLAIN, items=50))


# ---- of a log -------------------------------------------------------------------------------------------------------


def asked(name: str, *items: str, user: str | None = None) -> RankRequest:
    return RankRequest(name, tuple(map(ItemId, items)), user_id=UserId(user) if user else None)


def test_a_log_is_replayed_in_its_order_and_again() -> None:
    log = [asked("1", "b", "a", "b", user="u"), asked("2", "a", "c"), asked("3", "a", user="u")]
    assert number_items(log) == {"b": 0, "a": 1, "c": 2} or number_items(log) == {"a": 0, "b": 1, "c": 2}
    found = list(of_log(log, number_items(log), PLAIN, 7, 0))
    names = {number: item for item, number in number_items(log).items()}
    assert ["".join(names[item] for item in each.items) for each in found] == ["ba", "ac", "a"] * 2 + ["ba"]
    assert found[0].user == found[2].user == found[3].user != found[1].user
    assert [each.arrival_s for each in found] == sorted(each.arrival_s for each in found)
    assert found[0].tokens == found[3].tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.floats(0, 1), st.integers(1, 50))
def test_so_many_as_asked_for(count: int, locality: float, topics: int) -> None:
    workload = replace(PLAIN, items=50, topics=topics, locality=locality, candidates_spread=1.0)
    assert len(made(workload, count)) == count
