"""Are answers still the same, to the bit? Records what this checkout answers, and compares two recordings.

    python scripts/answers.py record before.jsonl        (again after a change, into after.jsonl)
    python scripts/answers.py compare before.jsonl after.jsonl

200 requests of each job, real viewers of MovieLens-100K: rankings at every level and 40 of each variant, wide beams
over random semantic IDs, text plain and with strict drafts. Bits hold for one machine and the compiled kernels alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rcllm import (
    Config,
    Engine,
    Event,
    GenerateOptions,
    GenerateRequest,
    Generator,
    Level,
    ModelConfig,
    PromptConfig,
    RankOptions,
    RecommendRequest,
    Selection,
    build_requests,
)
from rcllm.data import fetch_movielens
from rcllm.fetch import cache_dir
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import save_model
from rcllm.sid.network import NetworkConfig
from rcllm.sid.vocabulary import Vocabulary

COUNT, FEW = 200, 40
LEVELS = ("full", "exact", "corrected(0.3, 0.3)", "linked(4)", "linked(16)", "tail(0.3)", "blocks")
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "pointwise": {"readout": "pointwise", "level": "blocks"},
    "pointwise-tail": {"readout": "pointwise", "level": "tail(0.3)"},
    "likelihood": {"readout": "likelihood", "level": "blocks"},
    "items-first": {"layout": "items_first", "level": "blocks"},
    "parallel": {"layout": "items_first", "parallel": True, "level": "blocks"},
    "before": {"label_place": "before", "level": "linked(4)"},
    "chain": {"history": "chain", "level": "exact"},
    "content-free": {"bias": "content_free", "level": "blocks"},
    "two-pass": {"level": "corrected(0.2, 0.1)", "selection": {"policy": "two_pass"}},
    "static": {"level": "corrected(0.2, 0.1)", "selection": {"policy": "static"}},
    "check-layer": {"level": "corrected(0.2, 0.1)", "selection": {"policy": "k_difference", "check_layer": 2}},
}


def find(*places: str) -> Any:
    """The first of `module:name` that this checkout has: names outlive the modules that they live in."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(places)}")


def rankings(data: Any) -> Iterator[dict[str, object]]:
    adapter = Path(__file__).resolve().parents[1] / "adapters" / "smollm2-135m-blocks"
    requests = build_requests(data, COUNT, 10, 6, split="train", seed=7)
    engine = Engine.build(data.catalogue, Config(prompt=PromptConfig("movies")))

    def answers(engine: Any, name: str, some: Sequence[Any], options: Any) -> Iterator[dict[str, object]]:
        for start in range(0, len(some), 4):
            batch = [replace(each, options=options) for each in some[start : start + 4]]
            for response in engine.rank_batch(batch):
                scores = [float(score).hex() for score in response.scores]
                yield {"job": f"rank {name}", "id": response.request_id, "order": response.order, "scores": scores}

    for level in LEVELS:
        yield from answers(engine, level, requests, RankOptions(Level.parse(level)))
    for name, given in VARIANTS.items():
        values: dict[str, Any] = dict(given) | {"level": Level.parse(str(given["level"]))}
        if "selection" in values:
            values["selection"] = Selection(**values["selection"])
        yield from answers(engine, name, requests[:FEW], RankOptions(**values))
    tuned = Config(ModelConfig(adapter=str(adapter)), PromptConfig("echo"))
    engine = Engine.build(dict(data.catalogue), tuned)  # of which no field is made, as it was when recording began
    for level in ("blocks", "full"):
        options = RankOptions(Level(level), readout="pointwise")
        yield from answers(engine, f"mask {level}", requests[:FEW], options)


def recommendations(data: Any) -> Iterator[dict[str, object]]:
    index = find("rcllm.codes.index:CodeIndex", "rcllm.decode.catalog:Catalog")
    sizes, rng, item_ids = (64, 64, 64), np.random.default_rng(3), list(data.catalogue)
    codes = np.stack([rng.integers(0, size, len(item_ids), dtype=np.int32) for size in sizes], axis=1)
    config = NetworkConfig()
    network = find("rcllm.sid.network:CodeNetwork", "rcllm.sid.network:Network")(
        config, hf_config := config.hf_config(len(Vocabulary(sizes)), 2048)
    )
    network.reset(3)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), network.state_dict(), hf_config, index.build(codes, item_ids, sizes), {})
        recommender = load_recommender(Config(ModelConfig(path=folder)))
    for start in range(0, COUNT, 4):
        batch = []
        for number in range(start, start + 4):
            history = tuple(Event(item_ids[i]) for i in rng.integers(0, len(item_ids), 20).tolist())
            deny = tuple(item_ids[i] for i in rng.integers(0, len(item_ids), 50).tolist())
            rule = "mask" if number % 3 else "renormalise"
            batch.append(
                RecommendRequest(f"r{number}", history, n=20, beam=(16, 64, 128)[start % 3], rule=rule, deny=deny)
            )
        for answer in recommender.recommend_batch(batch):
            scores = [float(score).hex() for score in answer.scores]
            yield {"job": "recommend", "id": answer.request_id, "items": answer.items, "scores": scores}


def texts(data: Any) -> Iterator[dict[str, object]]:
    speculation = find("rcllm.core.decoding:Speculation", "rcllm.decoding:Speculation")
    suffix_pool = find("rcllm.drafts.suffix_pool:SuffixPool", "rcllm.decode.suffix_pool:SuffixPool")
    drafter_type = find("rcllm.drafts.pool_drafter:PoolDrafter", "rcllm.decode.pool_drafter:PoolDrafter")
    engine = Engine.build(data.catalogue, Config(prompt=PromptConfig("describe_user")))
    requests = build_requests(data, COUNT, 2, 6, split="train", seed=11)
    pool = suffix_pool.create("answers")

    def drafter(request: Any, prompt: Sequence[int]) -> Any:
        return drafter_type(pool, prompt)

    for name in ("none", "strict"):
        options = GenerateOptions(max_tokens=24, speculation=speculation(name))
        asked = [GenerateRequest(each.request_id, each.history, None, options) for each in requests]
        for answer in Generator(engine, drafter, batch_size=16).generate(asked):
            yield {"job": f"generate {name}", "id": answer.request_id, "tokens": answer.token_ids, "text": answer.text}


def record(out: Path, jobs: Sequence[str]) -> None:
    data = fetch_movielens(cache_dir() / "data" / "ml-100k")
    by_name = {"rank": rankings, "recommend": recommendations, "generate": texts}
    with out.open("w", encoding="utf-8") as file:
        for job in jobs:
            for number, answer in enumerate(by_name[job](data)):
                print(json.dumps(answer), file=file, flush=True)
                if number % 100 == 99:
                    print(f"{job}: {number + 1}", file=sys.stderr)


def compare(before: Path, after: Path) -> int:
    def read(path: Path) -> dict[tuple[str, str], dict[str, object]]:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {(line["job"], line["id"]): line for line in lines}

    old, new = read(before), read(after)
    differing = 0
    for job in dict.fromkeys(job for job, _ in (*old, *new)):
        keys = [key for key in {**old, **new} if key[0] == job]
        other = [key for key in keys if old.get(key) != new.get(key)]
        differing += len(other)
        print(
            f"{job}: {len(keys) - len(other)} of {len(keys)} equal to the bit"
            + (f"; {other[0][1]} differs" if other else "")
        )
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="answer, and write what was answered")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", nargs="+", choices=("rank", "recommend", "generate"), default=None)
    comparing = commands.add_parser("compare", help="count the answers that are equal to the bit")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after)
    record(given.out, given.only or ("rank", "recommend", "generate"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
