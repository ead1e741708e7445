"""Training learns, resumes exactly after a kill, and says what it did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.config import Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Interaction, ItemId, RankOptions, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError
from rcllm.model.adapter import load_adapter
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.template import Template
from rcllm.tune.config import ExampleConfig, TuneConfig
from rcllm.tune.examples import TrainingSet, batch_of
from rcllm.tune.setup import make_trainer
from rcllm.tune.train import Trainer, TuneProgress, best_of
from tests.engine import tiny

EXAMPLES = ExampleConfig(num_candidates=4, num_history=3, targets_per_user=2, prompts_per_batch=4)
CONFIG = TuneConfig(rank=4, alpha=8.0, losses=48, evaluate_every=16, validation_requests=6, examples=EXAMPLES)


def log(num_users: int = 60, name: str = "log") -> Dataset:
    """Users who walk through the catalogue in steps of one: the next item follows from the last."""
    rows = [
        Interaction(UserId(f"u{user}"), tiny.IDS[(user + step) % 40], float(step))
        for user in range(num_users)
        for step in range(6)
    ]
    return Dataset(name, Catalogue(list(tiny.catalogue().values())[:40]), tuple(rows))


def trainer(folder: Path, config: TuneConfig = CONFIG, start: Path | None = None) -> Trainer:
    model = ModelConfig(path=str(tiny.model_folder()), device="cpu")
    return make_trainer(model, PromptConfig(template=str(tiny.template_path())), [log()], config, folder, start)


def test_training_lowers_the_loss_of_its_own_examples(tmp_path: Path, one_compute_thread: None) -> None:
    made = trainer(tmp_path, replace(CONFIG, losses=160, learning_rate=2e-2, evaluate_every=80))
    requests = batch_of(made.sources, 0, CONFIG.seed)

    def loss() -> float:
        with torch.no_grad():
            return float(torch.stack(made._losses(requests)[1]).mean())

    before = loss()
    made.run()
    assert loss() < before - 0.05


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_the_saved_adapter_makes_the_engine_score_as_the_trainer_did(
    tmp_path: Path, mask: str, one_compute_thread: None
) -> None:
    config = replace(CONFIG, mask=mask, losses=16, examples=replace(EXAMPLES, borrowed=2, negatives=("uniform",)))
    made = trainer(tmp_path, config)
    made.run()
    made.network.load_adapter(saved := load_adapter(tmp_path / "best", made.network.spec))
    assert any(low_rank.up.abs().sum() > 0 for low_rank in saved.layers.values())
    request = batch_of(made.sources, 5, 0)[0]
    with torch.no_grad():
        ours = made.score([request])[1][0].numpy()
    base = tiny.config()
    model = replace(base.model, adapter=str(tmp_path / "best"))
    engine = Engine.build(made.prompter.catalogue, Config(model, base.prompt, base.cache))
    assert engine.config.model.mask == mask
    level = "full" if mask == "causal" else "blocks"
    theirs = engine.rank(tiny.asking(replace(request, options=RankOptions(readout="pointwise")), level=level)).scores
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert engine.model_id != tiny.fresh().model_id


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, one_compute_thread: None) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()

    class Killed(Exception):
        pass

    def kill(now: TuneProgress) -> None:
        if now.losses >= 40:  # after the checkpoint at 32, within the next stretch
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path / "cut").run(kill)
    resumed = trainer(tmp_path / "cut")
    resumed.run()
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.validation_loss for p in resumed.state.curve] == [p.validation_loss for p in whole.state.curve]


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path: Path, one_compute_thread: None) -> None:
    trainer(tmp_path, replace(CONFIG, losses=16)).run()
    with pytest.raises(ConfigError, match=r"learning_rate 0\.001 → 0\.5"):
        trainer(tmp_path, replace(CONFIG, losses=16, learning_rate=0.5)).run()


def test_another_text_does_not_go_on_from_a_checkpoint(tmp_path: Path, one_compute_thread: None) -> None:
    """A regression: with another template the checkpoint of the first went on, silently."""
    trainer(tmp_path, replace(CONFIG, losses=16)).run()
    model = ModelConfig(path=str(tiny.model_folder()), device="cpu")
    prompt = PromptConfig(template=str(tiny.template_path()), max_item_tokens=9)
    with pytest.raises(ConfigError, match=r"other settings: template \w{12} → \w{12}"):
        make_trainer(model, prompt, [log()], replace(CONFIG, losses=16), tmp_path).run()


def test_it_stops_early_when_validation_stalls(tmp_path: Path, one_compute_thread: None) -> None:
    made = trainer(tmp_path, replace(CONFIG, losses=10_000, learning_rate=1e-9, patience=2, evaluate_every=4))
    curve = made.run()
    assert curve[-1].losses < 10_000
    best = curve.index(best_of(curve))
    assert len(curve) - 1 - best == 2


def test_the_record_says_how_the_adapter_was_made(tmp_path: Path, one_compute_thread: None) -> None:
    trainer(tmp_path, replace(CONFIG, losses=16)).run()
    record = json.loads((tmp_path / "best" / "rcllm.json").read_text(encoding="utf-8"))
    assert record["mask"] == "causal"
    assert record["started_from"] == ""
    assert record["datasets"] == ["log"]
    assert record["settings"]["rank"] == 4
    assert record["baselines"].keys() == {"chance", "popularity", "item-kNN"}
    assert record["baselines"]["item-kNN"] > record["baselines"]["chance"]
    assert record["fresh"] == []
    assert record["curve"][0]["losses"] == 0
    template = Template.load(str(tiny.template_path()))
    assert (record["template"], record["template_fingerprint"]) == ("tiny", template.fingerprint.hex())
    assert record["limits"] == template.limits
    assert record["fields"]["log"]["title"] == 1.0
    assert 0.3 < record["fields"]["log"]["description"] < 0.4
    assert record["context"] == "instruction"
    assert Learnt.of(record, "here").text_differences(template, None, "instruction") == ()


def test_batches_hold_training_users_alone_and_repeat_exactly() -> None:
    source = TrainingSet(log(200), EXAMPLES)
    for number in range(10):
        batch = batch_of([source], number, seed=3)
        assert batch == batch_of([source], number, seed=3)
        for request in batch:
            user = UserId(str(request.user_id).removeprefix("log/"))
            assert split_of(user) == "train"
            assert request.positive in request.candidates
            assert len(set(request.candidates)) == 4
            touched = {f"log/{row.item_id}" for row in log(200).interactions if row.user_id == user}
            assert touched & set(request.candidates) == {request.positive}


def test_borrowed_candidates_come_from_the_batch() -> None:
    source = TrainingSet(
        log(200), replace(EXAMPLES, num_candidates=8, borrowed=6, prompts_per_batch=12, negatives=("uniform",))
    )
    batch = batch_of([source], 1, seed=0)
    assert len({item for request in batch for item in request.candidates}) <= 24
    assert max(len(request.candidates) for request in batch) == 8


def test_items_carry_how_often_training_users_chose_them() -> None:
    source = TrainingSet(log(200), EXAMPLES)
    item = source.dataset.catalogue[ItemId("i3")]
    count = sum(row.item_id == "i3" and split_of(row.user_id) == "train" for row in log(200).interactions)
    assert int(item.fields["chosen"]) <= count < 2 * int(item.fields["chosen"])


def test_data_without_a_user_to_learn_from_is_refused() -> None:
    rows = tuple(row for row in log().interactions if row.timestamp < 2)
    with pytest.raises(DataError, match="no training user has an item that was new after 2 or more events"):
        TrainingSet(replace(log(), interactions=rows), EXAMPLES)
