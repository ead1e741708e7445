"""Does a decoder of semantic IDs find what users choose next, better than popularity and item-kNN?

Regime: for each data set, codes (`rcllm sid build`: texts and co-occurrence) and a decoder (`rcllm sid train`) are made
of training users, in about a quarter of an hour on one core, and kept in the cache folder. Held-out users' last item is
the target, after the items before it; the whole catalogue competes, but for what the user has already seen. All
recommenders answer the same users: the model as it is served, with the share of item-kNN that training chose on
validation users; its decoder alone; the item-kNN that is mixed in (shrunk, late events first) alone; popularity; and
plain item-kNN, which reads as much of the history as served it best on validation users. Targets that stand in their
own history are left out: nobody may recommend them here.

Ceiling: 1; on such data the best sequential recommenders that are published find a tenth to a fifth of the targets in
their first ten.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from benchmarks.harness import Options, console, dataset, options, run_parts, show
from rcllm.codes.index import CodeIndex
from rcllm.codes.knn import Knn
from rcllm.config import CacheConfig, Config, ModelConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, ItemId, RankRequest
from rcllm.data import Dataset, Split, histories, split_of
from rcllm.durable import renamed
from rcllm.errors import answered
from rcllm.fetch import cache_dir
from rcllm.fidelity.baselines import Baseline, Neighbours, Popularity, training_pool
from rcllm.fidelity.intervals import bootstrap
from rcllm.sid.build import build_codes, code_index_of, item_texts, split_histories
from rcllm.sid.collaborative import FloatArray
from rcllm.sid.config import BuildConfig, CodeConfig, NetworkConfig, SequenceConfig, TrainConfig
from rcllm.sid.embed import SentenceEncoder, fetch_minilm
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import load_codes, load_knn
from rcllm.sid.recommend import add_knn
from rcllm.sid.train import CodeTrainer

QUESTION = "Recall@10/50 and NDCG@10 over the whole catalogue: semantic IDs with and without item-kNN, and its rivals"
MOST, BEAM = 50, 128
WINDOWS = (5, 10, 20, 50)  # events of a history that item-kNN may read
FIELDS = ("title", "brand", "categories", "year", "genres")  # of an item, that are embedded
MEASURES = ("recall10", "recall50", "ndcg10")

Rank = Callable[[Sequence["Case"]], list[Sequence[ItemId]]]  # the best MOST items for each case, best first


@dataclasses.dataclass(frozen=True)
class Case:
    history: tuple[ItemId, ...]  # oldest first
    target: ItemId


@dataclasses.dataclass(frozen=True)
class Settings:
    """How codes and decoder of one data set are made."""

    data: str
    build: BuildConfig
    train: TrainConfig


SETTINGS = {
    "scientific": Settings(
        "amazon_scientific",
        BuildConfig(CodeConfig(levels=2, size=256)),
        TrainConfig(NetworkConfig(dropout=0.15)),
    ),
    "movielens": Settings(
        "movielens_100k",
        BuildConfig(CodeConfig(levels=2, size=64)),
        TrainConfig(
            sequences=SequenceConfig(max_items=50, batch_tokens=2048, shuffle=0.0), epochs=20, learning_rate=3e-3
        ),
    ),
}


def main() -> None:
    chosen = options("recall", QUESTION, tuple(SETTINGS))
    run_parts("recall", QUESTION, chosen, {name: partial(compared, name, chosen) for name in SETTINGS})


def quick(settings: Settings) -> Settings:
    """Two epochs: shows that all runs, not how good it gets."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, epochs=2))


def compared(name: str, chosen: Options) -> dict[str, float]:
    settings = quick(SETTINGS[name]) if chosen.quick else SETTINGS[name]
    data = dataset(settings.data)
    test = cases(data, "test")[: chosen.requests]
    folder, minutes = trained(data, settings)
    pool = training_pool(data)
    knn = Neighbours(pool)
    window = max(WINDOWS, key=lambda n: measured(ranked(data, knn, n), cases(data, "validation")).mean())
    mixed_in = load_knn(folder)
    assert mixed_in is not None
    rankers = {
        "model": generated(folder),
        "decoder": generated(folder, knn=0.0),
        "mixed_knn": carried(mixed_in, load_codes(folder)),
        "popularity": ranked(data, Popularity(pool), 1),
        "knn": ranked(data, knn, window),
    }
    values = {ranker: measured(rank, test) for ranker, rank in rankers.items()}
    values |= {
        f"model_minus_{other}": values["model"] - values[other]
        for other in ("decoder", "mixed_knn", "popularity", "knn")
    }
    values["decoder_minus_knn"] = values["decoder"] - values["knn"]
    metrics = {"users": float(len(test)), "training_minutes": minutes, "knn_window": float(window)}
    metrics |= {"share_of_knn": mixed_in.share}
    rows = []
    for who, table in values.items():
        intervals = bootstrap(table, seed=chosen.seed)  # of differences: paired by user
        for measure, interval in zip(MEASURES, intervals, strict=True):
            key = f"{measure}_{who}"
            metrics |= {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
        rows.append([who, *map(str, intervals)])
    show(f"{data.name}, {len(test)} held-out users, {len(data.catalogue):,} items", ["", *MEASURES], rows)
    return {f"{key}_{name}": value for key, value in metrics.items()}


def cases(data: Dataset, split: Split) -> list[Case]:
    """The last item of every user of the split, unless it stands in the history before it."""
    users = [rows for user, rows in histories(data.interactions).items() if split_of(user) == split and len(rows) > 1]
    found = [Case(tuple(row.item_id for row in rows[:-1]), rows[-1].item_id) for rows in users]
    return [case for case in found if case.target not in case.history]


def trained(data: Dataset, settings: Settings) -> tuple[Path, float]:
    """The model's folder, and how many minutes training took, which a folder of the same settings spares."""
    digest = blake3(f"{settings} {len(data.catalogue)} {len(data.interactions)}".encode()).hexdigest()[:12]
    folder = cache_dir() / "benchmarks" / f"sid-{settings.data}-{digest}"
    numbers = {item_id: number for number, item_id in enumerate(data.catalogue)}
    train, validation = (split_histories(data.interactions, numbers, split) for split in ("train", "validation"))
    codes = build_codes(embeddings(data), train, settings.build)
    trainer = CodeTrainer(code_index_of(codes, tuple(data.catalogue)), train, validation, settings.train, folder)
    told: list[int] = []

    def tell(epoch: int, loss: float) -> None:
        if epoch not in told:
            told.append(epoch)
            console.print(f"{data.name}: epoch {epoch}, validation loss {loss:.3f}")

    curve = trainer.run(lambda now: tell(now.last.epoch, now.last.validation_loss) if now.last else None)
    add_knn(folder, train, validation)
    return folder, curve[-1].minutes


def embeddings(data: Dataset) -> FloatArray:
    """Of the items' texts; kept beside the models, because they take longer than the codes."""
    texts = item_texts(data.catalogue.values(), FIELDS)
    digest = blake3("\n".join(texts).encode()).hexdigest()[:12]
    path = cache_dir() / "benchmarks" / f"minilm-{data.name}-{digest}.npy"
    if not path.exists():
        with renamed(path) as partial_path, partial_path.open("wb") as file:
            np.save(file, SentenceEncoder.load(fetch_minilm(), 128).encode(texts))
    return np.asarray(np.load(path), dtype=np.float32)


def generated(folder: Path, model: Mapping[str, Any] = MappingProxyType({}), knn: float | None = None) -> Rank:
    """By the engine's beam search, which reads as much of a history as the model was trained on.

    `model`: other fields of ModelConfig; `knn`: as in a request.
    """
    recommender = load_recommender(Config(model=ModelConfig(path=str(folder), **model), cache=CacheConfig(pool_mb=256)))

    def rank(asked: Sequence[Case]) -> list[Sequence[ItemId]]:
        requests = [
            RecommendRequest(
                str(i),
                tuple(Event(x) for x in case.history),
                n=MOST,
                beam=BEAM,
                deny=case.history,
                knn=knn,
            )
            for i, case in enumerate(asked)
        ]
        start = time.perf_counter()
        answers = answered(recommender.recommend_batch(requests))
        console.print(f"{len(requests)} requests in {time.perf_counter() - start:.1f} s")
        return [answer.items for answer in answers]

    return rank


def carried(knn: Knn, code_index: CodeIndex) -> Rank:
    """By the item-kNN that a model carries, alone."""

    def rank(asked: Sequence[Case]) -> list[Sequence[ItemId]]:
        return [
            list(knn.shares(case.history, code_index, code_index.allowed(deny=case.history), MOST)) for case in asked
        ]

    return rank


def ranked(data: Dataset, baseline: Baseline, window: int) -> Rank:
    """By a baseline's scores of all items; ties go to the earlier one in the catalogue."""
    item_ids = tuple(data.catalogue)
    numbers = {item_id: number for number, item_id in enumerate(item_ids)}

    def rank(asked: Sequence[Case]) -> list[Sequence[ItemId]]:
        answers: list[Sequence[ItemId]] = []
        for case in asked:
            events = tuple(Event(item_id) for item_id in case.history[-window:])
            scores = baseline.score(RankRequest("", item_ids, events))
            scores[[numbers[item_id] for item_id in case.history]] = -np.inf
            answers.append([item_ids[i] for i in np.argsort(-scores, kind="stable")[:MOST]])
        return answers

    return rank


def measured(rank: Rank, asked: Sequence[Case]) -> npt.NDArray[np.float64]:
    """[cases, MEASURES]"""
    rows = []
    for case, items in zip(asked, rank(asked), strict=True):
        at = list(items).index(case.target) if case.target in items else MOST
        rows.append((float(at < 10), float(at < 50), 1 / np.log2(at + 2) if at < 10 else 0.0))
    return np.array(rows)


if __name__ == "__main__":
    main()
