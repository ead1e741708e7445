"""A student learns its teacher's scores, without labels, and asks for each of them once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.config import ModelConfig, PromptConfig
from rcllm.core.ranking import RankRequest
from rcllm.errors import ConfigError
from rcllm.tune.config import TuneConfig
from rcllm.tune.loss import distillation_loss
from rcllm.tune.setup import make_trainer
from rcllm.tune.teacher import SCORES, Teacher
from rcllm.tune.train import Trainer
from tests.engine import tiny
from tests.tune.test_train import CONFIG, EXAMPLES, log

STUDENT = replace(CONFIG, mask="blocks", losses=96, evaluate_every=32, learning_rate=1e-2)
MODEL = ModelConfig(path=str(tiny.model_folder()), device="cpu")
PROMPT = PromptConfig(template=str(tiny.template_path()))


def trainer(folder: Path, config: TuneConfig, teacher: Path | None = None) -> Trainer:
    template = str(tiny.template_path()) if teacher else ""
    return make_trainer(MODEL, PROMPT, [log()], config, folder, teacher=teacher, teacher_template=template)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    trainer(folder, replace(CONFIG, losses=96, learning_rate=2e-2, evaluate_every=96)).run()
    return folder / "best"


def test_the_loss_is_the_divergence_of_two_softmaxes() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=5), rng.normal(size=5)
    p, q = (np.exp(each / 2.0) / np.exp(each / 2.0).sum() for each in (theirs, ours))
    found = distillation_loss(torch.from_numpy(ours), torch.from_numpy(theirs), 2.0)
    assert found.item() == pytest.approx(4.0 * float((p * np.log(p / q)).sum()))
    assert distillation_loss(torch.from_numpy(ours), torch.from_numpy(ours + 3.0), 1.0).item() == pytest.approx(0.0)


def test_a_student_comes_nearer_to_its_teacher_without_labels(
    tmp_path: Path, teacher: Path, one_compute_thread: None
) -> None:
    made = trainer(tmp_path, STUDENT, teacher)
    curve = made.run()
    assert all(point.tau is not None for point in curve)
    best = max(curve, key=lambda point: point.tau or -1.0)
    assert (best.tau or 0.0) > (curve[0].tau or 0.0)
    assert min(point.validation_loss for point in curve) < curve[0].validation_loss
    assert made.baselines["teacher"] > made.baselines["chance"]
    record = json.loads((tmp_path / "best" / "rcllm.json").read_text(encoding="utf-8"))
    assert record["teacher"] == (made.teacher.identity if made.teacher else "")


def test_scores_are_those_of_the_teachers_own_training(tmp_path: Path, teacher: Path, one_compute_thread: None) -> None:
    """What the teacher's trainer computes on its own prompts, causal and in full."""
    student = trainer(tmp_path, STUDENT, teacher)
    own = make_trainer(MODEL, PROMPT, [log()], CONFIG, tmp_path / "own", teacher)
    requests = student.sources[0].batch(np.random.default_rng(0))
    with torch.no_grad():
        expected = own.score(requests)[1]
    assert student.teacher is not None
    with student.teacher.kept:
        for ours, theirs in zip(student.teacher.scores(requests), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)


def test_a_score_is_computed_once(
    tmp_path: Path, teacher: Path, one_compute_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(STUDENT, losses=16)
    trainer(tmp_path, config, teacher).run()
    kept = (tmp_path / SCORES).read_bytes()
    (tmp_path / "checkpoint.pt").unlink()
    again = trainer(tmp_path, config, teacher)
    assert again.teacher is not None
    asked: list[RankRequest] = []
    monkeypatch.setattr(type(again.teacher.engine), "rank_batch", lambda _, some: asked.extend(some) or [])
    again.run()
    assert not asked
    assert (tmp_path / SCORES).read_bytes() == kept


def test_labels_can_be_mixed_in(tmp_path: Path, teacher: Path, one_compute_thread: None) -> None:
    losses = {}
    for share in (0.0, 0.5, 1.0):
        made = trainer(tmp_path / str(share), replace(STUDENT, labels=share), teacher)
        assert made.teacher is not None
        requests = made.sources[0].batch(np.random.default_rng(1))
        with torch.no_grad(), made.teacher.kept:
            losses[share] = torch.stack(made._losses(requests)[1])
    torch.testing.assert_close(losses[0.5], (losses[0.0] + losses[1.0]) / 2)


def test_another_teacher_does_not_go_on_from_a_checkpoint(
    tmp_path: Path, teacher: Path, one_compute_thread: None
) -> None:
    config = replace(STUDENT, losses=4, evaluate_every=4)
    trainer(tmp_path, config, teacher).run()
    with pytest.raises(ConfigError, match="teacher"):
        trainer(tmp_path, config).run()


def test_an_adapter_without_a_record_must_be_given_its_template(tmp_path: Path, teacher: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((teacher / name).read_bytes())
    catalogue = trainer(tmp_path / "out", replace(CONFIG, examples=EXAMPLES)).prompter.catalogue
    with pytest.raises(ConfigError, match="give --teacher-template"):
        Teacher.of(tmp_path, MODEL, catalogue, tmp_path)  # type: ignore[arg-type]
