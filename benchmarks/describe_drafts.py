"""What do draft pools propose, and in what time, on real knowledge texts? Without a model.

Regime: a model whose greedy answers are the user and item summaries of `knowledge/` (XRec, by a language model),
split 80 : 20 by hash of the id. A test answer is drafted from pools of the training answers; its prompt holds titles
alone. No log knows the ids of these files (one title in ten is in the Yelp log), so the groups stand in for
collaborative ones: clusters of the words about the other side, the items that a user chose or the users of an item.
Ceiling: `branch` + 1 tokens a step.
Measured: tokens per forward pass (accepted drafts and the model's own token), at several tree sizes, for pools per
group, one pool of equal memory, prompt lookup, and a pool that begins empty; and the time of a look-up.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import Normalizer

from benchmarks.harness import SHARED, options, report, show
from rcllm.core.ranking import TokenIds
from rcllm.drafts.draft import Drafter, DraftTree, PromptLookup
from rcllm.drafts.folder import DraftPools
from rcllm.drafts.groups import GroupOptions, Kind, Member, Router, build_router, one_group
from rcllm.drafts.pool_drafter import PoolDrafter
from rcllm.drafts.suffix_pool import DraftPoolLimits, SuffixPool
from rcllm.model.pull import pull
from rcllm.prompt.tokenizer import Tokenizer

QUESTION = "Tokens per forward pass by pools per group, one pool, prompt lookup; time of a look-up"
TREE_SIZES = (4, 8, 16, 32, 64)
GROUPS = 8
FIELDS: Mapping[Kind, tuple[str, str]] = {"user": ("uid", "user_summary"), "item": ("iid", "item_summary")}
MODEL = "smollm2-135m-instruct"
LEAD = "\nassistant\n"  # how the prompts end
FINGERPRINT = "drafts"
_READERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Text:
    profile: Member
    prompt: TokenIds
    answer: TokenIds

    @property
    def tests(self) -> bool:
        return blake3(self.profile.profile_id.encode()).digest()[0] % 5 == 0


@dataclass(frozen=True, slots=True)
class Simulated:
    tokens_per_step: float
    lookup_us: float  # median
    lookup_p95_us: float


MakeDrafter = Callable[[Text], Drafter]


def knowledge(name: str, kind: Kind, tokenizer: Tokenizer, seed: int) -> list[Text]:
    """One text per user or item of a file, its first; the profile's attribute is its cluster."""
    id_field, text_field = FIELDS[kind]
    other_field = FIELDS["item" if kind == "user" else "user"][1]
    texts: dict[str, str] = {}
    titles: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    with (SHARED / "knowledge" / f"xrec_{name}_tst.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            text_id = str(row[id_field])
            texts.setdefault(text_id, row[text_field])
            titles[text_id].append(row["title"])
            others[text_id].append(row[other_field])
    labels = clusters([" ".join(others[text_id]) for text_id in texts], seed)
    return [
        Text(
            Member(kind, text_id, (), (label,)),
            tokenizer.encode("; ".join(titles[text_id]) + LEAD),
            tokenizer.encode(text),
        )
        for (text_id, text), label in zip(texts.items(), labels, strict=True)
    ]


def clusters(words: Sequence[str], seed: int) -> list[str]:
    """A cluster for each text, by its words."""
    frequencies = TfidfVectorizer(stop_words="english", min_df=3).fit_transform(words)
    vectors = Normalizer().fit_transform(TruncatedSVD(32, random_state=seed).fit_transform(frequencies))
    return [str(label) for label in KMeans(GROUPS, n_init=4, random_state=seed).fit_predict(vectors)]


def learned(router: Router, texts: Sequence[Text], max_tokens: int) -> DraftPools:
    """Pools of all training texts; `max_tokens` for all of them together."""
    groups = {router.route(text.profile) for text in texts}
    pools = DraftPools.create(router, FINGERPRINT, limits=DraftPoolLimits(max(max_tokens // len(groups), 1)))
    for text in texts:
        if not text.tests:
            pools.learn(text.profile, (*text.prompt[-4:], *text.answer))
    for group in groups:
        pools.pool(group).compact()
    return pools


def accepted(tree: DraftTree, rest: TokenIds) -> int:
    """How many of the tree's tokens `rest` begins with, along one path."""
    children = {
        (parent, token): i + 1
        for i, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True))
    }
    node = 0
    for n, token in enumerate(rest):
        if (node, token) not in children:
            return n
        node = children[node, token]
    return len(rest)


def simulate(make: MakeDrafter, texts: Sequence[Text], max_nodes: int) -> Simulated:
    """Decodes every text, each step as far as its draft goes, and one token further."""
    steps = tokens = 0
    times = []
    for text in texts:
        drafter, done = make(text), 0
        while done < len(text.answer):
            start = time.thread_time()  # look-ups do nothing but compute
            tree = drafter.draft(text.prompt + text.answer[:done], max_nodes)
            times.append((time.thread_time() - start) * 1e6)
            step = min(accepted(tree, text.answer[done:]) + 1, len(text.answer) - done)
            drafter.observe(text.answer[done : done + step])
            done, steps = done + step, steps + 1
        drafter.finish()
        tokens += len(text.answer)
    return Simulated(tokens / steps, statistics.median(times), statistics.quantiles(times, n=20)[-1])


def reading(pools: DraftPools) -> MakeDrafter:
    """Drafters that leave the pools as they are: each answer is the private one of a reader who comes but once."""
    return lambda text: PoolDrafter(
        pools.pool(pools.router.route(text.profile)), text.prompt, f"reader {next(_READERS)}", private=True
    )


def measure(model_folder: Path, *, quick: bool, seed: int) -> dict[str, float]:
    """Metrics by name; prints a table for each kind of text."""
    tokenizer = Tokenizer.load(model_folder)
    metrics: dict[str, float] = {}
    for name in ("yelp",) if quick else ("yelp", "amazon", "google"):
        for kind in FIELDS:
            texts = knowledge(name, kind, tokenizer, seed)
            found = compared(texts, max_tests=16 if quick else 60)
            rows = [
                [way, *(f"{value.tokens_per_step:.2f}" for value in found[way]), *us(found[way][-1])] for way in found
            ]
            columns = ["drafts from", *(f"{n} nodes" for n in TREE_SIZES), "look-up, µs", "p95"]
            show(f"{name}, {kind} texts: tokens per forward pass", columns, rows)
            for way, values in found.items():
                key = f"{name}_{kind}_{way}"
                metrics |= {f"{key}_{n}": v.tokens_per_step for n, v in zip(TREE_SIZES, values, strict=True)}
                metrics[f"{key}_lookup_us"] = values[-1].lookup_us
    return metrics | scale(knowledge("yelp", "user", tokenizer, seed), 100_000 if quick else 1_000_000)


def compared(texts: Sequence[Text], max_tests: int) -> dict[str, list[Simulated]]:
    """By way of drafting: the result at each tree size."""
    tests = [text for text in texts if text.tests][:max_tests]
    whole = sum(len(text.answer) + 4 for text in texts if not text.tests)
    grouped = build_router({}, [text.profile for text in texts], GroupOptions(GROUPS))
    makes: dict[str, Callable[[], MakeDrafter]] = {"prompt_lookup": lambda: lambda text: PromptLookup()}
    for label, router in (("one_pool", one_group()), ("grouped", grouped)):
        makes[label] = partial(reading, learned(router, texts, GROUPS * whole))  # all fits
        makes[f"{label}_25pct"] = partial(reading, learned(router, texts, whole // 4))
    makes["begins_empty"] = begins_empty
    return {way: [simulate(make(), tests, n) for n in TREE_SIZES] for way, make in makes.items()}


def begins_empty() -> MakeDrafter:
    """One pool that knows nothing but the test answers before each."""
    pool = SuffixPool.create(FINGERPRINT)
    return lambda text: PoolDrafter(pool, text.prompt)


def scale(texts: Sequence[Text], num_tokens: int) -> dict[str, float]:
    """Time of a look-up in a pool of `num_tokens`: the training texts over and over, of many owners."""
    pool = SuffixPool.create(FINGERPRINT, limits=DraftPoolLimits(2 * num_tokens, 2 * num_tokens))
    train, number = [text for text in texts if not text.tests], 0
    while pool.num_tokens < num_tokens:
        pool.learn(train[number % len(train)].answer, str(number))
        number += 1
    start = time.perf_counter()
    pool.compact()
    build_s = time.perf_counter() - start
    tests = [text for text in texts if text.tests][:50]
    found = simulate(lambda text: PoolDrafter(pool, text.prompt, text.profile.profile_id, private=True), tests, 64)
    show(
        f"One pool of {pool.num_tokens:,} tokens",
        ["bytes a token", "build, µs a token", "look-up, µs", "p95"],
        [[f"{pool.index.num_bytes / pool.num_tokens:.1f}", f"{build_s / pool.num_tokens * 1e6:.2f}", *us(found)]],
    )
    return {
        "large_pool_tokens": pool.num_tokens,
        "large_pool_bytes_per_token": pool.index.num_bytes / pool.num_tokens,
        "large_pool_build_us_per_token": build_s / pool.num_tokens * 1e6,
        "large_pool_lookup_us": found.lookup_us,
        "large_pool_lookup_p95_us": found.lookup_p95_us,
    }


def us(value: Simulated) -> list[str]:
    return [f"{value.lookup_us:.0f}", f"{value.lookup_p95_us:.0f}"]


def main() -> None:
    chosen = options("describe_drafts", QUESTION)
    report("describe_drafts", QUESTION, chosen, measure(pull(MODEL), quick=chosen.quick, seed=chosen.seed))


if __name__ == "__main__":
    main()
