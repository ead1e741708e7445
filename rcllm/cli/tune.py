"""`rcllm tune`. Knows nothing of how training works."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rcllm.cli.screen import busy, console, progress, say
from rcllm.cli.tables import facts_table
from rcllm.config import ModelConfig, PromptConfig, from_mapping
from rcllm.data import load_dataset
from rcllm.tune.setup import TEMPLATES, examples_for, make_trainer
from rcllm.tune.train import Evaluation, TuneConfig, TuneProgress

_LEARN, _DATA = "What to learn", "From what"
_MODEL, _DEFAULT = ModelConfig(), TuneConfig()


def tune_command(
    dataset: Annotated[
        list[Path],
        typer.Option(
            metavar="FOLDER",
            help="Interaction data; may repeat. Ids are prefixed by the folder's name.",
            rich_help_panel=_DATA,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter and its checkpoint go.")],
    model: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="The model to adapt.")] = _MODEL.path,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Prompt template to learn for; default: titles, and echo under the mask blocks."
        ),
    ] = None,
    mask: Annotated[
        str,
        typer.Option(
            metavar="causal|blocks",
            help="causal: an ordinary ranker. blocks: items and events see the instruction alone, so that reusing "
            "their KV is exact.",
            rich_help_panel=_LEARN,
        ),
    ] = "causal",
    readout: Annotated[
        str, typer.Option(metavar="pointwise|label", help="What the loss reads.", rich_help_panel=_LEARN)
    ] = "pointwise",
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="An adapter to go on from, for example under another mask.", rich_help_panel=_LEARN
        ),
    ] = None,
    losses: Annotated[
        int, typer.Option(min=1, help="Prompts to learn from, at most.", rich_help_panel=_LEARN)
    ] = _DEFAULT.losses,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this much training.", rich_help_panel=_LEARN)
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.", rich_help_panel=_LEARN)] = _DEFAULT.rank,
    learning_rate: Annotated[
        float, typer.Option(help="The highest; it rises, then falls.", rich_help_panel=_LEARN)
    ] = _DEFAULT.learning_rate,
    candidates: Annotated[
        int | None, typer.Option(min=2, help="Candidates in a prompt.", rich_help_panel=_DATA)
    ] = None,
    history: Annotated[int | None, typer.Option(min=1, help="Most events in a prompt.", rich_help_panel=_DATA)] = None,
    negatives: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND", help="uniform, popularity, retrieved; may repeat: taken in turns.", rich_help_panel=_DATA
        ),
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Losses between two validations.")
    ] = _DEFAULT.evaluate_every,
    validation_requests: Annotated[
        int, typer.Option(min=1, help="Requests of validation users that decide when to stop.")
    ] = _DEFAULT.validation_requests,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="Format of the data sets.", rich_help_panel=_DATA)
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Teach a language model to rank: LoRA with a listwise loss on interactions of training users.

    Run it again with the same options to go on after an interruption. It stops early when validation users gain nothing
    more; OUT/best is the best adapter so far, in peft's format, with a record of how it was made. Hours on 2 cores for
    the bundled model.

    Example: `rcllm tune --dataset amazon --mask blocks --start adapters/smollm2-135m-causal --out rankers/amazon`, then
    `rcllm rank --adapter rankers/amazon/best --template echo --readout pointwise …`
    """
    values = {
        "mask": mask,
        "readout": readout,
        "rank": rank,
        "alpha": 2.0 * rank,
        "learning_rate": learning_rate,
        "losses": losses,
        "evaluate_every": evaluate_every,
        "validation_requests": validation_requests,
        "seed": seed,
    }
    config = from_mapping(TuneConfig, values, "option")
    shape = {"num_candidates": candidates, "num_history": history, "negatives": tuple(negatives) if negatives else None}
    examples = replace(examples_for(config.mask), **{name: value for name, value in shape.items() if value is not None})  # type: ignore[arg-type]
    examples = replace(examples, borrowed=min(examples.borrowed, examples.num_candidates - 2))
    config = replace(config, examples=examples, minutes=math.inf if minutes is None else minutes)
    with busy("reading data and model"):
        datasets = [load_dataset(format, folder) for folder in dataset]
        prompt = PromptConfig(template=template or TEMPLATES[config.mask])
        trainer = make_trainer(ModelConfig(path=model), prompt, datasets, config, out, start)
    with progress("loss", "validation") as bar:
        task = bar.add_task("tuning", total=1000, loss="", validation="")
        told: list[Evaluation] = []

        def show(now: TuneProgress) -> None:
            bar.update(task, completed=int(now.share * 1000), loss=f"loss {now.loss:.3f}", validation=_told(now.last))
            if now.last is not None and now.last not in told:
                told.append(now.last)
                say(f"{now.last.losses:,} losses: {_told(now.last)}, {now.losses_per_s:.2f} losses/s", "dim")

        curve = trainer.run(show)
    best = min(curve, key=lambda point: point.validation_loss)
    facts = {
        "adapter": str(out / "best"),
        "best": f"{_told(best)} after {best.losses:,} losses, {best.minutes:.0f} minutes",
        "before": _told(curve[0]),
        "trained": f"{curve[-1].losses:,} losses in {curve[-1].minutes:.0f} minutes",
    }
    console().print(facts_table("Tuned", facts))


def _told(point: Evaluation | None) -> str:
    return (
        "" if point is None else f"validation loss {point.validation_loss:.3f}, NDCG@10 {point.validation_ndcg10:.3f}"
    )
