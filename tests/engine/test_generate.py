"""Answers in text: greedy equals transformers, speculation equals greedy, a batch equals one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from rcllm import fetch
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.decoding import Generated, GenerateOptions, GenerateRequest, OpenRequest, Speculation
from rcllm.core.ranking import Event, Level, TokenIds, UserId
from rcllm.decode.verify import accept, ancestors
from rcllm.drafts.draft import EMPTY, Drafter, DraftTree, PromptLookup, chain
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.engine.jobs.sequences import SequenceKV, next_pass
from rcllm.errors import ConfigError, UnknownItemError, answered
from rcllm.model.attend.segments import Group
from rcllm.model.decoder import Keep, Pass
from rcllm.model.pull import pull
from rcllm.schedule.draft_budget import DraftBudget, Drafted, PassCosts, Trust
from tests.conftest import assert_no_pins
from tests.engine.opening import opened
from tests.engine.tiny import IDS, NATIVE, TORCH, VOCAB, catalogue, computing_in, fresh, model_folder
from tests.reference.generate import decode, distribution, likeliest
from tests.tiny_models import their_model

NONE = Speculation("none")
DEFAULT_MODEL = "smollm2-135m-instruct"


def ask(name: str, events: Sequence[int] = (1, 2, 3), **options: object) -> GenerateRequest:
    """options: of GenerateOptions."""
    asked = GenerateOptions(**{"max_tokens": 16, **options})  # type: ignore[arg-type]
    return GenerateRequest(name, tuple(Event(IDS[i]) for i in events), UserId(name), asked)


def several(**options: object) -> list[GenerateRequest]:
    """Prompts and answers of different lengths."""
    return [ask(f"r{i}", range(1 + 2 * i), **{"max_tokens": 4 + 5 * i, **options}) for i in range(5)]


def prompt_of(engine: Engine, request: GenerateRequest) -> list[int]:
    return list(engine.prompter.build_open(request.opening).token_ids)


def tokens(answers: Sequence[Generated]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


class Everything(DraftBudget):
    """Verifies whatever is drafted, so that tests do not depend on what passes cost."""

    def __init__(self) -> None:
        super().__init__(PassCosts({1: 1.0, 64: 1.0}))

    @property
    def worth_looking(self) -> bool:
        return True

    def choose(
        self, trees: Sequence[DraftTree], trusts: Sequence[Trust], max_depths: Sequence[int], max_rows: int
    ) -> list[Drafted]:
        return [
            Drafted(tree, np.ones(len(tree)), np.flatnonzero(tree.depths <= depth).astype(np.int32))
            for tree, depth in zip(trees, max_depths, strict=True)
        ]


class Scripted:
    """Drafts what `make` says of how many tokens the answer has."""

    def __init__(self, num_prompt: int, make: Callable[[int], DraftTree]) -> None:
        self._num_prompt, self._make = num_prompt, make
        self.seen: list[int] = []
        self.finished = False

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        assert list(token_ids[self._num_prompt :]) == self.seen
        tree = self._make(len(self.seen))
        return DraftTree(tree.token_ids[:max_nodes], tree.parents[:max_nodes], tree.weights[:max_nodes])

    def observe(self, token_ids: Sequence[int]) -> None:
        assert not self.finished
        self.seen += token_ids

    def finish(self) -> None:
        self.finished = True


def speculating(engine: Engine, make: Callable[[str, int], DraftTree], **limits: int) -> Generator:
    """A generator that verifies all of `make(request id, tokens of the answer so far)`."""

    def drafter_of(request: GenerateRequest, prompt: TokenIds) -> Drafter:
        return Scripted(len(prompt), lambda length: make(request.request_id, length))

    return Generator(engine, drafter_of, budget=Everything(), **limits)


# ---- plain decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [NATIVE, TORCH])
def test_greedy_equals_transformers_and_a_full_recompute(family: str) -> None:
    engine, requests = fresh(family), several()
    model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
    for _ in range(2):  # the second time from cached prompts
        for request, answer in zip(requests, Generator(engine).generate(requests), strict=True):
            prompt, length = prompt_of(engine, request), len(answer.token_ids)
            ids = torch.tensor([prompt])
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=0
            )
            assert theirs[0, len(prompt) :].tolist() == list(answer.token_ids)
            assert decode(engine.decoder, prompt, length, likeliest) == list(answer.token_ids)
    assert answer.receipt.num_reused > answer.receipt.num_fresh


@pytest.mark.parametrize("limits", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 3, "kv_bytes": 1}, {}])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_batch_equals_one_at_a_time(engine: Engine, limits: dict[str, int], temperature: float) -> None:
    requests = several(temperature=temperature, top_p=0.95)
    alone = [Generator(engine).generate([request])[0] for request in requests]
    assert tokens(Generator(engine, **limits).generate(requests)) == tokens(alone)  # type: ignore[arg-type]
    streamed = Generator(engine, **limits).stream(requests)  # type: ignore[arg-type]
    assert {request.request_id: answer.token_ids for request, answer in streamed} == {
        answer.request_id: answer.token_ids for answer in alone
    }


def test_the_answer_ends_with_the_end_of_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Generator(engine).generate([ask("a")])[0]
    eos = plain.token_ids[5]
    first = plain.token_ids.index(eos)
    monkeypatch.setattr(engine.decoder, "spec", replace(engine.decoder.spec, eos_ids=(eos,)))
    for make in (lambda name, at: EMPTY, lambda name, at: chain(np.array(plain.token_ids[at:], np.int32))):
        answer = speculating(engine, make).generate([ask("a")])[0]
        assert answer.finish_reason == "eos"
        assert answer.token_ids == plain.token_ids[: first + 1]
        assert answer.text == engine.prompter.tokenizer.decode(plain.token_ids[:first])


def test_stop_strings_end_the_answer_across_token_boundaries(engine: Engine) -> None:
    plain = Generator(engine).generate([ask("a", max_tokens=30)])[0]
    text, decoded = plain.text, engine.prompter.tokenizer.decode
    starts = np.cumsum([len(decoded(plain.token_ids[: i + 1])) for i in range(len(plain.token_ids))])
    oracle = speculating(engine, lambda name, at: chain(np.array(plain.token_ids[at : at + 7], np.int32)))
    for start in range(3, len(text) - 4, 5):
        stop = text[start : start + 4]
        if "\ufffd" in stop:  # bytes that are no text
            continue
        for generator in (Generator(engine), oracle):
            answer = generator.generate([ask("a", max_tokens=30, stop=("never there", stop))])[0]
            assert answer.finish_reason == "stop"
            assert answer.text == text[: text.index(stop)]
            assert answer.token_ids == plain.token_ids[: len(answer.token_ids)]
            assert stop not in decoded(answer.token_ids[:-1])
    assert len(starts) < starts[-1], "some tokens have several characters"


def test_seeds_decide_and_batches_do_not(engine: Engine) -> None:
    one, two = ask("a", temperature=1.5, seed=1), ask("b", temperature=1.5, seed=2)
    first = Generator(engine).generate([one, two, replace(one, request_id="c")])
    assert first[0].token_ids == first[2].token_ids != first[1].token_ids
    reference = _sampled(engine, one)
    assert first[0].token_ids == reference


def _sampled(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    """Token by token, from a full recompute, by inverting the distribution in fp64."""
    from_seed = np.random.Philox

    def choose(logits: torch.Tensor, place: int) -> int:
        number = np.random.Generator(from_seed(key=request.options.seed, counter=place)).random()
        chances = distribution(logits, request.options.temperature, request.options.top_p)
        return int(np.searchsorted(np.cumsum(chances), number, side="right"))

    return tuple(decode(engine.decoder, prompt_of(engine, request), request.options.max_tokens, choose))


def test_answers_end_with_the_models_context(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    num_prompt = len(prompt_of(engine, ask("a")))
    monkeypatch.setattr(engine.decoder, "max_positions", num_prompt + 3)
    plain = Generator(engine).generate([ask("a")])[0]
    assert (len(plain.token_ids), plain.finish_reason) == (4, "length")
    guess = speculating(engine, lambda name, at: chain(np.array(plain.token_ids[at:] + (1,) * 9, np.int32)))
    assert guess.generate([ask("a")])[0].token_ids == plain.token_ids


def test_wrong_requests_fail_alone(engine: Engine) -> None:
    generator = Generator(engine)
    wrong = {"max_tokens": 0, "temperature": -1.0, "top_p": 0.0, "seed": -1, "stop": ("",)}
    for name, value in wrong.items():
        good, refused = generator.generate([ask("a"), ask("b", **{name: value})])
        assert isinstance(good, Generated)
        with pytest.raises(ConfigError, match=name):
            answered([refused])
    with pytest.raises(ConfigError, match="distribution"):
        generator.check(ask("a", temperature=1.0, speculation=Speculation("relaxed", 2, 0.1)))
    with pytest.raises(UnknownItemError):
        generator.check(replace(ask("a"), history=(Event(IDS[0]), Event("no such item"))))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size"):
        Generator(engine, batch_size=0)
    assert_no_pins(engine)


@pytest.mark.parametrize("text", ["none", "strict", "relaxed(2, 0.1)"])
def test_speculation_is_read_and_written(text: str) -> None:
    assert str(Speculation.parse(text)) == text


@pytest.mark.parametrize("text", ["loose", "relaxed(0, 0.1)", "relaxed(2, 1.5)", "relaxed(2)", "strict(1)"])
def test_unknown_speculation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="relaxed"):
        Speculation.parse(text)


# ---- speculation -----------------------------------------------------------------------------------------------------


def _random_tree(rng: np.random.Generator, right: Sequence[int]) -> DraftTree:
    """Some branches, each a start of `right` and then mistakes."""
    nodes: dict[tuple[int, int], int] = {}
    for _ in range(rng.integers(0, 5)):
        length, good = rng.integers(1, 8), rng.integers(0, 6)
        branch = [*right[:good], *rng.integers(0, VOCAB, 8).tolist()][:length]
        row = 0
        for token in branch:
            row = nodes.setdefault((row, token), len(nodes) + 1)
    parents = np.array([parent for parent, _ in nodes], np.int32)
    return DraftTree(np.array([t for _, t in nodes], np.int32), parents, np.ones(len(nodes), np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (NATIVE, {}),
        (NATIVE, {"dtype": "bf16"}),
        (NATIVE, {"weights": "int8"}),
        (NATIVE, computing_in("int8")),
        (TORCH, {}),
    ],
)
def test_any_drafts_give_the_plain_answers(family: str, options: dict[str, Any], temperature: float) -> None:
    engine, requests = fresh(family, **options), several(temperature=temperature, seed=5)
    plain = {answer.request_id: answer.token_ids for answer in Generator(engine).generate(requests)}

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 10**6), st.integers(1, 6))
    def holds(seed: int, batch_size: int) -> None:
        rng = np.random.default_rng(seed)
        generator = speculating(engine, lambda name, at: _random_tree(rng, plain[name][at:]), batch_size=batch_size)
        answers = generator.generate(requests)
        assert {answer.request_id: answer.token_ids for answer in answers} == plain

    holds()


def test_right_drafts_save_passes_and_the_receipt_says_so(engine: Engine) -> None:
    plain = Generator(engine).generate([ask("a", max_tokens=25)])[0]
    right = speculating(engine, lambda name, at: chain(np.array(plain.token_ids[at : at + 5], np.int32)))
    answer = right.generate([ask("a", max_tokens=25)])[0]
    assert answer.token_ids == plain.token_ids
    assert (plain.receipt.passes, plain.receipt.drafted) == (24, 0)
    assert answer.receipt.passes == 4  # 24 tokens after the first, six at a time
    assert (answer.receipt.drafted, answer.receipt.accepted, answer.receipt.accepted_length_mean) == (20, 20, 6.0)
    assert answer.receipt.divergences == ()
    assert {"join", "draft", "forward", "readout", "total"} <= set(answer.receipt.stage_ms)


def test_the_adaptive_budget_gives_the_plain_answers_too(engine: Engine) -> None:
    requests = several(max_tokens=40)
    plain = Generator(engine).generate(requests)
    costs = PassCosts({rows: 10 + rows / 10 for rows in (1, 64)})
    generator = Generator(engine, lambda request, prompt: PromptLookup(), budget=DraftBudget(costs))
    answers = generator.generate(requests)
    assert tokens(answers) == tokens(plain)
    assert sum(answer.receipt.accepted for answer in answers) > 0


def test_costs_of_passes_are_measured_where_something_is_drafted(engine: Engine) -> None:
    generator = Generator(engine, lambda request, prompt: PromptLookup())
    generator.generate([ask("a", speculation=NONE)])
    assert generator._budget is None
    generator.generate([ask("a")])
    assert generator._budget is not None
    assert (generator.budget.costs.ms([1, 8, 64]) > 0).all()


def test_drafters_are_told_of_every_token_and_of_the_end(engine: Engine) -> None:
    made: list[Scripted] = []

    def drafter_of(request: GenerateRequest, prompt: TokenIds) -> Drafter:
        assert prompt == tuple(prompt_of(engine, request))
        made.append(Scripted(len(prompt), lambda at: EMPTY))
        return made[-1]

    answers = Generator(engine, drafter_of, budget=Everything()).generate([*several(), ask("n", speculation=NONE)])
    assert len(made) == len(answers) - 1
    assert [each.seen for each in made] == [list(answer.token_ids) for answer in answers[:-1]]
    assert all(each.finished for each in made)


def test_no_draft_is_begun_for_a_user_who_was_erased_meanwhile(engine: Engine) -> None:
    asked: list[str] = []

    def drafter_of(request: GenerateRequest, prompt: TokenIds) -> Drafter:
        asked.append(request.request_id)
        return Scripted(len(prompt), lambda at: EMPTY)

    generator = Generator(engine, drafter_of, budget=Everything())
    tickets = [engine.submit(generator, ask(name)) for name in ("ann", "bob")]
    engine.erase_user(UserId("ann"))
    engine.loop.run(until=lambda: all(ticket.done for ticket in tickets))
    assert asked == ["bob"]
    assert all(isinstance(ticket.outcome, Generated) for ticket in tickets)


@pytest.mark.parametrize("drafts", [False, True])
def test_samples_have_the_distribution_of_the_model(drafts: bool) -> None:
    """The pair of the first two tokens, over many seeds, with drafts that are sometimes right."""
    engine, number, options = fresh(NATIVE), 1000, {"max_tokens": 3, "temperature": 0.6}
    request = ask("a", (1,), **options)
    prompt = prompt_of(engine, request)
    first = distribution(engine.decoder.full_logits(prompt)[-1], 0.6, 1.0)
    likely = np.argsort(-first)[:3].tolist()
    second = {token: distribution(engine.decoder.full_logits([*prompt, token])[-1], 0.6, 1.0) for token in likely}
    guesses = {token: int(np.argmax(chances)) for token, chances in second.items()}

    def make(name: str, at: int) -> DraftTree:
        return chain(np.array(sorted(guesses.values())[:1], np.int32)) if drafts and at == 1 else EMPTY

    requests = [replace(request, request_id=str(i), options=replace(request.options, seed=i)) for i in range(number)]
    answers = speculating(engine, make, batch_size=32).generate(requests)
    if drafts:
        assert 0 < sum(answer.receipt.accepted for answer in answers) < number
    counts = Counter(answer.token_ids[:2] for answer in answers)
    expected: dict[tuple[int, int] | None, float] = {
        (token, other): number * first[token] * chances[other]
        for token, chances in second.items()
        for other in np.argsort(-chances)[:4].tolist()
    }
    expected = {pair: count for pair, count in expected.items() if count >= 5}
    observed = [counts[pair] for pair in expected if pair is not None]
    rest = number - sum(expected.values())
    assert chisquare([*observed, number - sum(observed)], [*expected.values(), rest]).pvalue > 0.001


# ---- relaxed verification --------------------------------------------------------------------------------------------


def test_relaxed_reports_every_divergence_and_how_far(engine: Engine) -> None:
    request = ask("a", max_tokens=24, speculation=Speculation("relaxed", 3, 0.01))
    prompt = prompt_of(engine, request)
    rng = np.random.default_rng(0)

    def make(name: str, at: int) -> DraftTree:  # a branch that knows the model, and takes the second best at times
        context = [*prompt, *drafter.seen]
        branch: list[int] = []
        for _ in range(4):
            order = engine.decoder.full_logits([*context, *branch])[-1].argsort(descending=True)
            branch.append(int(order[int(rng.random() < 0.4)]))
        return chain(np.array(branch, np.int32))

    drafter = Scripted(len(prompt), lambda at: make("a", at))
    answer = Generator(engine, lambda request, prompt: drafter, budget=Everything()).generate([request])[0]
    plain = Generator(engine).generate([request])[0]
    assert answer.token_ids != plain.token_ids
    found = {each.position: each for each in answer.receipt.divergences}
    for place, token in enumerate(answer.token_ids):
        chances = torch.softmax(engine.decoder.full_logits([*prompt, *answer.token_ids[:place]])[-1], dim=-1)
        assert (token != int(chances.argmax())) == (place in found)
        if each := found.get(place):
            assert (each.token_id, each.argmax_id) == (token, int(chances.argmax()))
            assert each.probability == pytest.approx(float(chances[token]), abs=1e-4)
            assert each.argmax_probability == pytest.approx(float(chances.max()), abs=1e-4)
            assert each.probability > 0.01
            assert int((chances > chances[token]).sum()) < 3


def test_relaxed_with_rank_one_is_greedy(engine: Engine) -> None:
    requests = several(speculation=Speculation("relaxed", 1, 0.0))
    plain = {answer.request_id: answer.token_ids for answer in Generator(engine).generate(several())}
    rng = np.random.default_rng(3)
    answers = speculating(engine, lambda name, at: _random_tree(rng, plain[name][at:])).generate(requests)
    assert {answer.request_id: answer.token_ids for answer in answers} == plain
    assert not any(answer.receipt.divergences for answer in answers)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.1, "top_p": 0.8}, {"speculation": Speculation("relaxed", 3, 0.01)}],
    ids=["strict", "drawn", "relaxed"],
)
def test_one_wait_for_each_pass_gives_the_same_answers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """As on a GPU, here on the CPU: one copy to the host tells what all sequences of a pass need."""
    requests = several(**options)
    plain = {answer.request_id: answer.token_ids for answer in Generator(engine).generate(several())}

    def answers() -> list[Generated]:
        rng = np.random.default_rng(7)
        return answered(speculating(engine, lambda name, at: _random_tree(rng, plain[name][at:])).generate(requests))

    looked = answers()
    waits, read = [0], torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        waits[0] += 1
        return read(tensor)

    for module in ("told", "sample"):
        monkeypatch.setattr(f"rcllm.decode.{module}.is_near", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for ours, theirs in zip(answers(), looked, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert [each.position for each in ours.receipt.divergences] == [
            each.position for each in theirs.receipt.divergences
        ]
    assert waits[0] == 1 + max(answer.receipt.passes for answer in looked), "the prompts, and each pass of all of them"


# ---- KV --------------------------------------------------------------------------------------------------------------


def test_the_buffer_equals_the_kv_of_a_full_recompute(any_engine: Engine) -> None:
    """After a prompt of many blocks, and a tree of which one path is kept."""
    engine, request = any_engine, ask("a", (4, 5, 6))
    decoder, prompt = engine.decoder, prompt_of(engine, request)
    opened_request = OpenRequest("a", request.history, request.user_id)
    opened(engine, [opened_request])
    kv = SequenceKV(decoder, len(prompt) + 8)
    [from_cached_blocks] = opened(engine, [opened_request])
    kv.fill(from_cached_blocks.segments, decoder.rope)
    tree = DraftTree(np.array([9, 8, 7, 6, 5], np.int32), np.array([0, 0, 1, 3, 3], np.int32), np.ones(5, np.float32))
    passed = decoder.forward(next_pass([kv.segment], [11], [len(prompt)], [tree]))
    accepted = accept(tree, [9, 7, 0, 5, 0, 3])
    kv.append(passed.kept[0], [0, *accepted.rows])
    sequence = [*prompt, 11, 9, 7, 5]
    rows = torch.arange(len(sequence))
    work = Pass(torch.tensor(sequence), rows, (Group.causal(len(sequence)),), rows[-1:], (Keep(0, len(sequence), 0),))
    expected = decoder.forward(work)
    assert kv.length == len(sequence)
    error = (kv.kv[:, :, :, : kv.length] - expected.kept[0]).abs().max()
    assert error < 1e-4
    assert torch.allclose(passed.hidden[5], expected.hidden[0], atol=1e-4)
    assert ancestors(tree)[5].tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_draft_changes_no_bit_of_what_plain_decoding_computes(dtype: str) -> None:
    """Compiled kernels: logits and KV of a tree's path, in a batch, are those of one token after the other, alone."""
    engine = fresh(NATIVE, **computing_in(dtype))
    decoder, rng = engine.decoder, np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 90).tolist()  # what follows crosses the end of a tile of keys
    right = rng.integers(0, VOCAB, 30).tolist()
    other = OpenRequest("b", ask("b", range(6)).history)
    beside = SequenceKV(decoder, 200)
    beside.fill(opened(engine, [other])[0].segments, decoder.rope)
    rows = torch.arange(len(prompt))
    work = Pass(torch.tensor(prompt), rows, (Group.causal(len(prompt)),), rows[-1:], (Keep(0, len(prompt), 0),))
    kept = decoder.forward(work).kept[0]
    plain, drafted = SequenceKV(decoder, 120), SequenceKV(decoder, 120)
    for kv in (plain, drafted):
        kv.append(kept, range(len(prompt)))
    hidden = []
    for token in right:
        passed = decoder.forward(next_pass([plain.segment], [token], [plain.length], [EMPTY]))
        plain.append(passed.kept[0], [0])
        hidden.append(passed.hidden[0])
    at = 0
    while at < len(right):
        tree = _random_tree(rng, right[at + 1 :])
        segments, positions = [drafted.segment, beside.segment], [drafted.length, beside.length]
        passed = decoder.forward(next_pass(segments, [right[at], 5], positions, [tree, tree]))
        path = accept(tree, _following(tree, right[at + 1 :])).rows
        drafted.append(passed.kept[0], [0, *path])
        logits = decoder.logits(passed.hidden)
        for row in (0, *path):
            assert torch.equal(passed.hidden[row], hidden[at])
            assert torch.equal(logits[row], decoder.logits(hidden[at][None])[0])
            at += 1
    assert torch.equal(drafted.kv[:, :, :, : drafted.length], plain.kv[:, :, :, : plain.length])


def _following(tree: DraftTree, right: Sequence[int]) -> list[int]:
    """What a model that answers `right` would choose after each row of a tree."""
    after = [*right, -1]
    return [after[depth] for depth in (0, *tree.depths.tolist())]


def test_nothing_stays_pinned_while_answers_are_decoded(engine: Engine) -> None:
    stream = Generator(engine, batch_size=2).stream(several())
    next(stream)
    assert not engine.pool._index._pins
    assert len(list(stream)) == 4


def test_prompts_of_other_levels_are_decoded_apart(engine: Engine) -> None:
    requests = [replace(ask("a"), level=Level.parse("full")), ask("b"), replace(ask("c"), level=Level.parse("full"))]
    answers = answered(Generator(engine).generate(requests))
    assert [answer.receipt.level for answer in answers] == ["full", "exact", "full"]
    assert answers[0].token_ids == answers[2].token_ids == answers[1].token_ids


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_model_answers_as_transformers_with_and_without_drafts() -> None:
    folder = _real_model()
    config = Config(
        ModelConfig(path=str(folder), device="cpu"), PromptConfig(template="describe_user"), CacheConfig(pool_mb=200)
    )
    engine = Engine.build(catalogue(), config)
    model = their_model(folder)
    requests = [ask(f"r{i}", range(i, i + 10), max_tokens=40) for i in range(4)]
    for generator in (Generator(engine), Generator(engine, lambda request, prompt: PromptLookup())):
        for request, answer in zip(requests, generator.generate(requests), strict=True):
            ids = torch.tensor([prompt_of(engine, request)])
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0
            )
            assert theirs[0, ids.shape[1] :].tolist() == list(answer.token_ids)


def _real_model() -> Path:
    if not (fetch.cache_dir() / "models" / DEFAULT_MODEL).exists():
        pytest.skip(f"{DEFAULT_MODEL} is not there; run `rcllm pull`")
    return pull(DEFAULT_MODEL)
