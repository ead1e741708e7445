"""How much faster is wide constrained beam search than Hugging Face's, and where does its time go?

Regime: random weights of the shape that `rcllm sid train` makes (3 layers, d 128), three levels of 256 codes, prompts
of random histories that nothing is cached of (level `full`), fp32, all cores; and SmolLM2-135M, whose vocabulary lends
its tokens to the codes. Both sides answer the same prompts by turns, with the same rule (`mask`) and the same items.
Ceiling: a request costs one prefill and two passes over `beam` rows. Hugging Face's `generate` computes the prompt once
for each beam, and reads it once for each beam in every step; `prompt_once` is the same with the first spared by hand.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.harness import Options, dataset, options, percentile, run_parts, show, timed, transformers_model
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.codes.updates import Update
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.decoding import OpenRequest, RecommendRequest, RecommendResponse
from rcllm.core.ranking import Event, IntArray, Item, ItemId, Level
from rcllm.decode.beam_kv import StepBuffer
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.model.attend.choose import prepare
from rcllm.model.attend.contract import Attend, Attended
from rcllm.model.pull import pull
from rcllm.sid.config import NetworkConfig
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import save_model
from rcllm.sid.network import CodeNetwork
from rcllm.sid.vocabulary import Vocabulary

QUESTION = "Requests/s, latency and KV traffic of wide constrained beam search, against Hugging Face generate"
PARTS = ("peer", "smollm2", "latency", "kv", "stages", "catalogues")
SIZES = (256, 256, 256)
NUM_ITEMS = 20_000
POSITIONS = 4096
WARM_UP_BEAM = 10
TOKENS_PER_EVENT = len(SIZES) + 1
TEMPLATE = """
name = "titles"
version = 1
open = true
system = ""
instruction = "The user bought:"
history_head = ""
event = ["\\n- {title}"]
event_text = "\\n- {text}"
question = "\\nNext:"
max_event_tokens = 40
"""
SHARES = {  # which stages of a receipt make up which share
    "mask": ("allow", "gather"),
    "sort": ("sort",),
    "host": ("join", "readout", "items", "prompt", "lookup", "plan", "assemble"),
}


class Recorded(LiveCodes):
    """Remembers the last epochs that it gave, to judge answers by."""

    def __init__(self, code_index: CodeIndex) -> None:
        super().__init__(code_index)
        self.given: deque[CodeIndex] = deque(maxlen=8)

    def epoch(self) -> CodeIndex:
        self.given.append(super().epoch())
        return self.given[-1]

    def of(self, answer: RecommendResponse) -> CodeIndex:
        """What the request saw."""
        return next(code_index for code_index in self.given if code_index.epoch == answer.receipt.epoch)


@dataclass
class Tally:
    """Answers that were looked at, over all parts."""

    answers: int = 0
    items: int = 0
    invalid: int = 0

    def look(
        self, asked: Sequence[RecommendRequest], given: Sequence[RecommendResponse], code_index: CodeIndex
    ) -> None:
        for request, answer in zip(asked, given, strict=True):
            self.answers += 1
            self.items += len(answer.items)
            offered, barred = code_index.enabled, set(request.deny)
            numbers = [code_index.number_of(item) for item in answer.items]
            self.invalid += sum(number is None or not offered[number] for number in numbers)
            self.invalid += sum(item in barred for item in answer.items)
            self.invalid += len(answer.items) - len(set(answer.items))

    def after(self, part: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Runs a part; what it measured, and what was looked at so far."""
        metrics = part()
        counts = {"invalid_items": self.invalid, "answers_checked": self.answers, "items_checked": self.items}
        return metrics | counts


def random_codes(num_items: int, seed: int) -> CodeIndex:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, num_items, dtype=np.int32) for size in SIZES], axis=1)
    return CodeIndex.build(codes, [ItemId(f"i{i}") for i in range(num_items)], SIZES)


def random_recommender(folder: Path, code_index: CodeIndex, seed: int) -> Recommender:
    """Weights without training, of the default size of `rcllm sid train`."""
    config = NetworkConfig()
    hf_config = config.hf_config(len(Vocabulary(SIZES)), POSITIONS)
    network = CodeNetwork(config, hf_config)
    network.reset(seed)
    save_model(folder, network.state_dict(), hf_config, code_index, {})
    settings = Config(ModelConfig(path=str(folder)), cache=CacheConfig(pool_mb=1000, pass_tokens=8192))
    return load_recommender(settings)


def ask(rng: np.random.Generator, code_index: CodeIndex, tokens: int, **fields: Any) -> RecommendRequest:
    """A history that fills a prompt of so many tokens, which shares no cached KV with others."""
    items = rng.integers(0, code_index.num_items, (tokens - 2) // TOKENS_PER_EVENT).tolist()
    history = tuple(Event(code_index.item_ids[item]) for item in items)
    request = RecommendRequest(f"r{rng.integers(1 << 60)}", history, n=10, beam=128, rule="mask", level=Level("full"))
    return replace(request, **fields)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class Peer:
    """`generate` under `prefix_allowed_tokens_fn`, with look-ups by dict."""

    def __init__(self, folder: Path, code_index: CodeIndex, tokens: CodeTokens) -> None:
        self.model = transformers_model(folder)
        self.model.generation_config.eos_token_id = None
        self.children: dict[tuple[int, ...], set[int]] = {}
        columns = [ids[code_index.codes[:, level]].tolist() for level, ids in enumerate(tokens.ids)]
        for row in zip(*columns, strict=True):
            for level in range(len(row)):
                self.children.setdefault(row[:level], set()).add(row[level])
        self.lists = {prefix: sorted(ids) for prefix, ids in self.children.items()}
        self.num_levels = len(columns)

    def best(self, prompt: Sequence[int], beam: int) -> tuple[int, ...]:
        """The tokens of the best sequence, as `generate` searches by itself: it computes the prompt once per beam."""
        return self._generate(prompt, beam, {})

    @torch.inference_mode()
    def best_prompt_once(self, prompt: Sequence[int], beam: int) -> tuple[int, ...]:
        """The same with the prompt computed once beforehand, and its KV copied to every beam."""
        from transformers import DynamicCache  # noqa: PLC0415 (a peer, not a dependency)

        cache = DynamicCache(config=self.model.config)
        self.model.model(torch.tensor([list(prompt[:-1])]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(beam)
        return self._generate(prompt, beam, {"past_key_values": cache})

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[int], beam: int, given: dict[str, Any]) -> tuple[int, ...]:
        ids = torch.tensor([list(prompt)])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beam,
            num_return_sequences=beam,
            max_new_tokens=self.num_levels,
            do_sample=False,
            length_penalty=0.0,
            early_stopping="never",
            eos_token_id=None,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, given: self.lists[tuple(given[len(prompt) :].tolist())],
            **given,
        )
        return tuple(output[0, len(prompt) :].tolist())


def against_peer(
    recommender: Recommender, peer: Peer, requests: Sequence[RecommendRequest], tally: Tally, name: str
) -> dict[str, float]:
    """By turns. The first request warms both sides up, and is not counted."""
    code_index, tokens = recommender.codes.epoch(), recommender.tokens
    took: dict[str, list[float]] = {"ours": [], "generate": [], "prompt once": []}
    equal = 0
    for request in requests:
        opened = OpenRequest(request.request_id, request.history)
        prompt = list(recommender.engine.prompter.build_open(opened).token_ids)
        seconds, answer = timed(recommender.recommend, request)
        took["ours"].append(seconds)
        tally.look([request], [answer], code_index)
        first = code_index.codes[code_index.numbers_of(answer.items[:1])[0]].tolist()
        best = tuple(int(ids[code]) for ids, code in zip(tokens.ids, first, strict=True))
        for side, search in (("generate", peer.best), ("prompt once", peer.best_prompt_once)):
            start = time.perf_counter()
            equal += search(prompt, request.beam) == best
            took[side].append(time.perf_counter() - start)
    p50 = {side: statistics.median(seconds[1:]) for side, seconds in took.items()}
    rows = [[side, f"{seconds * 1e3:.1f}", f"{seconds / p50['ours']:.1f}×"] for side, seconds in p50.items()]
    show(f"{name}: beam 128, {len(prompt):,} tokens, one request at a time", ["side", "ms", "time over ours"], rows)
    return {
        "": p50["generate"] / p50["ours"],
        "_prompt_once": p50["prompt once"] / p50["ours"],
        "_same_best": equal / (2 * len(requests)),
    }


def peer_part(chosen: Options, recommender: Recommender, tally: Tally) -> dict[str, float]:
    rng, code_index = np.random.default_rng(chosen.seed), recommender.codes.epoch()
    peer = Peer(Path(recommender.engine.config.model.path), code_index, recommender.tokens)
    count = 2 if chosen.quick else chosen.requests or 20
    requests = [ask(rng, code_index, 1000, beam=beam) for beam in (WARM_UP_BEAM, *[128] * count)]
    found = against_peer(recommender, peer, requests, tally, "3 layers, d 128")
    return {f"throughput_ratio_vs_hf_beam128_p1000{key}": value for key, value in found.items()}


def smollm2_part(chosen: Options, folder: Path, tally: Tally) -> dict[str, float]:
    """Titles of real items as history; 768 tokens of the vocabulary stand for codes."""
    if chosen.quick:
        return {}
    (folder / "titles.toml").write_text(TEMPLATE, encoding="utf-8")
    titles = [item.fields["title"] for item in dataset("amazon_scientific").catalogue.values()]
    code_index = random_codes(NUM_ITEMS, chosen.seed)
    items = {name: Item(name, {"title": titles[i % len(titles)]}) for i, name in enumerate(code_index.item_ids)}
    tokens = CodeTokens(tuple(np.arange(start, start + 256, dtype=np.int32) for start in (20000, 30000, 40000)))
    settings = Config(prompt=PromptConfig(template=str(folder / "titles.toml")), cache=CacheConfig(pool_mb=1000))
    engine = Engine.build(items, settings)
    recommender = Recommender(engine, LiveCodes(code_index), tokens)
    peer = Peer(pull(settings.model.path), code_index, tokens)
    rng, requests = np.random.default_rng(chosen.seed), []
    for beam in (WARM_UP_BEAM, *[128] * (chosen.requests or 4)):
        request = ask(rng, code_index, 1000, beam=beam)
        lengths = np.cumsum([len(engine.prompter.event(event).ids) for event in request.history])
        requests.append(replace(request, history=request.history[: int((lengths < 990).sum())]))
    found = against_peer(recommender, peer, requests, tally, "SmolLM2-135M")
    return {f"throughput_ratio_vs_hf_beam128_p1000_smollm2{key}": value for key, value in found.items()}


# ---- ours ------------------------------------------------------------------------------------------------------------


def latency_part(chosen: Options, recommender: Recommender, tally: Tally) -> dict[str, float]:
    rng, code_index, rows = np.random.default_rng(chosen.seed), recommender.codes.epoch(), []
    metrics: dict[str, float] = {}
    beams = (16, 128, 512) if chosen.quick else (16, 32, 64, 128, 256, 512)
    prompts = (250, 1000, 2000) if chosen.quick else (250, 500, 1000, 2000)
    for beam in beams:
        row = [str(beam)]
        for tokens in prompts:
            requests = [ask(rng, code_index, tokens, beam=beam) for _ in range(4 if chosen.quick else 21)]
            runs = [timed(recommender.recommend, request) for request in requests]
            tally.look(requests, [answer for _, answer in runs], code_index)
            metrics[f"latency_ms_beam{beam}_p{tokens}"] = statistics.median(took for took, _ in runs[1:]) * 1e3
            row.append(f"{metrics[f'latency_ms_beam{beam}_p{tokens}']:.1f}")
        rows.append(row)
    show("Latency of one request, nothing cached, ms", ["beam", *(f"{tokens:,} tokens" for tokens in prompts)], rows)
    return metrics


def kv_part(chosen: Options, recommender: Recommender, tally: Tally) -> dict[str, float]:
    rng, code_index, rows = np.random.default_rng(chosen.seed), recommender.codes.epoch(), []
    metrics: dict[str, float] = {}
    for beam in (32, 128, 512):
        request = ask(rng, code_index, 1000, beam=beam)
        answer = recommender.recommend(request)
        tally.look([request], [answer], code_index)
        read, naive = answer.receipt.kv_bytes_read, answer.receipt.kv_bytes_naive
        metrics[f"kv_bytes_ratio_vs_naive_beam{beam}"] = read / naive
        rows.append([str(beam), f"{read / 1e6:.2f}", f"{naive / 1e6:.1f}", f"1 / {naive / read:.0f}"])
    show("KV read by the steps, prompt 1,000 tokens, MB", ["beam", "ours", "a prompt per beam", "ratio"], rows)
    return metrics | {"kv_bytes_ratio_vs_naive": metrics["kv_bytes_ratio_vs_naive_beam128"]}


class _Timed:
    """Attention whose time is told."""

    def __init__(self, attend: Attend, told: list[float]) -> None:
        self.attend, self.told, self.name = attend, told, attend.name

    @property
    def bytes_copied(self) -> int:
        return self.attend.bytes_copied

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        start = time.perf_counter()
        out = self.attend(layer, qkv)
        self.told.append(time.perf_counter() - start)
        return out


@contextmanager
def attention_seconds() -> Iterator[list[float]]:
    """Seconds of every call of attention, over prompts and over the beams' own steps."""
    told: list[float] = []
    own = StepBuffer.__call__

    def timed_own(buffer: StepBuffer, layer: int, qkv: torch.Tensor) -> Attended:
        start = time.perf_counter()
        out = own(buffer, layer, qkv)
        told.append(time.perf_counter() - start)
        return out

    with (
        patch("rcllm.model.decoder.prepare", lambda *given: _Timed(prepare(*given), told)),
        patch.object(StepBuffer, "__call__", timed_own),
    ):
        yield told


def stages_part(chosen: Options, recommender: Recommender, tally: Tally) -> dict[str, float]:
    """One request at a time, nothing cached."""
    rng, code_index, rows = np.random.default_rng(chosen.seed), recommender.codes.epoch(), []
    metrics: dict[str, float] = {}
    for name, tokens, beam in (("p1000_beam128", 1000, 128), ("p1000_beam512", 1000, 512)):
        spent: dict[str, list[float]] = {}
        for _ in range(4 if chosen.quick else 21):
            request = ask(rng, code_index, tokens, beam=beam)
            with attention_seconds() as told:
                answer = recommender.recommend(request)
            tally.look([request], [answer], code_index)
            stages = answer.receipt.stage_ms
            each = {"attention": sum(told) * 1e3}
            each |= {share: sum(stages.get(stage, 0.0) for stage in of) for share, of in SHARES.items()}
            passes = sum(stages.get(name, 0.0) for name in ("materialise", "forward", "step"))
            each["layers"] = passes - each["attention"]
            for share, value in each.items():
                spent.setdefault(share, []).append(value / stages["total"])
        shares = {share: statistics.median(values[1:]) for share, values in spent.items()}
        metrics |= {f"share_{share}_{name}": value for share, value in shares.items()}
        rows.append([name, *(f"{value:.1%}" for value in shares.values())])
    show("Share of the time of a request", ["prompt and beam", *shares], rows)
    return metrics


def catalogues_part(chosen: Options, recommender: Recommender, tally: Tally) -> dict[str, float]:
    """Large catalogues, still and while they change."""
    metrics: dict[str, float] = {}
    rows = []
    for num_items in (100_000, 1_000_000):
        name = f"{num_items // 1000}k"
        build_s, code_index = timed(lambda count: random_codes(count, chosen.seed), num_items)
        live = Recorded(code_index)
        large = Recommender(recommender.engine, live, recommender.tokens)
        rng = np.random.default_rng(chosen.seed)
        still, changing = _under_updates(chosen, large, live, recommender.codes.epoch(), rng, tally)
        step_ms = statistics.median(_step_ms(answer) for _, answer in still)
        p99 = [percentile([took for took, _ in runs], 0.99) for runs in (still, changing)]
        metrics |= {
            f"build_s_{name}": build_s,
            f"catalogue_mb_{name}": code_index.stats().num_bytes / 1e6,
            f"step_host_ms_{name}": step_ms,
            f"p99_ratio_during_updates_{name}": p99[1] / p99[0],
        }
        row = [f"{num_items:,}", f"{build_s:.2f}", f"{code_index.stats().num_bytes / 1e6:.0f}", f"{step_ms:.2f}"]
        rows.append([*row, f"{p99[0] * 1e3:.1f}", f"{p99[1] * 1e3:.1f}"])
    columns = ["items", "build s", "MB", "mask and sort of a step, ms", "P99 ms", "P99 ms during updates"]
    show("Large catalogues, beam 128, prompt 250 tokens", columns, rows)
    return metrics | {"p99_ratio_during_updates": metrics["p99_ratio_during_updates_1000k"]}


Runs = list[tuple[float, RecommendResponse]]


def _under_updates(
    chosen: Options, large: Recommender, live: Recorded, known: CodeIndex, rng: np.random.Generator, tally: Tally
) -> tuple[Runs, Runs]:
    """Requests by turns: some while nothing changes, some while a thread adds, disables and removes items at 20 Hz."""
    still: Runs = []
    changing: Runs = []
    large.recommend(ask(rng, known, 250))
    changes = _changes(live.epoch(), rng)
    for _ in range(3 if chosen.quick else 10):
        for runs, update in ((still, False), (changing, True)):
            stop = threading.Event()
            writer = threading.Thread(target=_keep_changing, args=(live, changes, stop))
            if update:
                writer.start()
            for _ in range(12 if chosen.quick else 60):
                request = ask(rng, known, 250)
                took, answer = timed(large.recommend, request)
                tally.look([request], [answer], live.of(answer))
                runs.append((took, answer))
            stop.set()
            if update:
                writer.join()
    return still, changing


def _changes(code_index: CodeIndex, rng: np.random.Generator) -> Iterator[Update]:
    """Each removes ten items, disables ten and adds ten."""
    order = rng.permutation(code_index.num_items)
    for number in range(len(order) // 20):
        names = [code_index.item_ids[i] for i in order[20 * number : 20 * number + 20].tolist()]
        codes: IntArray = np.stack([rng.integers(0, size, 10) for size in SIZES], axis=1).astype(np.int32)
        new = {ItemId(f"new{number}-{i}"): tuple(row) for i, row in enumerate(codes.tolist())}
        yield Update(frozenset(names[:10]), new, dict.fromkeys(names[10:], False))


def _keep_changing(live: LiveCodes, changes: Iterator[Update], stop: threading.Event) -> None:
    while not stop.is_set():
        live.apply(next(changes))
        stop.wait(0.05)


def _step_ms(answer: RecommendResponse) -> float:
    stages = answer.receipt.stage_ms
    return (stages["gather"] + stages["sort"]) / len(SIZES)


def main() -> None:
    chosen = options("beam", QUESTION, PARTS)
    tally = Tally()
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        recommender = random_recommender(folder / "model", random_codes(NUM_ITEMS, chosen.seed), chosen.seed)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "peer": partial(peer_part, chosen, recommender, tally),
            "smollm2": partial(smollm2_part, chosen, folder, tally),
            "latency": partial(latency_part, chosen, recommender, tally),
            "kv": partial(kv_part, chosen, recommender, tally),
            "stages": partial(stages_part, chosen, recommender, tally),
            "catalogues": partial(catalogues_part, chosen, recommender, tally),
        }
        run_parts("beam", QUESTION, chosen, {name: partial(tally.after, part) for name, part in parts.items()})


if __name__ == "__main__":
    main()
