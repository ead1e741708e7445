"""The adapters that come with the repository: whole, small, and rankers of people who were not in their training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import SHARED
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Level, RankOptions, order
from rcllm.data import build_requests, load_dataset
from rcllm.engine.engine import Engine
from rcllm.fidelity.baselines import Popularity, training_pool
from rcllm.fidelity.measures import chance_ndcg, ndcg
from rcllm.model.adapter import adapter_mask
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.template import Template, chat_format

FOLDERS = sorted((Path(__file__).resolve().parents[2] / "adapters").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_has_its_record_and_fits_its_template(folder: Path) -> None:
    record = json.loads((folder / "rcllm.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert record["mask"] == adapter_mask(folder) == folder.name.rpartition("-")[2]
    assert record["template_fingerprint"] == Template.load(record["template"]).fingerprint.hex()
    assert record["curve"][-1]["losses"] > 0
    template, learnt = Template.load(record["template"]), Learnt.of(record, str(folder))
    assert learnt.text_differences(template, chat_format("chatml"), "instruction") == ()
    assert learnt.option_differences(RankOptions(readout="pointwise")) == ()
    assert set(learnt.fields) == set(record["datasets"])
    assert learnt.missing({"title": 1.0, "chosen": 0.0, "categories": 0.0}) == ("chosen",)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_ranks_held_out_users_better_than_popularity(folder: Path) -> None:
    data = load_dataset("common", SHARED / "amazon_scientific")
    template = json.loads((folder / "rcllm.json").read_text(encoding="utf-8"))["template"]
    config = Config(ModelConfig(adapter=str(folder)), PromptConfig(template), CacheConfig(pool_mb=1000))
    engine = Engine.build(data.catalogue, config)
    popularity = Popularity(training_pool(data))
    options = RankOptions(
        level=Level("full" if engine.config.model.mask == "causal" else "blocks"), readout="pointwise"
    )
    ours, theirs = [], []
    for request in build_requests(data, 100, 20, 8, seed=0):
        assert request.positive is not None
        positive = request.candidates.index(request.positive)
        ours.append(ndcg(engine.rank(replace(request, options=options)).order, positive, 10))
        theirs.append(ndcg(order(popularity.score(request).tolist()), positive, 10))
    print(f"{folder.name}: NDCG@10 {np.mean(ours):.3f}, popularity {np.mean(theirs):.3f}")
    assert np.mean(ours) > np.mean(theirs) > chance_ndcg(20, 10)
