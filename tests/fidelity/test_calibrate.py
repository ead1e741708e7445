"""The search on a tiny engine, where it is known what passes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError
from rcllm.fidelity.calibrate import CalibrateProgress, Space, Trial, calibrate
from rcllm.fidelity.calibration import Calibrated, Calibration, Rung
from rcllm.fidelity.pareto import fronts
from rcllm.fidelity.records import RecordFile
from rcllm.fidelity.target import Target
from rcllm.prompt.learnt import Learnt
from tests.engine import tiny


def asked(number: int, *, num_events: int = 3) -> RankRequest:
    """Random candidates, of which one is the positive, and a random history."""
    draw = np.random.default_rng(number).permutation(58)
    candidates, events = tuple(int(i) for i in draw[:6]), tuple(int(i) for i in draw[6 : 6 + num_events])
    made = tiny.request(candidates, events, user=f"u{number}", name=f"r{number}")
    return replace(made, options=None, positive=tiny.IDS[candidates[number % 6]])


TRIAL = Trial([asked(n) for n in range(40)], [asked(1000 + n) for n in range(4)], "tiny", num_timed=3)


def space(*levels: str, **axes: Any) -> Space:
    whole = {"readouts": ("label",), "layouts": ("history_first",), "label_places": ("after",)} | axes
    return Space(levels=tuple(map(Level.parse, levels)), **({"contexts": ("instruction",)} | whole))


def search(engine: Engine, tried: Space, path: Path | None = None, **changed: Any) -> Calibration:
    with RecordFile(path) as kept:
        return calibrate(engine, replace(TRIAL, **changed), tried, Target(), kept)


def found_at(calibration: Calibration, level: str) -> Rung:
    (rung,) = [rung for rung in calibration.rungs if rung.configuration.options.level == Level.parse(level)]
    return rung


def corrupt_items(engine: Engine) -> int:
    """Noise over the values of all items that are cached."""
    blocks = [block for block in engine.pool._blocks.values() if (block.owner or "").startswith("item#")]
    noise = torch.Generator().manual_seed(0)
    for block in blocks:
        values = block.kv[:, 1]
        values += 5 * values.std() * torch.randn(values.shape, generator=noise)
    return len(blocks)


def test_a_full_budget_passes_and_corrupted_blocks_do_not(engine: Engine) -> None:
    engine.warm()
    assert corrupt_items(engine) > 58
    found = search(engine, space("blocks", "tail(0.5)", "corrected(1, 1)"))
    blocks, whole = found_at(found, "blocks"), found_at(found, "corrected(1, 1)")
    assert "Kendall τ" in " ".join(found.target.failures(blocks.summary))
    assert found.target.failures(whole.summary) == ()
    assert whole.summary.measures["tau"].mean == pytest.approx(1.0)
    assert whole.summary.measures["max_shift"].mean < 1e-3 < blocks.summary.measures["max_shift"].mean
    assert whole.summary.deltas["ndcg10"].low == whole.summary.deltas["ndcg10"].high == 0.0
    assert found.recommended == whole.configuration
    admitted = Calibrated.of(found, engine.identity, "instruction").admit(RankOptions(level=Level("auto")))
    assert admitted.options.level == Level.parse("corrected(1, 1)")


def test_error_falls_as_the_budget_grows(engine: Engine) -> None:
    found = search(engine, space("tail(0.0)", "tail(0.5)", "tail(1.0)"))
    shifts = [found_at(found, f"tail({share})").summary.measures["max_shift"].mean for share in (0.0, 0.5, 1.0)]
    assert shifts[0] > shifts[1] > shifts[2]
    assert shifts[2] < 1e-4
    fresh = [found_at(found, f"tail({share})").summary.flops_saved for share in (0.0, 0.5, 1.0)]
    assert fresh[0] > fresh[1] > fresh[2]


def test_everything_is_tried_and_the_best_goes_on(engine: Engine) -> None:
    stages: list[CalibrateProgress] = []
    with RecordFile() as kept:
        whole = Space(levels=(Level("blocks"), Level("tail", 0.5)))
        found = calibrate(engine, TRIAL, whole, Target(), kept, stages.append)
    first = [now for now in stages if now.stage.startswith("1/3")][-1]
    assert first.done == first.total
    assert first.num_configurations == 5 * (4 + 1 + 1) + 6, "contexts of each prompt, and six full recomputes"
    assert [now.stage[:3] for now in stages if now.done == now.total] == ["1/3", "2/3", "3/3", "tim"]
    assert found.num_requests == 40
    prompts = {rung.configuration.full for rung in found.rungs}
    left_out = {note.split(" left out")[0] for note in found.notes}
    assert len(prompts) + len(left_out) == 6, "what is not measured to the end is said"
    for prompt in prompts:
        rungs = [rung for rung in found.rungs if rung.configuration.full == prompt]
        assert rungs[0].configuration == prompt.exact
        assert rungs[1].configuration == prompt
        assert 1 <= len({rung.configuration.context for rung in rungs[2:]}) <= 2
        assert all(rung.summary.num_requests == 40 for rung in rungs[1:])
        assert all(rung.summary.timing is not None and rung.summary.timing.num_requests == 3 for rung in rungs)


def test_the_best_contexts_are_those_closest_to_full_recompute(engine: Engine) -> None:
    contexts = ("none", "bos", "instruction", "mean(4)")
    alone = {context: search(engine, space("blocks", contexts=(context,)), num_timed=0) for context in contexts}
    tau = {context: found_at(one, "blocks").summary.measures["tau"].mean for context, one in alone.items()}
    together = search(engine, space("blocks", contexts=contexts), num_timed=0)
    kept = {rung.configuration.context for rung in together.rungs} - {""}
    assert len(kept) == 2
    assert max(tau, key=lambda context: tau[context]) in kept


def as_told(calibration: Calibration) -> str:
    """Without its times, which differ from run to run."""
    rungs = tuple(replace(rung, summary=replace(rung.summary, timing=None)) for rung in calibration.rungs)
    return repr(replace(calibration, rungs=rungs))


def test_a_search_goes_on_after_a_kill_at_any_line(engine: Engine, tmp_path: Path) -> None:
    path, tried = tmp_path / "records.jsonl", space("blocks", "tail(0.5)", contexts=("bos", "instruction"))
    whole = as_told(search(engine, tried, path, num_timed=0))
    lines = path.read_bytes().splitlines(keepends=True)
    for count in (0, 1, len(lines) // 3, len(lines) // 2, len(lines) - 1):
        path.write_bytes(b"".join(lines[:count]) + lines[count][:-7])
        assert as_told(search(engine, tried, path, num_timed=0)) == whole
        again = path.read_bytes().splitlines(keepends=True)
        assert again[:count] == lines[:count]
        assert len(again) == len(lines), "nothing was computed twice"


def test_another_template_uses_no_records_of_this_one(engine: Engine, tmp_path: Path) -> None:
    path, tried = tmp_path / "records.jsonl", space("blocks")
    search(engine, tried, path, num_timed=0)
    before = len(path.read_bytes().splitlines())
    other = tmp_path / "other.toml"
    other.write_text(tiny.TEMPLATE.replace("Pick one.", "Choose one."), encoding="utf-8")
    changed = tiny.build(template=str(other))
    found = search(changed, tried, path, num_timed=0)
    assert len(path.read_bytes().splitlines()) == 2 * before
    with pytest.raises(ConfigError, match=r"template .* instead of"):
        Calibrated.of(found, engine.identity, "instruction")


def test_a_prompt_that_ranks_clearly_worse_is_left_out(engine: Engine) -> None:
    """The positive is what the read-out `label` likes best, so that no other read-out comes near."""
    best = [
        replace(r, positive=engine.rank(replace(r, options=RankOptions(Level("full")))).ranking[0])
        for r in TRIAL.requests
    ]
    found = search(engine, space("blocks", readouts=("label", "pointwise", "likelihood")), requests=best, num_timed=0)
    assert {rung.configuration.options.readout for rung in found.rungs} == {"label"}
    assert [note.split(",")[1].strip() for note in found.notes] == ["pointwise", "likelihood"]


def test_requests_that_cannot_be_asked_are_left_out_and_named(engine: Engine) -> None:
    unknown = replace(asked(1), request_id="lost", candidates=(*asked(1).candidates, tiny.ItemId("nowhere")))
    found = search(engine, space("blocks"), requests=[unknown, *TRIAL.requests[:20]], num_timed=0)
    assert found.num_requests == 20
    assert found.notes[0].startswith("request lost left out: item 'nowhere'")
    with pytest.raises(DataError, match="nothing to calibrate on: request lost"):
        search(engine, space("blocks"), requests=[unknown])


def test_without_positives_agreement_is_measured_but_nothing_passes(engine: Engine) -> None:
    nobody = [replace(request, positive=None) for request in TRIAL.requests]
    found = search(engine, space("tail(1.0)"), requests=nobody, num_timed=0)
    summary = found_at(found, "tail(1.0)").summary
    assert math.isnan(summary.deltas["ndcg10"].low)
    assert summary.measures["tau"].mean == pytest.approx(1.0)
    assert found.recommended is None


def test_a_model_tuned_for_blocks_is_measured_against_its_own_mask(one_compute_thread: None) -> None:
    tuned = tiny.build(mask="blocks")
    found = search(tuned, space("tail(0.3)", "blocks", contexts=("none", "bos")))
    blocks = found_at(found, "blocks")
    assert blocks.configuration.context == "instruction"
    assert blocks.summary.measures["tau"].mean == pytest.approx(1.0)
    assert blocks.summary.flops_saved > 0.3
    assert found.recommended == blocks.configuration


@pytest.mark.parametrize("level", ["full", "exact", "auto"])
def test_levels_that_cannot_be_tried(engine: Engine, level: str) -> None:
    with pytest.raises(ConfigError, match=level):
        search(engine, space("blocks", level))
    with pytest.raises(ConfigError, match="nothing to try"):
        search(engine, space())


def test_fronts() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 2.0), "c": (3.0, 1.0), "d": (2.5, 2.5), "e": (3.0, 6.0), "twin": (2.0, 2.0)}
    assert fronts(points) == [["a", "b", "twin", "c"], ["d"], ["e"]]


def test_a_bias_that_remembers_cannot_be_calibrated(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="running_mean"):
        search(engine, space("blocks", base=RankOptions(bias="running_mean")))


def test_what_is_cut_and_what_the_ranker_did_not_learn_is_noted(engine: Engine) -> None:
    cut = tiny.build(max_item_tokens=3)
    cut.prompter.learnt = Learnt(readout="pointwise")
    cut.prompter.notes = ("the adapter was tuned with template titles, this is tiny",)
    found = search(cut, space("blocks", readouts=("label", "pointwise")), requests=TRIAL.requests[:4], num_timed=0)
    template, readout, texts, *_ = found.notes
    assert template == cut.prompter.notes[0]
    assert readout == "the adapter was tuned for read-out pointwise, this is label"
    assert re.search(r"of \d+ items: \d+ cut to 3 tokens as candidates \(max_item_tokens\)", texts)
