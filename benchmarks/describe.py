"""How much faster are users and items described by drafting from earlier answers, and what is the text then worth?

Regime: SmolLM2-135M-Instruct in fp32 on the CPU, greedy, real profiles; plain, strict, relaxed(2, 0.1) and, as `wide`,
relaxed(5, 0.02) decoding in turns on the same prompts in one run, each from pools of its own. Scenarios: `refresh`
(DARE's own setting, and a nightly job's: the pool holds this model's answers about other users, and about each user
without the latest choice), `new_users` (about others alone), `knowledge` and `knowledge_refresh` (the same two for
items of `knowledge/`; the pool holds the summaries of the set as well). No pool holds an answer to a measured prompt.

`speedup_…`: tokens/s of decoding, after the prompt, as the papers count; `job_speedup_…`: prompts included. Unsuffixed
metrics are of `refresh`. Ceiling: every pass reads all weights once, so plain decoding at batch 1 makes no more
tokens/s than bandwidth / bytes of weights; speculation multiplies that by the tokens per pass at best.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.describe_drafts import MakeDrafter, Text, learned, reading, simulate
from benchmarks.describe_setup import (
    MAX_EVENTS,
    NONE,
    RELAXED,
    STRICT,
    WIDE,
    Answered,
    Scenario,
    Workbench,
    knowledge_scenarios,
    user_profile,
    user_scenarios,
)
from benchmarks.harness import Options, console, dataset, options, run_parts, show, timed, transformers_model
from rcllm.core.decoding import Generated
from rcllm.core.ranking import ItemId, UserId
from rcllm.data import Dataset
from rcllm.describe.clicks import Clicks, ClicksConfig, make_clicks
from rcllm.describe.profiles import Profile, items
from rcllm.describe.quality import Knowledge, Worth, worth
from rcllm.describe.writer import GeneratorWriter, make_router, to_route
from rcllm.drafts.draft import PromptLookup
from rcllm.drafts.groups import one_group
from rcllm.engine.jobs.generate import MAX_NODES
from rcllm.errors import answered
from rcllm.model.ceilings import measure_bandwidth
from rcllm.model.pull import pull
from rcllm.sid.embed import SentenceEncoder, fetch_minilm

QUESTION = (
    "Tokens/s of strict and relaxed speculation over plain decoding, and what relaxed text is worth to a click model"
)
SCENARIOS = ("refresh", "new_users", "knowledge", "knowledge_refresh")
PARTS = (*SCENARIOS, "exact", "cold", "groups", "hf", "ctr")
MODES = {"plain": NONE, "strict": STRICT, "relaxed": RELAXED, "wide": WIDE}
HEADLINE = "refresh"
PROMPT_STAGES = ("plan", "materialise", "select", "forward", "publish", "join")  # of passes that hold prompts


@dataclasses.dataclass(frozen=True)
class Sizes:
    max_tokens: int
    earlier: int  # profiles whose answers fill the pools
    knowledge: int  # the same, of the knowledge scenarios
    tested: Mapping[int, int]  # profiles measured at each batch size
    exact: int
    cold: int
    peer: int
    clicks: ClicksConfig


FULL = Sizes(100, 120, 2000, {1: 24, 4: 16, 16: 32}, 200, 6, 6, ClicksConfig(users=300, items=150))
QUICK = Sizes(32, 16, 16, {1: 2, 4: 4, 16: 16}, 16, 2, 2, ClicksConfig(users=20, items=12, targets=2, negatives=2))


def main() -> None:
    chosen = options("describe", QUESTION, PARTS)
    sizes = QUICK if chosen.quick else FULL
    data = dataset("movielens_100k")
    bench = Workbench("user", sizes.max_tokens, data)
    scenarios = user_scenarios(data, max(sizes.tested.values()), sizes.earlier)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        **{name: partial(decoding, bench, name, scenarios, sizes) for name in SCENARIOS},
        "cold": lambda: cold(bench, scenarios[HEADLINE].tested[: sizes.cold]),
        "hf": lambda: peer(bench, scenarios[HEADLINE], sizes.peer),
        "exact": lambda: exact(bench, user_scenarios(data, sizes.exact, sizes.earlier)["new_users"]),
        "groups": lambda: groups(bench, scenarios["new_users"], chosen),
        "ctr": lambda: clicks(bench, make_clicks(data, replace(sizes.clicks, seed=chosen.seed)), sizes),
    }
    run_parts("describe", QUESTION, chosen, parts, slow=[name for name in SCENARIOS if name != HEADLINE])


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Spent:
    """Of one way over all its calls."""

    tokens: int = 0  # that passes decided: without the first of each answer, which the prompt's pass gives
    answers: int = 0
    passes: int = 0  # of answers: a pass of a batch counts for each
    diverged: int = 0
    wall_s: float = 0.0
    prompt_s: float = 0.0

    def add(self, wall_s: float, found: Sequence[Generated]) -> None:
        """Of one call of `generate`, whose requests entered together."""
        self.tokens += sum(len(each.token_ids) - 1 for each in found)
        self.answers += len(found)
        self.passes += sum(each.receipt.passes for each in found)
        self.diverged += sum(len(each.receipt.divergences) for each in found)
        self.wall_s += wall_s
        self.prompt_s += (
            max(sum(each.receipt.stage_ms.get(stage, 0.0) for stage in PROMPT_STAGES) for each in found) / 1e3
        )

    @property
    def decode_rate(self) -> float:
        return self.tokens / (self.wall_s - self.prompt_s)

    @property
    def job_rate(self) -> float:
        return (self.tokens + self.answers) / self.wall_s


def run(writer: GeneratorWriter, profiles: Sequence[Profile], spent: Spent) -> list[Generated]:
    requests = writer.requests(profiles, [0] * len(profiles))
    took, found = timed(writer.generator.generate, requests)
    answers = answered(found)
    spent.add(took, answers)
    return answers


def decoding(bench: Workbench, name: str, scenarios: Mapping[str, Scenario], sizes: Sizes) -> dict[str, float]:
    """Of one scenario; metrics bear its name, but for the headline's. Empty where its data are not here."""
    if name == HEADLINE:
        return {**floor(bench), **speed(bench, scenarios[name], sizes)}
    if name not in scenarios:
        scenarios = knowledge_scenarios(max(sizes.tested.values()), sizes.knowledge)
        bench = Workbench("item", sizes.max_tokens, bench.data)
    found = speed(bench, scenarios[name], sizes) if name in scenarios else {}
    return {f"{key}_{name}": value for key, value in found.items()}


def speed(bench: Workbench, scenario: Scenario, sizes: Sizes) -> dict[str, float]:
    metrics: dict[str, float] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="rcllm-pools-") as folder:
        pools = bench.warm_pools(scenario, Path(folder) / "pools")
        for batch, count in sizes.tested.items():
            found = interleaved(bench, pools, scenario.tested[:count], batch)
            plain = found["plain"]
            for mode, spent in found.items():
                length = spent.tokens / spent.passes
                over = {
                    "speedup": spent.decode_rate / plain.decode_rate,
                    "job_speedup": spent.job_rate / plain.job_rate,
                }
                metrics[f"tokens_per_s_{mode}_b{batch}"] = spent.decode_rate
                if mode != "plain":
                    metrics |= {f"{name}_{mode}_b{batch}": value for name, value in over.items()}
                    metrics[f"accepted_length_{mode}_b{batch}"] = length
                    metrics[f"diverged_share_{mode}_b{batch}"] = spent.diverged / spent.tokens
                row = [f"{mode}, batch {batch}", str(spent.answers), f"{spent.decode_rate:.1f}", f"{length:.2f}"]
                row += [
                    f"{over['speedup']:.2f}×",
                    f"{over['job_speedup']:.2f}×",
                    f"{spent.diverged / spent.tokens:.1%}",
                ]
                rows.append(row)
    for mode in list(MODES)[1:]:
        metrics[f"accepted_length_mean_{mode}"] = metrics[f"accepted_length_{mode}_b1"]
    metrics["accepted_length_mean"] = metrics["accepted_length_mean_strict"]
    columns = ["way", "answers", "tokens/s", "tokens a pass", "over plain", "with prompts", "diverged"]
    show(f"Decoding, scenario {scenario.name}: {len(scenario.earlier)} earlier answers", columns, rows)
    return metrics


def interleaved(bench: Workbench, pools: Path, profiles: Sequence[Profile], batch: int) -> dict[str, Spent]:
    """All modes on the same batches in turns, who is first changing; after one batch that does not count."""
    writers = {mode: bench.writer(speculation, batch, pools) for mode, speculation in MODES.items()}
    spent = {mode: Spent() for mode in MODES}
    warm_up = [replace(profile, row=profile.row + 10**7) for profile in profiles[:1]]
    for writer in writers.values():
        run(writer, warm_up, Spent())
        if writer.pools is not None:
            writer.load(pools)  # forgets it
    for number, start in enumerate(range(0, len(profiles), batch)):
        some = profiles[start : start + batch]
        at = number % len(MODES)
        order = list(MODES)[at:] + list(MODES)[:at]
        for mode in order:
            for profile in some:  # no mode finds the prompt that another one computed
                bench.engine.erase_user(UserId(profile.name))
            run(writers[mode], some, spent[mode])
    return spent


def floor(bench: Workbench) -> dict[str, float]:
    """Tokens/s that reading the weights once a pass allows at batch 1."""
    decoder = bench.engine.decoder
    weights = decoder.spec.linear_flops_per_token / 2 + decoder.spec.vocab_size * decoder.spec.hidden_size
    num_bytes = weights * decoder.dtype.itemsize
    ceiling = measure_bandwidth(decoder.device) / num_bytes
    console.print(f"{num_bytes / 1e6:.0f} MB of weights a pass: at most {ceiling:.1f} plain tokens/s at batch 1\n")
    return {"floor_tokens_per_s_b1": ceiling}


# ---- what must be so -------------------------------------------------------------------------------------------------


def exact(bench: Workbench, scenario: Scenario) -> dict[str, float]:
    """Share of prompts whose strict answer has the token ids of the plain one."""
    profiles = scenario.tested
    answers: list[list[Generated]] = []  # none is a kept one: both ways are decoded by the same kernels
    with tempfile.TemporaryDirectory(prefix="rcllm-pools-") as folder:
        pools = bench.warm_pools(scenario, Path(folder) / "pools")
        run(bench.writer(NONE, 1), scenario.earlier[:1], Spent())  # both ways find the instruction in the cache
        for speculation in (NONE, STRICT):
            for profile in profiles:  # a history that is read back was rounded to fp16 (docs/numerics.md)
                bench.engine.erase_user(UserId(profile.name))
            answers.append(run(bench.writer(speculation, 16, pools), profiles, Spent()))
    equal = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
    share = statistics.mean(equal)
    console.print(f"strict answers equal to plain ones: {sum(equal)} of {len(equal)} ({share:.1%})\n")
    return {"strict_equal_share": share, "strict_equal_prompts": len(equal)}


def cold(bench: Workbench, profiles: Sequence[Profile]) -> dict[str, float]:
    """Time of strict over plain decoding where the pool is empty, greedy and drawn: draws hardly repeat themselves."""
    metrics: dict[str, float] = {}
    for name, temperature in (("", 0.0), ("_sampled", 1.2)):
        with tempfile.TemporaryDirectory(prefix="rcllm-pools-") as folder:
            empty = Path(folder) / "pools"
            bench.writer(STRICT, 1).save(empty)
            writers = {
                mode: GeneratorWriter(bench.engine, replace(bench.options(mode, 1), temperature=temperature))
                for mode in (NONE, STRICT)
            }
            ratios = []
            for number, profile in enumerate([profiles[-1], *profiles]):  # the first does not count
                took = {}
                for mode in (NONE, STRICT) if number % 2 else (STRICT, NONE):
                    writers[mode].load(empty)
                    bench.engine.erase_user(UserId(profile.name))
                    spent = Spent()
                    run(writers[mode], [profile], spent)
                    took[mode] = 1 / spent.decode_rate
                ratios.append(took[STRICT] / took[NONE] - 1)
        metrics[f"cold_pool_overhead{name}"] = statistics.median(ratios[1:])
    told = ", ".join(f"{name} {value:+.1%}" for name, value in metrics.items())
    console.print(f"strict with an empty pool against plain decoding, {len(profiles)} prompts: {told}\n")
    return metrics


def groups(bench: Workbench, scenario: Scenario, chosen: Options) -> dict[str, float]:
    """Tokens per pass of strict verification from pools per group, one pool and the prompt, at equal memory."""
    profiles = (*scenario.tested[:100], *scenario.earlier)
    writer = bench.writer(NONE, 1)
    catalogue = bench.data.catalogue
    texts = [
        Text(to_route(profile, "user", catalogue), writer.prompt_ids(profile), answer.token_ids)
        for profile, answer in zip(profiles, bench.answers(profiles, NONE), strict=True)
    ]
    router = make_router(profiles, catalogue, 2 if chosen.quick else 8, chosen.seed)
    tests = [text for text in texts if text.tests]
    whole = sum(len(text.answer) + 4 for text in texts if not text.tests)
    ways: dict[str, MakeDrafter] = {"prompt_lookup": lambda text: PromptLookup()}
    for share in (1.0, 0.25):  # of the tokens of all answers, over all pools
        for label, each in (("one_pool", one_group()), ("grouped", router)):
            ways[f"{label}_{share:.0%}".replace("%", "pct")] = reading(learned(each, texts, round(whole * share)))
    found = {way: simulate(make, tests, MAX_NODES).tokens_per_step for way, make in ways.items()}
    rows = [[way, f"{value:.2f}"] for way, value in found.items()]
    title = (
        f"Tokens per pass by where drafts come from; {len(tests)} answers, pools of {len(texts) - len(tests)} others"
    )
    show(title, ["drafts from", f"{MAX_NODES} nodes"], rows)
    return {f"tokens_per_pass_{way}": value for way, value in found.items()}


# ---- a peer ----------------------------------------------------------------------------------------------------------


def peer(bench: Workbench, scenario: Scenario, count: int) -> dict[str, float]:
    """Our strict decoding and Hugging Face's prompt lookup: same prompts and weights, batch 1, prompts included."""
    folder = pull(bench.engine.config.model.path)
    theirs = transformers_model(folder)
    seconds, tokens, equal = defaultdict[str, float](float), defaultdict[str, int](int), list[bool]()
    with tempfile.TemporaryDirectory(prefix="rcllm-pools-") as name:
        writer = bench.writer(STRICT, 1, bench.warm_pools(scenario, Path(name) / "pools"))
        run(writer, scenario.tested[-1:], Spent())
        for profile in scenario.tested[:count]:
            bench.engine.erase_user(UserId(profile.name))
            prompt = torch.tensor([writer.prompt_ids(profile)])
            took_ours, found = timed(writer.generator.generate, writer.requests([profile], [0]))
            [ours] = answered(found)
            took_lookup, lookup = timed(partial(generated, theirs, lookup=10, most=bench.max_tokens), prompt)
            took_plain, plain = timed(partial(generated, theirs, lookup=None, most=bench.max_tokens), prompt)
            spent = {"ours": took_ours, "prompt lookup": took_lookup, "plain": took_plain}
            for way, took in spent.items():
                seconds[way] += took
            for way, count in zip(spent, (len(ours.token_ids), len(lookup), len(plain)), strict=True):
                tokens[way] += count
            equal.append(list(ours.token_ids) == plain)
    rate = {way: tokens[way] / took for way, took in seconds.items()}
    rows = [[way, f"{rate[way]:.1f}", f"{rate['ours'] / rate[way]:.2f}×"] for way in rate]
    show(
        f"Against Hugging Face generate, {len(equal)} prompts, prompts included",
        ["way", "tokens/s", "ours over it"],
        rows,
    )
    return {
        "speedup_vs_hf_prompt_lookup": rate["ours"] / rate["prompt lookup"],
        "speedup_vs_hf_plain": rate["ours"] / rate["plain"],
        "hf_equal_share": statistics.mean(equal),
    }


@torch.inference_mode()
def generated(model: torch.nn.Module, prompt: torch.Tensor, *, most: int, lookup: int | None) -> list[int]:
    more = {"prompt_lookup_num_tokens": lookup} if lookup else {}
    seen = torch.ones_like(prompt)
    found = model.generate(  # type: ignore[operator]
        prompt, attention_mask=seen, max_new_tokens=most, do_sample=False, pad_token_id=0, **more
    )
    ids: list[int] = found[0, prompt.shape[1] :].tolist()
    return ids


# ---- quality ---------------------------------------------------------------------------------------------------------


def clicks(bench: Workbench, pairs: Clicks, sizes: Sizes) -> dict[str, float]:
    """A click model without knowledge, with strict and with relaxed text about users and items.

    Besides, of each way, how much answers repeat themselves: that relaxed ones follow their drafts makes them loop.
    """
    encoder = SentenceEncoder.load(fetch_minilm())
    users = [
        user_profile(2 * 10**6 + n, user, pairs.histories[n][-MAX_EVENTS:]) for n, user in enumerate(pairs.user_ids)
    ]
    item_bench = Workbench("item", sizes.max_tokens, bench.data)
    read = items(item_bench.engine.prompter.template.event)
    rows = [read(n, item_row(bench.data, item_id)) for n, item_id in enumerate(pairs.item_ids)]
    ways: dict[str, Worth] = {"without": worth(pairs, None)}
    loops: dict[str, float] = {}
    for name, speculation in {"strict": NONE, "relaxed": RELAXED, "wide": WIDE}.items():  # strict: see part `exact`
        # relaxed ones are drafted from this job's own earlier answers, as a first run of `rcllm describe` does
        answers = [side.answers(profiles, speculation) for side, profiles in ((bench, users), (item_bench, rows))]
        ways[name] = worth(pairs, Knowledge(*(encoder.encode([each.text for each in side]) for side in answers)))
        loops[name] = statistics.mean(repeated(each) for side in answers for each in side)
    metrics: dict[str, float] = {"ctr_held_out_users": float(pairs.held_out.sum()), "ctr_pairs": len(pairs.users)}
    metrics |= {f"repeated_share_{name}": share for name, share in loops.items()}
    table = []
    for name, way in ways.items():
        auc, loss = way.gain_over(ways["without"])
        over_strict, loss_over_strict = way.gain_over(ways["strict"])
        metrics |= {
            f"ctr_auc_{name}": way.auc,
            f"ctr_gauc_{name}": way.gauc.mean,
            f"ctr_logloss_{name}": way.log_loss.mean,
        }
        if name != "without":
            metrics |= {f"ctr_gauc_gain_{name}{end}": value for end, value in ends(auc)}
        if name not in ("without", "strict"):
            metrics |= {f"ctr_gauc_{name}_minus_strict{end}": value for end, value in ends(over_strict)}
            metrics |= {f"ctr_logloss_{name}_minus_strict{end}": value for end, value in ends(loss_over_strict)}
        told = f"{loops[name]:.1%}" if name in loops else ""
        table.append([name, f"{way.auc:.4f}", str(way.gauc), str(way.log_loss), str(auc), str(loss), told])
    columns = ["knowledge", "AUC", "AUC per user", "log-loss", "Δ AUC per user", "Δ log-loss", "repeated"]
    show(f"Click model, {int(pairs.held_out.sum())} held-out users, {len(pairs.users)} pairs in all", columns, table)
    return metrics


def repeated(answer: Answered, length: int = 4) -> float:
    """Share of its runs of `length` tokens that it had already."""
    runs = [answer.token_ids[at : at + length] for at in range(len(answer.token_ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def item_row(data: Dataset, item_id: ItemId) -> dict[str, object]:
    return {"item_id": item_id, **data.catalogue[item_id].fields}


def ends(interval: object) -> list[tuple[str, float]]:
    return [(end, float(getattr(interval, name))) for end, name in (("", "mean"), ("_lo", "low"), ("_hi", "high"))]


if __name__ == "__main__":
    main()
