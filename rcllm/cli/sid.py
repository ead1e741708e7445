"""`rcllm sid build` and `rcllm sid train`. Knows nothing of how codes are found or networks trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rcllm.cli.options import spread
from rcllm.cli.screen import busy, console, progress, say
from rcllm.cli.tables import facts_table
from rcllm.codes.sid_files import read_codes, write_codes
from rcllm.core.ranking import Interaction, ItemId
from rcllm.data import Catalogue, ReadReport, load_dataset
from rcllm.data.interactions import InteractionColumns, generic_interactions, parse_user, read_log
from rcllm.errors import ConfigError, DataError
from rcllm.sid.build import BuildConfig, build_codes, code_index_of, item_texts, split_histories
from rcllm.sid.collaborative import FloatArray
from rcllm.sid.embed import SentenceEncoder, fetch_minilm
from rcllm.sid.network import NetworkConfig
from rcllm.sid.quantise import CodeConfig, Codes, enough_levels
from rcllm.sid.sequences import SequenceConfig
from rcllm.sid.train import CodeEvaluation, CodeTrainer, TrainConfig, TrainProgress
from rcllm.sid.vocabulary import sid_text

_DATA, _CODES, _LEARN, _SIZE = "From what", "Which codes", "How to learn", "How large"
_CODE, _BUILD = CodeConfig(), BuildConfig()
_TRAIN, _NETWORK, _SEQUENCES = TrainConfig(), NetworkConfig(), SequenceConfig()

sid = typer.Typer(no_args_is_help=True, help="Semantic IDs: codes of items, and a decoder that generates them.")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where items and interactions come from."""

    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Catalogue (.jsonl, .csv, .parquet): an item per row.", rich_help_panel=_DATA
        ),
    ] = None
    interactions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows of user_id, item_id and timestamp, or of user_id and items, oldest first. Of them, training "
            "users alone are learnt from.",
            rich_help_panel=_DATA,
        ),
    ] = None
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Both of them, instead of the files.", rich_help_panel=_DATA),
    ] = None
    format: Annotated[
        str, typer.Option(metavar="NAME", help="Format of the data set; auto tells it.", rich_help_panel=_DATA)
    ] = "auto"
    id_field: Annotated[
        str, typer.Option(metavar="NAME", help="Column of --items that holds the id.", rich_help_panel=_DATA)
    ] = "item_id"


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """What is quantised."""

    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="[items, d] in the order of the catalogue, instead of embeddings of the items' texts.",
            rich_help_panel=_CODES,
        ),
    ] = None
    encoder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Sentence encoder (BERT, mean pooling); default all-MiniLM-L6-v2, fetched once (84 MB).",
            rich_help_panel=_CODES,
        ),
    ] = None
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Field to embed; may repeat. Default: all.", rich_help_panel=_CODES),
    ] = None
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Longer texts are cut before they are embedded.", rich_help_panel=_CODES)
    ] = 128
    text_dimensions: Annotated[
        int, typer.Option(min=0, help="Principal components to keep; 0: all.", rich_help_panel=_CODES)
    ] = _BUILD.text_dimensions
    collaborative_weight: Annotated[
        float,
        typer.Option(min=0.0, help="Of who touched what, against the text; 0: text alone.", rich_help_panel=_CODES),
    ] = _BUILD.collaborative_weight


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """How to learn."""

    epochs: Annotated[int, typer.Option(min=1, help="At most.", rich_help_panel=_LEARN)] = _TRAIN.epochs
    minutes: Annotated[float | None, typer.Option(help="Stop after this much training.", rich_help_panel=_LEARN)] = None
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises, then falls.", rich_help_panel=_LEARN)] = (
        _TRAIN.learning_rate
    )
    patience: Annotated[
        int, typer.Option(min=1, help="Epochs without gain before it stops.", rich_help_panel=_LEARN)
    ] = _TRAIN.patience
    history: Annotated[int, typer.Option(min=1, help="Most items of a history.", rich_help_panel=_LEARN)] = (
        _SEQUENCES.max_items
    )
    skip: Annotated[float, typer.Option(help="Chance to leave an item out of a history.", rich_help_panel=_LEARN)] = (
        _SEQUENCES.skip
    )
    shuffle: Annotated[float, typer.Option(help="Chance to put a history in random order.", rich_help_panel=_LEARN)] = (
        _SEQUENCES.shuffle
    )
    dropout: Annotated[float, typer.Option(help="Of embeddings and layers.", rich_help_panel=_LEARN)] = _NETWORK.dropout
    hidden_size: Annotated[
        int, typer.Option(min=32, help="A multiple of 32: heads have 32 dimensions.", rich_help_panel=_SIZE)
    ] = _NETWORK.hidden_size
    layers: Annotated[int, typer.Option(min=1, rich_help_panel=_SIZE)] = _NETWORK.num_layers

    def config(self, seed: int) -> TrainConfig:
        """Raises ConfigError."""
        if self.hidden_size % 32:
            raise ConfigError(f"expected --hidden-size to be a multiple of 32, got {self.hidden_size}")
        heads = self.hidden_size // 32
        network = NetworkConfig(
            self.hidden_size, self.layers, heads, heads, ffn_size=3 * self.hidden_size, dropout=self.dropout
        )
        config = TrainConfig(
            network,
            SequenceConfig(self.history, skip=self.skip, shuffle=self.shuffle),
            self.epochs,
            math.inf if self.minutes is None else self.minutes,
            self.learning_rate,
            patience=self.patience,
            seed=seed,
        )
        config.check()
        return config


@sid.command("build")
@spread
def build_command(
    source: SourceOptions,
    vectors: VectorOptions,
    out: Annotated[Path, typer.Option(metavar="FILE", help="codes.parquet, or index.json as LC-Rec writes it.")],
    levels: Annotated[
        int | None,
        typer.Option(min=2, max=6, help="Codes of an item; default by the catalogue's size.", rich_help_panel=_CODES),
    ] = None,
    size: Annotated[int, typer.Option(min=2, help="Codes of a level.", rich_help_panel=_CODES)] = _CODE.size,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Give every item its semantic ID: residual k-means over embeddings of its text, and over who touched it.

    Items that would share an ID are told apart in the last level. Of interactions, training users alone are used.

    Example: `rcllm sid build --items items.jsonl --interactions users.jsonl --out codes.parquet`
    """
    if out.suffix not in (".parquet", ".json"):
        raise ConfigError(f"expected --out to be named .parquet or .json, got {out.name}")
    catalogue, rows = _read(source)
    shape = CodeConfig(levels or enough_levels(len(catalogue), size), size, seed=seed)
    shape.check(len(catalogue))
    config = BuildConfig(shape, vectors.text_dimensions, vectors.collaborative_weight)
    embeddings = _embeddings(catalogue, vectors)
    training = split_histories(rows, _numbers(catalogue), "train")
    together = bool(training) and vectors.collaborative_weight > 0
    with progress() as bar:
        task = bar.add_task("quantising levels", total=shape.levels)
        codes = build_codes(embeddings, training, config, lambda done: bar.update(task, completed=done))
    write_codes(out, code_index_of(codes, tuple(catalogue)))
    console().print(_codes_table(codes))
    first = next(iter(catalogue))
    facts = {
        "codes": f"{out}: {len(catalogue):,} items, such as {first} {sid_text(codes.codes[0].tolist())}",
        "made of": f"embeddings and {len(training):,} training users" if together else "embeddings alone",
        "collisions": f"{codes.collisions:,} items shared a semantic ID; none does now, {codes.moved:,} moved",
    }
    console().print(facts_table("Semantic IDs", facts))


@sid.command("train")
@spread
def train_command(
    source: SourceOptions,
    codes: Annotated[Path, typer.Option(metavar="FILE", help="Of `rcllm sid build`, or an index.json.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where model and checkpoint go.")],
    schedule: ScheduleOptions,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a small decoder that continues a user's history with the semantic ID of the next item.

    OUT is a Hugging Face folder (Qwen3) with the catalogue inside model.safetensors; serve it with `rcllm recommend`.
    Run it again with the same options to go on after an interruption. It stops early when validation users gain nothing
    more. Minutes on 2 cores for some thousand users. Serve it with histories of at most --history items: it has seen no
    longer ones.

    Example: `rcllm sid train --items items.jsonl --interactions users.jsonl --codes codes.parquet --out model`
    """
    config = schedule.config(seed)
    if source.interactions is None and source.dataset is None:
        raise ConfigError("there is nothing to learn from: give --interactions FILE or --dataset FOLDER")
    with busy("reading codes"):
        code_index = read_codes(codes)
    numbers = {item_id: number for number, item_id in enumerate(code_index.item_ids)}
    catalogue, rows = _read(source)
    if strangers := [item_id for item_id in catalogue if item_id not in numbers]:
        say(f"warning: {len(strangers):,} of {len(catalogue):,} items have no codes, such as {strangers[0]!r}")
    train, validation = (split_histories(rows, numbers, split) for split in ("train", "validation"))
    trainer = CodeTrainer(code_index, train, validation, config, out)
    with progress("epoch", "loss", "validation") as bar:
        task = bar.add_task("training", total=1000, epoch="", loss="", validation="")
        told: list[CodeEvaluation] = []

        def show(now: TrainProgress) -> None:
            loss, epoch = f"loss {now.loss:.3f}", f"epoch {now.epoch}"
            bar.update(task, completed=int(now.share * 1000), epoch=epoch, loss=loss, validation=_told(now.last))
            if now.last is not None and now.last not in told:
                told.append(now.last)
                say(f"epoch {now.last.epoch}: {_told(now.last)}, {now.tokens_per_s:,.0f} tokens/s", "dim")

        curve = trainer.run(show)
    best = min(curve, key=lambda point: point.validation_loss)
    facts = {
        "model": str(out),
        "best": f"epoch {best.epoch}: {_told(best)}; a guess among all items has {math.log(code_index.num_items):.3f}",
        "trained": f"{curve[-1].epoch} epochs in {curve[-1].minutes:.1f} minutes, {len(trainer.histories):,} users",
    }
    console().print(facts_table("Trained", facts))


def _told(point: CodeEvaluation | None) -> str:
    return "" if point is None else f"validation loss {point.validation_loss:.3f}"


def _read(source: SourceOptions) -> tuple[Catalogue, Sequence[Interaction]]:
    """The catalogue, and the interactions where there are any; tells of rows that could not be used."""
    if source.items is None and source.dataset is None:
        raise ConfigError("there are no items: give --items FILE (a catalogue) or --dataset FOLDER")
    with busy("reading items"):
        data = None if source.dataset is None else load_dataset(source.format, source.dataset)
        reports: list[ReadReport] = list(data.reports) if data else []
        if source.items is not None:
            catalogue, report = Catalogue.read(source.items, source.id_field)
            reports.append(report)
        else:
            assert data is not None
            catalogue = data.catalogue
        rows: Sequence[Interaction] = data.interactions if data else ()
        if source.interactions is not None:
            one_each = generic_interactions(InteractionColumns())
            rows, report = read_log(
                source.interactions,
                lambda fields: parse_user(fields) if "items" in fields else one_each(fields),
                items=catalogue,
            )
            reports.append(report)
    for each in reports:
        if each.rows_skipped:
            say(f"warning: {each}")
    return catalogue, rows


def _numbers(catalogue: Catalogue) -> dict[ItemId, int]:
    return {item_id: number for number, item_id in enumerate(catalogue)}


def _embeddings(catalogue: Catalogue, options: VectorOptions) -> FloatArray:
    if options.embeddings is not None:
        return _read_embeddings(options.embeddings, len(catalogue))
    texts = item_texts(catalogue.values(), options.field or ())
    if not any(texts):
        raise DataError("no item has text in the fields to embed; name others with --field, or give --embeddings")
    with busy("loading the sentence encoder"):
        encoder = SentenceEncoder.load(options.encoder or fetch_minilm(), options.max_tokens)
    with progress() as bar:
        task = bar.add_task("embedding items", total=len(texts))
        return encoder.encode(texts, lambda done: bar.update(task, completed=done))


def _read_embeddings(path: Path, num_items: int) -> FloatArray:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a .npy file of numbers: {error}") from error
    if table.ndim != 2 or table.shape[0] != num_items or not np.issubdtype(table.dtype, np.floating):
        raise DataError(
            f"{path}: expected floats [{num_items} items, dimensions], in the order of the catalogue, got "
            f"{table.dtype} {list(table.shape)}"
        )
    return np.asarray(table, dtype=np.float32)


def _codes_table(codes: Codes) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Levels", title_justify="left")
    for column in ("level", "codes used", "entropy, bits", "of at most", "variance left"):
        table.add_column(column, justify="right")
    for level, (size, stats) in enumerate(zip(codes.sizes, codes.levels, strict=True)):
        cells = (f"{stats.used} / {size}", f"{stats.entropy_bits:.2f}", f"{math.log2(size):.2f}", f"{stats.error:.1%}")
        table.add_row(chr(ord("a") + level), *cells)
    return table
