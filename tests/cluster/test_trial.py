"""Made requests: candidates against a slow twin, splits that share nothing, and logs that are streamed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.candidates import SOURCES, MostAlike
from rcllm.cluster.evaluate import evaluate
from rcllm.cluster.logs import collect_log, read_requests
from rcllm.cluster.options import TrialConfig
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import collect, incidence, ragged
from rcllm.cluster.trial import make_trial
from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, Dataset, load_dataset, split_of
from rcllm.errors import DataError
from tests.cluster.made import names
from tests.reference import placement as slow

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=6).map(sorted), min_size=1, max_size=12),
    st.sets(st.integers(0, 11), min_size=1, max_size=4).map(sorted),
)
def test_item_knn_equals_the_slow_twin(users: list[list[int]], history: list[int]) -> None:
    touched = incidence(ragged(users), 12).astype(np.float64)
    found = MostAlike.of(touched)(ragged([history]), 5, np.random.default_rng(0))
    scores = slow.item_knn(users, 12, history)
    best = sorted((scores[item] for item in range(12) if item not in history), reverse=True)[:5]
    np.testing.assert_allclose([scores[item] for item in found.items.tolist()], best, atol=1e-6)


def test_ties_go_to_the_more_popular_and_then_to_the_first() -> None:
    touched = incidence(ragged([[0, 5], [0, 4], [3], [3], [2]]), 6).astype(np.float64)
    found = MostAlike.of(touched)(ragged([[0]]), 4, np.random.default_rng(0))
    assert found.items.tolist() == [4, 5, 3, 2]


@pytest.mark.parametrize("name", SOURCES)
def test_sources_name_no_item_twice_and_none_of_the_history(name: str) -> None:
    touched = incidence(ragged([[0, 1], [1, 2]]), 6).astype(np.float64)
    found = SOURCES[name](touched)(ragged([[1], [0, 2, 3, 4]]), 4, np.random.default_rng(0))
    assert [len(found[0]), len(found[1])] == [4, 2], "the catalogue has no more"
    for place, history in enumerate(([1], [0, 2, 3, 4])):
        assert not set(found[place].tolist()) & set(history)
        assert len(set(found[place].tolist())) == len(found[place])


def test_popularity_draws_by_popularity_and_uniform_does_not() -> None:
    touched = incidence(ragged([[0]] * 90 + [[1]] * 10), 3).astype(np.float64)
    none = ragged([[]] * 2000)
    drawn = {name: SOURCES[name](touched)(none, 1, np.random.default_rng(0)).items for name in SOURCES}
    assert 0.87 < (drawn["popularity"] == 0).mean() < 0.93
    assert (drawn["popularity"] == 2).sum() == 0, "nobody touched it"
    assert 0.28 < (drawn["uniform"] == 0).mean() < 0.38


def dataset(num_users: int = 60) -> Dataset:
    """Users with five events, each at its own time."""
    rows = [
        Interaction(UserId(f"u{user}"), ItemId(f"i{(user + step) % 12}"), float(100 * step + user))
        for user in range(num_users)
        for step in range(5)
    ]
    return Dataset("made", Catalogue(Item(item_id, {"title": item_id}) for item_id in names(12)), tuple(rows))


def test_split_by_user() -> None:
    data = dataset()
    trial = make_trial(data, TrialConfig(candidates=4, per_user=2))
    trained = sum(split_of(UserId(f"u{user}")) == "train" for user in range(60))
    assert len(trial.past) == 2 * trained
    assert len(trial.held_out) == 60 - trained
    assert all(len(trial.held_out[place]) == 4 for place in range(len(trial.held_out)))


def test_split_by_time() -> None:
    """The last fifth of 300 events are the fifth events; what came before them is the past."""
    trial = make_trial(dataset(), TrialConfig(split="time", candidates=4, per_user=1, source="uniform"))
    assert (len(trial.past), len(trial.held_out)) == (60, 60)


def test_too_little_data() -> None:
    few = Dataset("few", Catalogue([Item(ItemId("i0"), {})]), (Interaction(UserId("u"), ItemId("i0"), 0.0),))
    with pytest.raises(DataError, match="few: split by user, there are 0 requests to learn from"):
        make_trial(few, TrialConfig())


def test_a_log_is_counted_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"candidates": ["a", "b", "b"]}, {"items": ["b", "stranger"]}, {"candidates": ["stranger"]}, {"else": 1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    sizes = {ItemId("a"): 3, ItemId("b"): 4, ItemId("c"): 5}
    statistics, report = collect_log(path, sizes)
    assert statistics.heat.tolist() == [1, 2, 0]
    assert statistics.num_bytes.tolist() == [3, 4, 5]
    assert (report.num_requests, report.num_unknown, report.rows.rows_skipped) == (2, 2, 1)
    requests, _ = read_requests(path, tuple(sizes))
    assert [requests[0].tolist(), requests[1].tolist()] == [[0, 1], [1]]


def test_a_log_of_other_items(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"candidates": ["x"]}\n')
    for read in (lambda: collect_log(path, {ItemId("a"): 1}), lambda: read_requests(path, (ItemId("a"),))):
        with pytest.raises(DataError, match="check that the ids agree"):
            read()


@pytest.mark.skipif(not (SHARED / "goodreads").is_dir(), reason=f"needs {SHARED}/goodreads")
def test_goodreads_keeps_the_order_of_placements() -> None:
    """Halo at least METIS, and balances within 5 %, on users that no placement has seen."""
    trial = make_trial(load_dataset("common", SHARED / "goodreads"), TrialConfig(per_user=1))
    statistics = collect(trial.past, trial.item_ids, np.full(len(trial.item_ids), 100))
    room = Room(8, int(2 * statistics.num_bytes.sum() / 8))
    reports = {
        name: evaluate(make_place(name)(statistics, room), statistics, trial.held_out)
        for name in ("hash", "metis", "halo", "learned")
    }
    assert reports["hash"].best < 0.35 < 0.6 < reports["metis"].best
    assert reports["metis"].best + 0.15 < reports["halo"].best < reports["learned"].best
    for name in ("metis", "halo", "learned"):
        assert max(reports[name].balance.num_bytes, reports[name].balance.heat) <= 1.0501
