"""Trainings that were killed, that find something else in their folder, or that go astray."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcllm.config import ModelConfig, PromptConfig
from rcllm.core.ranking import Interaction, UserId
from rcllm.data import Catalogue, Dataset
from rcllm.errors import ConfigError, DataError, ModelError, RcllmError
from rcllm.model.adapter import load_adapter
from rcllm.model.checkpoint import CHECKPOINT
from rcllm.tune.setup import make_trainer
from rcllm.tune.train import Trainer, best_of
from tests.engine import tiny
from tests.killed import run_killed
from tests.tiny_models import tiny_model
from tests.tune.test_train import CONFIG, log

SHORT = replace(CONFIG, losses=24, evaluate_every=8, validation_requests=2)
_TUNE = """
from pathlib import Path
from rcllm.tune.train import Trainer
from tests.tune.test_resume import trainer
Trainer._evaluate = die_at(2, Trainer._evaluate, after=True)
trainer(Path({folder!r})).run()
"""


def trainer(folder: Path, data: Dataset | None = None, model: Path | None = None) -> Trainer:
    return _made(folder, data or log(), model or tiny.model_folder(), tiny.template_path())


def _made(folder: Path, data: Dataset, model: Path, template: Path) -> Trainer:
    config = ModelConfig(path=str(model), device="cpu")
    return make_trainer(config, PromptConfig(template=str(template)), [data], SHORT, folder)


@pytest.fixture
def begun(tmp_path: Path, one_compute_thread: None) -> Path:
    """A training that stopped after its first checkpoint."""
    folder = tmp_path / "begun"

    class Stop(Exception):
        pass

    def stop(now: object) -> None:
        if (folder / CHECKPOINT).exists():
            raise Stop

    with pytest.raises(Stop):
        trainer(folder).run(stop)
    return folder


def test_a_killed_process_goes_on_as_if_it_had_not_been(tmp_path: Path, one_compute_thread: None) -> None:
    """It dies when the adapter of the first validation is written, and the checkpoint is not."""
    whole = trainer(tmp_path / "whole")
    whole.run()
    run_killed(_TUNE.format(folder=str(tmp_path / "cut")))
    again = trainer(tmp_path / "cut")
    again.run()
    assert [point.validation_loss for point in again.state.curve] == [p.validation_loss for p in whole.state.curve]
    spec = whole.network.spec
    ours, theirs = (load_adapter(tmp_path / name / "best", spec) for name in ("cut", "whole"))
    for place, low_rank in theirs.layers.items():
        assert torch.equal(low_rank.up, ours.layers[place].up)
        assert torch.equal(low_rank.down, ours.layers[place].down)


def _dearer(data: Dataset) -> Dataset:
    items = [replace(item, fields={**item.fields, "brand": "another"}) for item in data.catalogue.values()]
    return replace(data, catalogue=Catalogue(items))


def _more(data: Dataset) -> Dataset:
    row = Interaction(UserId("u0"), tiny.IDS[39], 99.0)
    return replace(data, interactions=(*data.interactions, row))


@pytest.mark.parametrize("change", [_dearer, _more, lambda data: replace(data, name="other")])
def test_other_data_do_not_go_on(begun: Path, change: Callable[[Dataset], Dataset]) -> None:
    with pytest.raises(ConfigError, match=r"made with other settings: data(sets)? "):
        trainer(begun, change(log())).run()


def test_another_model_or_template_does_not_go_on(begun: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in tiny.model_folder().iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    trainer(begun, model=twin).run()  # the same weights under another name are the same model
    other = tiny_model("qwen3", tmp_path, seed=5, vocab_size=tiny.VOCAB, max_position_embeddings=2048)
    (twin / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    (twin / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="made with other settings: model "):
        trainer(begun, model=twin).run()
    template = tmp_path / "other.toml"
    template.write_text(tiny.TEMPLATE.replace("Pick one.", "Pick two."), encoding="utf-8")
    with pytest.raises(ConfigError, match="made with other settings: template "):
        _made(begun, log(), tiny.model_folder(), template).run()


def test_junk_in_the_place_of_the_checkpoint(begun: Path) -> None:
    path = begun / CHECKPOINT
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], random.Random(1).randbytes(300)):
        path.write_bytes(content)
        with pytest.raises(RcllmError, match=r"checkpoint\.pt"):
            trainer(begun).run()
        assert path.read_bytes() == content


def test_folders_of_something_else_are_left_alone(tmp_path: Path, one_compute_thread: None) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter_config.json").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds best of something else"):
        trainer(tmp_path).run()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["adapter_config.json"]
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file: expected the name of a folder"):
        trainer(tmp_path / "file").run()
    with pytest.raises(DataError, match="cannot be written"):
        trainer(tmp_path / "file" / "below").run()


def test_weights_that_are_no_numbers_stop_the_training_and_keep_what_was_good(begun: Path) -> None:
    good = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    made = trainer(begun)
    made._restore()
    made._restore = lambda: None  # type: ignore[method-assign]
    with torch.no_grad():
        next(iter(made.network.up.values())).fill_(math.nan)
    with pytest.raises(ModelError, match=r"became infinite or not a number.*is from before that and is good; lower"):
        made.run()
    with pytest.raises(ModelError, match="the weights became infinite"):
        made._checkpoint.save({})
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == good


def test_a_gradient_without_bounds_is_found_before_it_reaches_the_weights(begun: Path) -> None:
    made = trainer(begun)
    made._restore()
    before = {name: tensor.clone() for name, tensor in made.network.state_dict().items()}
    for parameter in made.network.parameters():
        parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ModelError, match="loss or its gradient"):
        made._step()
    for name, tensor in made.network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_model_that_gives_no_numbers_is_said_before_anything_is_learnt(
    tmp_path: Path, one_compute_thread: None
) -> None:
    made = trainer(tmp_path)
    made.network.weights.final_norm.data = torch.full_like(made.network.weights.final_norm, math.nan)
    with pytest.raises(ModelError, match="before it learnt anything"):
        made.run()
    assert not (tmp_path / "best").exists()


def test_the_seed_decides_what_is_learnt(tmp_path: Path, one_compute_thread: None) -> None:
    def learnt(name: str, seed: int) -> list[float]:
        model = ModelConfig(path=str(tiny.model_folder()), device="cpu")
        config = replace(SHORT, losses=8, seed=seed)
        prompt = PromptConfig(template=str(tiny.template_path()))
        made = make_trainer(model, prompt, [log()], config, tmp_path / name)
        return [point.validation_loss for point in made.run()]

    assert learnt("a", 0) == learnt("b", 0) != learnt("c", 1)


def test_the_record_and_the_curve_are_the_same_figures(begun: Path, one_compute_thread: None) -> None:
    made = trainer(begun)
    curve = made.run()
    best = best_of(curve)
    record = json.loads((begun / "best" / "rcllm.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert record["curve"][-1]["validation_loss"] == best.validation_loss
    assert [point["losses"] for point in record["curve"]] == [p.losses for p in curve[: len(record["curve"])]]
