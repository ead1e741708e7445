"""`rcllm tune`. Knows nothing of how training works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rcllm.cli.commands.tune import ColumnOptions, ShapeOptions
from rcllm.cli.inputs import check_ranks, columns_of, read_requests, tell_read
from rcllm.cli.outputs import check_folder
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, say
from rcllm.cli.tables import facts_table
from rcllm.config import ModelConfig, PromptConfig
from rcllm.data import load_dataset
from rcllm.tune.config import TEMPLATES, ExampleConfig, TuneConfig, examples_for
from rcllm.tune.setup import make_trainer
from rcllm.tune.train import Evaluation, TuneProgress, best_of, check_out


def tune_command(
    dataset: Sequence[Path],
    out: Path,
    config: TuneConfig,
    shape: ShapeOptions,
    model: str,
    template: str | None,
    start: Path | None,
    teacher: Path | None,
    teacher_template: str | None,
    requests: Path | None,
    format: str,
    columns: ColumnOptions,
) -> None:
    """Trains, and says what became better."""
    config = replace(config, alpha=2.0 * config.rank, examples=_examples(config, shape))
    prompt = PromptConfig(template=template or TEMPLATES[config.mask])
    check_ranks(prompt)
    for folder in (out, out / "best"):
        check_folder(folder, dataset, model, template, start, teacher, teacher_template, requests)
    check_out(out)
    logged = read_requests(str(requests)) if requests else ()
    with busy("reading data and model"):
        datasets = [load_dataset(format, folder, columns=columns_of(columns)) for folder in dataset]
        for each in datasets:
            tell_read(each.reports, each.notes)
        asked = ModelConfig(path=model), prompt, datasets, config, out, start, teacher, teacher_template or "", logged
        trainer = make_trainer(*asked)
    for note in trainer.notes:
        say(f"note: {note}")
    if trainer.baselines:
        say(f"to beat, NDCG@10 for {trainer.num_validated:,} users: {_beaten(trainer.baselines)}", "dim")
    with interruptible(GOES_ON), progress("loss", "validation") as bar:
        task = bar.add_task("tuning, percent", total=100, loss="", validation="")
        told: list[Evaluation] = []

        def show(now: TuneProgress) -> None:
            bar.update(task, completed=int(now.share * 100), loss=f"loss {now.loss:.3f}", validation=_told(now.last))
            if now.last is not None and now.last not in told:
                told.append(now.last)
                say(f"{now.last.losses:,} losses: {_told(now.last)}, {now.losses_per_s:.2f} losses/s", "dim")

        curve = trainer.run(show)
    best = best_of(curve)
    facts = {
        "adapter": str(out / "best"),
        "best": f"{_told(best)} after {best.losses:,} losses, {best.minutes:.0f} minutes",
        "before": _told(curve[0]),
        "to beat": _beaten(trainer.baselines),
        "trained": f"{curve[-1].losses:,} losses in {curve[-1].minutes:.0f} minutes",
    }
    console().print(facts_table("Tuned", facts))


def _beaten(baselines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())


def _told(point: Evaluation | None) -> str:
    if point is None:
        return ""
    agrees = "" if point.tau is None else f", Kendall's tau with the teacher {point.tau:.3f}"
    return f"validation loss {point.validation_loss:.3f}, NDCG@10 {point.validation_ndcg10:.3f}{agrees}"


def _examples(config: TuneConfig, shape: ShapeOptions) -> ExampleConfig:
    """Those that suit the mask, with what was asked for over them."""
    asked = {"num_candidates": shape.candidates, "num_history": shape.history, "negatives": shape.negatives}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value}
    examples = replace(examples_for(config.mask), **given)
    return replace(examples, borrowed=min(examples.borrowed, examples.num_candidates - 2))
