"""The demo's question of quality: how a tuned ranker orders films for viewers whom no training saw.

Knows nothing of how engines work. Invariant: every figure that it prints was measured in this run; popularity and
item-kNN, which stand beside the ranker, know the training users alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rcllm.cli.checkout import RANKER, RANKER_TEMPLATE
from rcllm.cli.inputs import Inputs, make_engine
from rcllm.cli.screen import progress, warm_with_progress
from rcllm.config import Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import Dataset, build_requests, named_items
from rcllm.engine.engine import Engine
from rcllm.fidelity.baselines import baseline_gains, gain
from rcllm.fidelity.compare import TOP, compare_levels
from rcllm.fidelity.measures import chance_ndcg

CANDIDATES, HISTORY = 20, 8  # as it was tuned on, about
_TIMED = 6  # requests that are also recomputed in full, for their times
_OPTIONS = RankOptions(readout="pointwise", level=Level("blocks"))


def show_quality(dataset: Dataset, count: int, seed: int, screen: Console) -> None:
    """Ranks for `count` held-out viewers, and prints NDCG@10 and what reuse saves."""
    requests = build_requests(dataset, count, CANDIDATES, HISTORY, split="test", seed=seed, min_history=2)
    config = Config(ModelConfig(adapter=str(RANKER)), PromptConfig(template=RANKER_TEMPLATE), rank=_OPTIONS)
    with make_engine(config, Inputs(dataset.catalogue, dataset), requests) as engine:
        warm_with_progress(engine, named_items(requests))
        full, _, blocks = compare_levels(engine, requests[:_TIMED], [_OPTIONS.level], _OPTIONS)
        ways = {**baseline_gains(dataset, requests), "tuned ranker, level blocks": _gains(engine, requests)}
    screen.print(f"{len(requests)} viewers whom no training saw: which of {CANDIDATES} films did each choose next?")
    screen.print(_table(ways))
    screen.print(
        f"The ranker ({RANKER.name}) is the same model with an adapter. It was tuned on goods, places and books, never "
        "on films, and under the block mask, so that reuse is exact. Its prompts show what item-kNN says of a "
        "candidate, as two words. It takes "
        f"{blocks.ttft_p50_ms:,.0f} ms a request, and {full.ttft_p50_ms:,.0f} ms when all is computed anew "
        f"({blocks.speedup_full:.1f}×; P50 of {blocks.num_requests} requests).\n",
        style="dim",
    )


def _gains(engine: Engine, requests: Sequence[RankRequest]) -> list[float]:
    """NDCG@10 of each request, as the engine ranks it."""
    with progress() as bar:
        tracked = bar.track(requests, description="ranking for held-out viewers")
        return [gain(engine.rank(request).scores, request) for request in tracked]


def _table(gains: Mapping[str, Sequence[float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("way")
    table.add_column(f"NDCG@{TOP}", justify="right")
    table.add_row("chance", f"{chance_ndcg(CANDIDATES, TOP):.2f}")
    for name, each in gains.items():
        table.add_row(name, f"{np.mean(each):.2f} ± {np.std(each, ddof=1) / math.sqrt(len(each)):.2f}")
    return table
