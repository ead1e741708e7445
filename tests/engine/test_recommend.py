"""The recommender on a tiny random decoder of semantic IDs: answers, receipts, batches, filters, live catalogues."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from rcllm.cache.pool import Pool
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.codes.knn import Knn, mixed
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import Event, ItemId, Level, UserId
from rcllm.decode.beam import step_bytes_per_row
from rcllm.decode.beam_device import OnDevice
from rcllm.decode.beam_host import OnHost
from rcllm.engine.engine import Engine
from rcllm.engine.flight import Flight
from rcllm.engine.jobs.recommend import BEAM_ROWS, Recommender
from rcllm.errors import (
    CapacityError,
    ConfigError,
    PromptTooLongError,
    RequestError,
    UnknownItemError,
    answered,
)
from rcllm.model.decoder import Between, Pass, Passed
from rcllm.schedule.cost import Demand
from rcllm.sid.vocabulary import Vocabulary, items_of_codes
from tests.engine.tiny import computing_in, folder
from tests.tiny_models import tiny_model

SIZES = (6, 7, 5)


@functools.cache
def _code_index() -> CodeIndex:
    codes = np.stack([np.random.default_rng(0).integers(0, size, 120) for size in SIZES], axis=1).astype(np.int32)
    return CodeIndex.build(codes, tuple(ItemId(f"i{i}") for i in range(120)), SIZES)


@functools.cache
def _model() -> Path:
    """A random Qwen3 whose vocabulary is that of `rcllm sid train`."""
    vocabulary = Vocabulary(SIZES)
    path = tiny_model("qwen3", folder() / "sid", vocab_size=len(vocabulary), max_position_embeddings=512)
    vocabulary.tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(vocabulary.tokenizer_config(), encoding="utf-8")
    return path


@functools.cache
def _engine(dtype: str = "fp32") -> Engine:
    config = Config(
        ModelConfig(path=str(_model()), device="cpu", **computing_in(dtype)),
        PromptConfig(template="sid"),
        CacheConfig(pool_mb=64, kv_dtype="fp32"),
    )
    return Engine.build(items_of_codes(_code_index()), config)


def _recommender(beam_rows: int = BEAM_ROWS, dtype: str = "fp32") -> Recommender:
    return Recommender(_engine(dtype), LiveCodes(_code_index()), Vocabulary(SIZES).code_tokens, beam_rows=beam_rows)


def _ask(name: str, *events: int, **fields: object) -> RecommendRequest:
    request = RecommendRequest(name, tuple(Event(ItemId(f"i{i}")) for i in events), UserId(name), beam=20)
    return replace(request, **fields)  # type: ignore[arg-type]


def _many(count: int) -> list[RecommendRequest]:
    rng = np.random.default_rng(3)
    return [
        _ask(
            f"r{i}",
            *rng.integers(0, 120, rng.integers(0, 12)).tolist(),
            n=int(rng.integers(1, 15)),
            beam=int(rng.integers(1, 40)),
            deny=tuple(ItemId(f"i{j}") for j in rng.integers(0, 120, 30)),
            rule=("renormalise", "mask")[i % 2],
        )
        for i in range(count)
    ]


def _same(ours: RecommendResponse, theirs: RecommendResponse) -> None:
    assert (ours.request_id, ours.items) == (theirs.request_id, theirs.items)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def test_an_answer_and_its_receipt() -> None:
    recommender = _recommender()
    first, again = (recommender.recommend(_ask("u", 1, 2, 3, n=5)) for _ in range(2))
    assert len(first.items) == len(set(first.items)) == 5
    assert list(first.scores) == sorted(first.scores, reverse=True)
    _same(first, again)
    receipt = again.receipt
    assert receipt.num_tokens == receipt.num_fresh + receipt.num_reused == 1 + 3 * 4 + 1
    assert receipt.num_reused > first.receipt.num_reused or first.receipt.num_reused > 1
    assert (receipt.beam, receipt.rule, receipt.level, receipt.batch_size) == (20, "renormalise", "exact", 1)
    assert len(receipt.steps) == 3
    assert receipt.kv_bytes_read < receipt.kv_bytes_naive
    for stage in ("allow", "wait", "forward", "join", "gather", "readout", "sort", "reorder", "step", "items", "total"):
        assert receipt.stage_ms[stage] >= 0.0
    _engine().pool.check()
    assert not _engine().pool._index._pins


def test_the_exact_prompt_does_not_depend_on_what_is_cached() -> None:
    """The level `full` reuses nothing."""
    recommender = _recommender()
    warm = [recommender.recommend(_ask("w", 5, 6, 7, 8)) for _ in range(2)][1]
    _same(recommender.recommend(_ask("w", 5, 6, 7, 8, level=Level("full"))), warm)


@pytest.mark.parametrize("beam_rows", [BEAM_ROWS, 50, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_batches_answer_as_each_request_alone(beam_rows: int, dtype: str) -> None:
    requests = _many(12)
    alone = _recommender(dtype=dtype)
    together = answered(_recommender(beam_rows, dtype).recommend_batch(requests))
    for ours, request in zip(together, requests, strict=True):
        _same(ours, alone.recommend(request))


def test_beams_that_are_chosen_on_the_device_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here on the CPU; what is kept there of a catalogue goes when it has changed."""
    requests = [*_many(12), _ask("none", 1, allow=()), _ask("disabled", 2, n=20)]
    on_host = _recommender()
    with monkeypatch.context() as patched:
        patched.setattr("rcllm.engine.jobs.recommend.choosing_of", OnDevice)
        on_device = _recommender()
    assert on_host.device_bytes == on_device.device_bytes == 0
    held = []
    for _ in range(3):
        pairs = zip(*(answered(each.recommend_batch(requests)) for each in (on_host, on_device)), strict=True)
        for theirs, ours in pairs:
            _same(ours, theirs)
            unsorted = [replace(step, num_skipped=0) for step in theirs.receipt.steps]
            assert list(ours.receipt.steps) == unsorted, "nothing is left unsorted on the device"
        gc.collect()
        held.append(on_device.device_bytes)
        gone, hidden = ours.items[:2]
        for each in (on_host, on_device):
            each.codes.remove([gone])
            each.codes.disable([hidden])
            each.codes.flush()
    assert held[0] < held[2] <= held[1], "the first epoch, which this module holds, and the last"


def test_passes_that_nobody_waits_for_are_timed_with_the_one_that_somebody_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a step of a search would seem to take as long as it takes to launch it, and its last one all the rest."""
    recommender, seen = _recommender(), list[tuple[Demand, float]]()
    costs, done = recommender.engine.loop.costs, itertools.chain([False, False, True], itertools.repeat(True))
    monkeypatch.setattr(costs, "observe", lambda asked, ms: seen.append((asked, ms)))
    with monkeypatch.context() as patched:
        patched.setattr(Flight, "has_ended", property(lambda _: next(done)))
        answer = recommender.recommend(_ask("timed", 1, 2, 3))
    assert len(seen) == 1
    together, ms = seen.pop()
    assert recommender.recommend(_ask("timed", 1, 2, 3)).items == answer.items
    assert len(seen) == 3, "the prompt, and two levels that are fed to the model"
    assert together.passes == sum(asked.passes for asked, _ in seen) == 3
    assert ms > 0


def _knn(share: float = 0.4) -> Knn:
    dense = np.random.default_rng(1).random((120, 120)).astype(np.float32)
    dense[dense < 0.9] = 0.0
    np.fill_diagonal(dense, 0.0)
    return Knn(tuple(_code_index().item_ids), sparse.csr_array(dense), share)


def _with_knn(beam_rows: int = BEAM_ROWS) -> Recommender:
    tokens = Vocabulary(SIZES).code_tokens
    return Recommender(_engine(), LiveCodes(_code_index()), tokens, knn=_knn(), beam_rows=beam_rows)


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_item_knn_is_mixed_into_the_scores_of_all_that_was_found(share: float) -> None:
    ask = _ask("k", 1, 2, 3, n=120, beam=120, deny=(ItemId("i9"),))
    plain, mix = _recommender().recommend(ask), _with_knn().recommend(replace(ask, knn=share))
    last, middle, first = _knn().likeness.toarray()[[3, 2, 1]]
    sums = last + middle / 2 + first / 3
    sums[9] = 0.0
    said = {ItemId(f"i{i}"): sums[i] / sums.sum() for i in range(120)}
    beams = {item: np.exp(score) for item, score in zip(plain.items, plain.scores, strict=True)}
    expected = {item: (1 - share) * beams.get(item, 0) + share * said[item] for item in said if item != "i9"}
    assert set(mix.items) == set(expected)
    np.testing.assert_allclose(np.exp(mix.scores), [expected[item] for item in mix.items], rtol=1e-4)
    assert list(mix.scores) == sorted(mix.scores, reverse=True)
    assert (mix.receipt.knn, mix.receipt.num_by_knn) == (share, 0)


def test_items_that_no_beam_found_come_by_item_knn_and_are_counted() -> None:
    narrow = replace(_ask("k", 4, 5, n=5, knn=0.9), beam=5)
    plain, mix = _recommender().recommend(replace(narrow, knn=None)), _with_knn().recommend(narrow)
    assert mix.receipt.num_by_knn == len(set(mix.items) - set(plain.items)) > 0


def test_without_a_share_or_a_history_the_scores_are_the_decoders() -> None:
    recommender = _with_knn()
    for ask in (_ask("k", 1, 2, knn=0.0), _ask("nothing"), _ask("nothing", 3, allow=())):
        ours, theirs = recommender.recommend(ask), _recommender().recommend(replace(ask, knn=None))
        _same(ours, theirs)
        assert (ours.receipt.knn, ours.receipt.num_by_knn) == (0.0, 0)


def test_a_share_that_is_hardly_a_number_changes_little() -> None:
    ask = _ask("k", 1, 2)
    assert _with_knn().recommend(replace(ask, knn=1e-323)).items == _recommender().recommend(ask).items


def test_a_share_of_item_knn_needs_a_decoder_that_carries_one() -> None:
    with pytest.raises(RequestError, match=r"knn is 0\.2, but the decoder carries no item-kNN"):
        _recommender().recommend(_ask("k", 1, knn=0.2))
    assert _recommender().recommend(_ask("k", 1, knn=0.0)).items


def test_batches_with_item_knn_answer_as_each_request_alone() -> None:
    requests = _many(12)
    for ours, request in zip(answered(_with_knn(50).recommend_batch(requests)), requests, strict=True):
        _same(ours, _with_knn().recommend(request))
        assert set(ours.items) <= set(_code_index().item_ids) - set(request.deny)


def test_no_invalid_item_ever_comes() -> None:
    for request, answer in zip(requests := _many(40), answered(_recommender().recommend_batch(requests)), strict=True):
        valid = set(_code_index().item_ids) - set(request.deny)
        assert set(answer.items) <= valid
        assert len(answer.items) == min(request.n, len(valid))


@pytest.mark.parametrize("choosing", [OnHost, OnDevice])
def test_however_much_is_asked_for_there_is_no_more_than_the_catalogue(
    choosing: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a search is that of its prefixes, and requests beside it go on."""
    monkeypatch.setattr("rcllm.engine.jobs.recommend.choosing_of", lambda tokens, device: choosing(tokens, *rest))
    rest = [_engine().decoder.device] if choosing is OnDevice else []
    many = 10**30
    wide, many_items, good = answered(
        _recommender().recommend_batch([_ask("w", 1, beam=many), _ask("n", 1, n=many), _ask("good", 1)])
    )
    assert (len(wide.items), len(many_items.items), len(good.items)) == (10, 120, 10)


def test_beams_that_the_cache_has_no_room_for_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = _recommender()
    row = step_bytes_per_row(recommender.engine.decoder, len(SIZES))
    monkeypatch.setattr(Pool, "budget", property(lambda _: 10 * row))
    good, wide = recommender.recommend_batch([_ask("good", 1, n=5, beam=10), _ask("wide", 1, n=5, beam=11)])
    assert isinstance(good, RecommendResponse)
    with pytest.raises(CapacityError, match=r"request 'wide': 11 beams keep .* a narrower beam"):
        answered([wide])


def test_the_end_of_a_history_is_read_where_the_decoder_was_trained_on_no_more() -> None:
    """Item-kNN reads on, and what is too long to be read is no error."""
    tokens = Vocabulary(SIZES).code_tokens
    short = Recommender(_engine(), LiveCodes(_code_index()), tokens, knn=_knn(), max_items=3)
    history = [i % 120 for i in range(130)]
    read = short.recommend(_ask("h", *history[-3:], n=120, beam=120, knn=0.0))
    alone = short.recommend(_ask("h", *history, n=120, beam=120, knn=0.0))
    mix = short.recommend(_ask("h", *history, n=120, beam=120))
    _same(alone, read)
    assert read.receipt.notes == ()
    for long in (alone, mix):
        assert long.receipt.num_tokens == read.receipt.num_tokens
        assert long.receipt.notes == ("the decoder reads the last 3 of 130 events, as many as it was trained on",)
    shares = _knn().shares([ItemId(f"i{i}") for i in history], _code_index(), None, 120)
    expected = mixed(dict(zip(read.items, read.scores, strict=True)), shares, 0.4, 120)
    assert mix.items == expected[0]
    np.testing.assert_allclose(mix.scores, expected[1], atol=1e-5)


def test_fewer_valid_items_than_asked_for_gives_all_of_them() -> None:
    recommender, three = _recommender(), tuple(ItemId(f"i{i}") for i in (3, 50, 99))
    for rule in ("renormalise", "mask"):
        assert sorted(recommender.recommend(_ask("f", 1, n=10, beam=1, allow=three, rule=rule)).items) == sorted(three)
    [one] = recommender.recommend(_ask("f", 1, n=10, allow=three, deny=three[1:])).items
    assert one == three[0]
    nothing = recommender.recommend(_ask("f", 1, n=10, allow=()))
    assert (nothing.items, nothing.scores) == ((), ())
    assert len(recommender.recommend(_ask("f", 1, n=1000)).items) == 120, "the beam is as wide as n"


def test_long_lists_are_remembered_for_one_epoch_alone() -> None:
    """Lists of a thousand ids, of which the catalogue has some."""
    recommender = _recommender()
    stock = tuple(ItemId(f"i{i}") for i in range(0, 4000, 2))
    first, again = (recommender.recommend(_ask("s", 1, n=100, allow=stock)).items for _ in range(2))
    assert first == again
    assert sorted(first) == sorted(ItemId(f"i{i}") for i in range(0, 120, 2))
    assert set(recommender.recommend(_ask("s", 1, n=100, allow=stock, deny=first[:50])).items) == set(first[50:])
    recommender.codes.remove([first[0]])
    recommender.codes.flush()
    assert set(recommender.recommend(_ask("s", 1, n=100, allow=stock)).items) == set(first[1:])


def test_a_history_and_a_batch_may_be_empty() -> None:
    assert len(_recommender().recommend(_ask("nobody")).items) == 10
    assert _recommender().recommend_batch([]) == []


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"n": 0}, RequestError, "n must be at least 1"),
        ({"beam": 0}, RequestError, "beam must be at least 1"),
        ({"rule": "masks"}, RequestError, "request 'bad': rule must be one of renormalise, mask, got 'masks'"),
        ({"knn": 1.0}, RequestError, "request 'bad': knn must be below 1, got 1"),
        ({"knn": -0.1}, RequestError, r"knn must be at least 0, got -0\.1"),
        ({"knn": math.nan}, RequestError, "knn must be a finite number"),
        ({"level": Level("auto")}, ConfigError, "open prompts take"),
        ({"history": (Event(ItemId("nope")),)}, UnknownItemError, "nope"),
        ({"history": (Event(ItemId("i1")),) * 130}, PromptTooLongError, "positions"),
    ],
)
def test_what_is_asked_wrongly_fails_alone(fields: dict[str, object], error: type[Exception], said: str) -> None:
    good, wrong = _with_knn().recommend_batch([_ask("good", 1), _ask("bad", 1, **fields)])
    assert isinstance(good, RecommendResponse), "a wrong request fails alone"
    with pytest.raises(error, match=said):
        answered([wrong])


def test_a_model_without_the_codes_of_the_catalogue_is_refused() -> None:
    few = CodeTokens(Vocabulary((6, 7, 4)).code_tokens.ids)
    with pytest.raises(ConfigError, match="do not belong together"):
        Recommender(_engine(), LiveCodes(_code_index()), few)
    far = CodeTokens((*Vocabulary(SIZES).code_tokens.ids[:2], np.arange(900, 905, dtype=np.int32)))
    with pytest.raises(ConfigError, match="token 904"):
        Recommender(_engine(), LiveCodes(_code_index()), far)


# ---- live ------------------------------------------------------------------------------------------------------------


def test_items_come_and_go_and_a_request_sees_one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed and disabled items never come again; a request that runs keeps the epoch that it began with."""
    recommender = _recommender()
    live = recommender.codes
    before = recommender.recommend(_ask("e", 1, 2))
    gone, hidden = before.items[:2]
    decoder, changed = recommender.engine.decoder, threading.Event()
    forward = decoder.forward

    def change_once(work: Pass, between: Between | None = None) -> Passed:
        if not changed.is_set() and len(work.wanted) > 1:  # a step of the beams
            changed.set()
            live.remove([gone])
            live.disable([hidden])
            live.flush()
        return forward(work, between=between)

    with monkeypatch.context() as patched:
        patched.setattr(decoder, "forward", change_once)
        during = recommender.recommend(_ask("e", 1, 2))
    assert changed.is_set()
    _same(during, before)
    after = recommender.recommend(_ask("e", 1, 2))
    assert not {gone, hidden} & set(after.items)
    assert after.receipt.epoch > during.receipt.epoch == before.receipt.epoch
    live.enable([hidden])
    live.flush()
    assert hidden in recommender.recommend(_ask("e", 1, 2)).items
