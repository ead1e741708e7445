"""What does less than fp32 gain on this processor, and what does it cost in scores and quality?

Regime: SmolLM2-135M on the CPU, one request at a time, our own fp32 and every other variant in turns on the same work
in one run; speed-ups are medians of the ratios of neighbours. `int8_weights`: weights in int8, products in fp32;
`int8`: products in bf16 as well; `int8_products`: what matrices multiply in 8 bits, all else as in bf16. `blocks`:
rankings of paper-shaped prompts at level `blocks`, all but the end of the prompt warm; `prefill`: a cold prefill of
2,000 tokens; `decode`: one row over a prompt of 500, with the logits of the vocabulary; `beam`: 128 rows over one of
250; `peers`: whole texts, with drafts and without, beside OpenVINO and llama.cpp (benchmarks/decoding_peers.py says
what they need); `tau`: the untuned model's labels at `full`; `ndcg`: the block-mask ranker at `blocks` on held-out
users, paired with fp32; `recommend`: the same of the decoder in decoders/ over its whole catalogue; `strict`: texts
with and without drafts, token by token.

Ceiling: FLOPs over the rate that this variant's products reach here (`measure_gemm`, torch's or ours, whichever is
faster), plus bytes of KV over the bandwidth; printed beside. Where products are imitated the speed-ups are below 1.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.decoding_peers import Peer, Took, llama, openvino
from benchmarks.describe import Spent, exact, run
from benchmarks.describe_setup import NONE, STRICT, Workbench, user_scenarios
from benchmarks.fidelity_setup import SETS, TEMPLATES, engine_of, held_out, paper_shaped, scored
from benchmarks.harness import PRECISIONS, ROOT, Options, console, dataset, options, run_parts, show, timed, turns
from benchmarks.kv_dtype import warm
from benchmarks.recall import MEASURES, cases, generated, measured
from benchmarks.ttft import floor_seconds
from rcllm.config import CacheConfig, Config, ModelConfig
from rcllm.core.ranking import Level, RankOptions, UserId
from rcllm.data import Dataset
from rcllm.decode.beam_kv import beam_group
from rcllm.describe.profiles import Profile
from rcllm.describe.writer import GeneratorWriter
from rcllm.drafts.draft import EMPTY
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.sequences import next_pass
from rcllm.fetch import cache_dir
from rcllm.fidelity.intervals import bootstrap
from rcllm.fidelity.measures import agreement
from rcllm.fidelity.records import RecordFile
from rcllm.fidelity.summary import summarise
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.ceilings import measure_bandwidth, measure_gemm
from rcllm.model.decoder import Decoder, Pass
from rcllm.reuse.assemble import assemble
from rcllm.reuse.plan import Planned, plan

QUESTION = "Speed, score shift and NDCG@10 of the precisions of products on this CPU, against our own fp32"
# whose measured rate is the floor
PRODUCTS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8_weights": torch.float32,
    "int8": torch.bfloat16,
    "int8_products": torch.int8,
}
SET = "scientific"
DECODER = ROOT / "decoders" / "movielens"
PREFILL_TOKENS, DECODE_TOKENS, BEAM_TOKENS, BEAMS = 2000, 500, 250, 128
PEER_TOKENS = 65  # of an answer
POOL_MB = 2000
TEXT_TOKENS, EARLIER = 32, 40  # of an answer; answers that drafts are taken from


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Requests, and rounds in which every variant has its turn."""

    timed: int
    rounds: int
    steps: int  # of one row or 128, which are short
    agreement: int
    quality: int
    other_quality: int  # of all but the block-mask ranker in fp32 and bf16
    texts: int
    peers: int  # texts, of each way


FULL, QUICK = Sizes(12, 5, 60, 6, 1000, 300, 200, 24), Sizes(2, 2, 10, 2, 6, 6, 8, 2)


def main() -> None:
    chosen = options("precision", QUESTION, tuple(PARTS))
    sizes = QUICK if chosen.quick else FULL
    if (most := chosen.requests) is not None:
        fewer = {name: min(most, getattr(sizes, name)) for name in ("timed", "agreement", "quality", "peers")}
        sizes = dataclasses.replace(sizes, **fewer)
    with RecordFile(cache_dir() / "benchmarks" / "precision.jsonl") as kept:
        parts = {name: partial(part, sizes, chosen, kept) for name, part in PARTS.items()}
        run_parts("precision", QUESTION, chosen, parts, slow=("ndcg", "ndcg_causal"))


def blocks(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Whole rankings; and the forward pass alone against its floor."""
    data = dataset(SETS[SET])
    engines = engines_of(data)
    found = paper_shaped(engines["fp32"], data, SET, 20, sizes.timed, chosen.seed)
    asked = [dataclasses.replace(r, user_id=None, options=RankOptions(level=Level("blocks"))) for r in found]
    warm(engines, asked)
    times = defaultdict[str, list[float]](list)
    for request in asked:
        by_turns({name: partial(engine.rank, request) for name, engine in engines.items()}, sizes.rounds, times)
    ratios: dict[str, float] = {}
    for name, engine in engines.items():
        decoder = engine.decoder
        prompt = engine.prompter.build(asked[0])
        planned = Planned(prompt, plan(prompt, Level("blocks"), ()))
        with engine.pool.hold() as held:
            held.fetch(planned.plan.read)
            ratios[name] = floor_ratio(name, decoder, assemble([planned], held.blocks, decoder.device).work, sizes)
    return summed("blocks", times, ratios, chosen.seed) | {"num_requests_blocks": len(asked)}


def prefill(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    decoders = decoders_of()
    work = causal(PREFILL_TOKENS, decoders["fp32"], chosen.seed)
    times = defaultdict[str, list[float]](list)
    by_turns({name: partial(decoder.forward, work) for name, decoder in decoders.items()}, sizes.rounds, times)
    ratios = {name: floor_ratio(name, decoder, work, sizes) for name, decoder in decoders.items()}
    return summed("prefill", times, ratios, chosen.seed)


def decode(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """A token of plain decoding: its pass, and the logits that it is chosen by."""
    decoders = decoders_of()

    def step(decoder: Decoder, segment: Segment) -> None:
        decoder.logits(decoder.forward(next_pass([segment], [5], [DECODE_TOKENS], [EMPTY])).hidden)

    steps = {name: partial(step, decoder, cached(decoder, DECODE_TOKENS)) for name, decoder in decoders.items()}
    times = defaultdict[str, list[float]](list)
    by_turns(steps, sizes.steps, times)
    metrics = summed("decode", times, {}, chosen.seed)
    return metrics | {f"decode_tokens_per_s_{name}": 1e3 / metrics[f"decode_ms_{name}"] for name in decoders}


def peers(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Tokens a second of answers about users, one at a time, by turns with OpenVINO GenAI and llama.cpp.

    Plain, and with drafts: ours from a pool of earlier answers, llama.cpp's from what it has read of the same answers,
    OpenVINO's from the prompt. The prompt's own pass does not count.
    """
    data = dataset("movielens_100k")
    scenario = user_scenarios(data, sizes.peers + 1, EARLIER)["refresh"]
    works: dict[str, Callable[[Profile], Took]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcllm-pools-")))
        for name, model in PRECISIONS.items():
            bench = Workbench("user", PEER_TOKENS, data, ModelConfig(**model))
            pools = bench.warm_pools(scenario, folder / name)
            for way, speculation in (("plain", NONE), ("drafts", STRICT)):
                works[f"{name}_{way}"] = partial(answered_alone, bench, bench.writer(speculation, 1, pools))
        prompt_of, eos_ids = bench.writer(NONE, 1).prompt_ids, bench.engine.decoder.spec.eos_ids
        earlier = zip(scenario.earlier, bench.answers(scenario.earlier, NONE), strict=True)
        learned = [(*prompt_of(profile), *answer.token_ids) for profile, answer in earlier]
        opened = {
            "openvino_plain": openvino(eos_ids, lookup=False),
            "openvino_drafts": openvino(eos_ids, lookup=True),
            "llama_plain": llama(learned=None),
            "llama_drafts": llama(learned=learned),
        }
        for name, opening in opened.items():
            if peer := stack.enter_context(opening):
                works[name] = partial(_ask, peer, prompt_of)
            else:
                console.print(f"[yellow]{name} is not here (see benchmarks/decoding_peers.py): left out")
        seconds, tokens = defaultdict[str, float](float), defaultdict[str, int](int)
        for number, (profile, turn) in enumerate(zip(scenario.tested, turns(works), strict=False)):
            for name in turn:
                took = works[name](profile)
                if number:  # the first warms what is compiled and allocated
                    seconds[name] += took.seconds
                    tokens[name] += took.tokens
    rates = {name: tokens[name] / seconds[name] for name in works}
    metrics = {f"peers_tokens_per_s_{name}": rate for name, rate in rates.items()}
    for way in ("plain", "drafts"):
        for peer_name in ("openvino", "llama"):
            if (of := f"{peer_name}_{way}") in rates:
                metrics[f"peers_int8_over_{of}"] = rates[f"int8_{way}"] / rates[of]
    rows = [
        [name, *(f"{rates[f'{name}_{way}']:.0f}" if f"{name}_{way}" in rates else "" for way in ("plain", "drafts"))]
        for name in (*PRECISIONS, "openvino", "llama")
    ]
    show(f"Answers about {sizes.peers} users, {PEER_TOKENS} tokens", ["tokens a second", "plain", "with drafts"], rows)
    return metrics | {"peers_answers": sizes.peers}


def answered_alone(bench: Workbench, writer: GeneratorWriter, profile: Profile) -> Took:
    bench.engine.erase_user(UserId(profile.name))
    spent = Spent()
    run(writer, [profile], spent)
    return Took(spent.wall_s - spent.prompt_s, spent.tokens)


def _ask(peer: Peer, prompt_of: Callable[[Profile], Sequence[int]], profile: Profile) -> Took:
    return peer(prompt_of(profile), PEER_TOKENS)


def beam(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """A step of 128 beams, without what they have decoded so far, and without the choice among items."""
    decoders = decoders_of()
    tokens, places = torch.arange(BEAMS), torch.full((BEAMS,), BEAM_TOKENS)

    def work(decoder: Decoder) -> Pass:
        return Pass(tokens, places, (beam_group([cached(decoder, BEAM_TOKENS)], BEAMS),), torch.arange(BEAMS))

    steps = {name: partial(decoder.forward, work(decoder)) for name, decoder in decoders.items()}
    times = defaultdict[str, list[float]](list)
    by_turns(steps, sizes.steps, times)
    return summed("beam", times, {}, chosen.seed)


def tau(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Scores of the untuned model with everything computed anew, so that no KV is rounded between passes."""
    data = dataset(SETS[SET])
    found = {}
    for name, model in PRECISIONS.items():
        with engine_of("untuned", "shopping", data, chosen.seed, base=RankOptions(), model=model) as engine:
            requests = paper_shaped(engine, data, SET, 20, sizes.agreement, chosen.seed)
            found[name] = scored(engine, ["full"], requests, kept, RankOptions())["full"]
    metrics: dict[str, float] = {"num_requests_tau": len(found["fp32"])}
    rows = []
    for name in others():
        pairs = [(wide.scores, narrow.scores) for wide, narrow in zip(found["fp32"], found[name], strict=True)]
        close = [agreement(wide, narrow) for wide, narrow in pairs]
        shifts = np.abs([np.subtract(wide, narrow) for wide, narrow in pairs])
        agreed = statistics.mean(each.tau for each in close), statistics.mean(each.top1 for each in close)
        metrics |= {f"tau_{name}": agreed[0], f"top1_{name}": agreed[1]}
        metrics |= {f"max_shift_{name}": shifts.max(), f"mean_shift_{name}": shifts.mean()}
        rows.append([name, f"{agreed[0]:.4f}", f"{agreed[1]:.3f}", f"{shifts.max():.3f}", f"{shifts.mean():.4f}"])
    columns = ["against fp32", "Kendall τ", "top-1", "largest shift", "mean shift"]
    show(f"Label log-probabilities, untuned, {len(found['fp32'])} paper-shaped prompts, level full", columns, rows)
    return metrics


def strict(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Answers that are drafted and verified against those that are not, within a precision; equal token ids."""
    data, metrics = dataset("movielens_100k"), dict[str, float]()
    scenario = user_scenarios(data, sizes.texts, EARLIER)["new_users"]
    for name in others():
        console.print(name)
        found = exact(Workbench("user", TEXT_TOKENS, data, ModelConfig(**PRECISIONS[name])), scenario)
        metrics |= {f"{metric}_{name}": value for metric, value in found.items()}
    return metrics


def ndcg(variant: str, level: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Quality of a tuned ranker: paired differences to fp32, with 95 % intervals."""
    data = dataset(SETS[SET])
    requests = held_out(data, SET, "uniform", sizes.quality, chosen.seed)
    found = {}
    for name, model in PRECISIONS.items():
        many = variant == "blocks" and name in ("fp32", "bf16")
        with engine_of(variant, TEMPLATES[variant], data, chosen.seed, model=model) as engine:
            found[name] = scored(engine, [level], requests[: None if many else sizes.other_quality], kept)[level]
    at = f"{variant}_{SET}"
    metrics: dict[str, float] = {}
    rows = []
    for name, records in found.items():
        summary = summarise(records, found["fp32"][: len(records)])
        quality, delta = summary.measures["ndcg10"].mean, summary.deltas["ndcg10"]
        metrics |= {f"ndcg10_{name}_{at}": quality, f"num_requests_ndcg_{name}_{at}": len(records)}
        if name != "fp32":
            metrics |= {f"ndcg10_delta_{name}_{at}": delta.mean, f"ndcg10_delta_lo_{name}_{at}": delta.low}
            metrics |= {f"ndcg10_delta_hi_{name}_{at}": delta.high, f"tau_{name}_{at}": summary.measures["tau"].mean}
        apart = f"{delta.mean:+.4f} [{delta.low:+.4f}, {delta.high:+.4f}]"
        rows.append([name, f"{len(records)}", f"{quality:.4f}", apart, f"{summary.measures['tau'].mean:.4f}"])
    columns = ["products", "requests", "NDCG@10", "Δ fp32, 95 %", "Kendall τ"]
    show(f"{variant} mask, level {level}, held-out requests", columns, rows)
    return metrics


def recommend(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Quality of the committed decoder of semantic IDs: paired differences to fp32, with 95 % intervals."""
    test = cases(dataset("movielens_100k"), "test")[: sizes.quality]
    found = {name: measured(generated(DECODER, model, knn=0.0), test) for name, model in PRECISIONS.items()}
    metrics: dict[str, float] = {"num_requests_recommend": len(test)}
    rows = []
    for name, table in found.items():
        own, apart = bootstrap(table, seed=chosen.seed), bootstrap(table - found["fp32"], seed=chosen.seed)
        for measure, value, delta in zip(MEASURES, own, apart, strict=True):
            metrics[f"recommend_{measure}_{name}"] = value.mean
            if name != "fp32":
                at = f"{measure}_{name}"
                metrics |= {f"recommend_delta_{at}": delta.mean, f"recommend_delta_lo_{at}": delta.low}
                metrics[f"recommend_delta_hi_{at}"] = delta.high
        rows.append([name, *map(str, own), str(apart[-1])])
    show(f"Recommender, {len(test)} held-out users", ["products", *MEASURES, f"Δ fp32 of {MEASURES[-1]}"], rows)
    return metrics


def others() -> list[str]:
    return [name for name in PRECISIONS if name != "fp32"]


def decoders_of() -> dict[str, Decoder]:
    return {name: engine.decoder for name, engine in engines_of(dataset(SETS[SET])).items()}


def engines_of(data: Dataset) -> dict[str, Engine]:
    """One for each variant, over one prompter, so that a block has one key in every pool."""
    cache = CacheConfig(pool_mb=POOL_MB)
    built = {
        name: Engine.build(data.catalogue, Config(ModelConfig(**m), cache=cache)) for name, m in PRECISIONS.items()
    }
    prompter = built["fp32"].prompter
    return {name: Engine(e.config, e.decoder, prompter, e.pool, e.model_id) for name, e in built.items()}


def causal(num_tokens: int, decoder: Decoder, seed: int) -> Pass:
    ids = torch.randint(0, decoder.spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    return Pass(ids, torch.arange(num_tokens), (Group.causal(num_tokens),), wanted=torch.tensor([num_tokens - 1]))


def cached(decoder: Decoder, num_tokens: int) -> Segment:
    """KV of a prompt in the dtype that sequences keep it in; times depend on no value."""
    spec = decoder.spec
    shape = (spec.num_layers, 2, spec.num_kv_heads, num_tokens, spec.head_dim)
    return Segment(torch.randn(shape).to(decoder.sequence_dtype), 0, 0, num_tokens, 0)


def by_turns(works: Mapping[str, Callable[[], object]], rounds: int, times: dict[str, list[float]]) -> None:
    """Adds the seconds that each takes to `times`; who begins rotates, and one round before does not count."""
    for number, turn in zip(range(rounds + 1), turns(works), strict=False):
        for name in turn:
            seconds, _ = timed(lambda work: work(), works[name])
            if number:
                times[name].append(seconds)


def floor_ratio(name: str, decoder: Decoder, work: Pass, sizes: Sizes) -> float:
    """Forward pass over its floor, by the rate of its products and the bandwidth of now."""
    rate = measure_gemm(len(work.token_ids), decoder.spec, PRODUCTS[name]) * 1e9
    floor = floor_seconds(decoder.spec, work, rate, measure_bandwidth())
    decoder.forward(work)
    took = statistics.median(timed(decoder.forward, work)[0] for _ in range(max(3, sizes.rounds)))
    return took / floor


def summed(
    part: str, times: Mapping[str, Sequence[float]], floor_ratios: Mapping[str, float], seed: int
) -> dict[str, float]:
    """Medians in ms, speed-ups over fp32 by pairs, and ratios to the floors where there are some."""
    metrics: dict[str, float] = {f"{part}_floor_ratio_{name}": ratio for name, ratio in floor_ratios.items()}
    rows = []
    for name, own in times.items():
        paired = [wide / narrow for wide, narrow in zip(times["fp32"], own, strict=True)]
        speedup, [mean] = statistics.median(paired), bootstrap([[value] for value in paired], seed=seed)
        metrics[f"{part}_ms_{name}"] = statistics.median(own) * 1e3
        if name != "fp32":
            metrics |= {f"{part}_speedup_{name}": speedup, f"{part}_speedup_mean_{name}": mean.mean}
            metrics |= {f"{part}_speedup_lo_{name}": mean.low, f"{part}_speedup_hi_{name}": mean.high}
        over = f"{floor_ratios[name]:.2f}" if name in floor_ratios else "–"
        interval = f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}]"
        rows.append([name, f"{metrics[f'{part}_ms_{name}']:.1f}", f"{speedup:.2f}", interval, over])
    show(part, ["products", "P50 ms", "speed-up, paired P50", "paired mean", "forward / floor"], rows)
    return metrics


PARTS: dict[str, Callable[[Sizes, Options, RecordFile], dict[str, float]]] = {
    "blocks": blocks,
    "prefill": prefill,
    "decode": decode,
    "peers": peers,
    "beam": beam,
    "tau": tau,
    "strict": strict,
    "ndcg": partial(ndcg, "blocks", "blocks"),
    "ndcg_causal": partial(ndcg, "causal", "full"),
    "recommend": recommend,
}


if __name__ == "__main__":
    main()
