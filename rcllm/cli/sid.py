"""`rcllm sid build` and `rcllm sid train`. Knows nothing of how codes are found or networks trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rcllm.cli.codes import code_facts, code_warnings, comparison_table, levels_of, verdict
from rcllm.cli.commands.sid import LevelOptions, SourceOptions, VectorOptions
from rcllm.cli.inputs import check_of_items, columns_of, tell_read
from rcllm.cli.outputs import check_file, check_folder
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, say
from rcllm.cli.tables import facts_table
from rcllm.codes.index import CodeIndex
from rcllm.codes.sid_files import read_codes, write_codes
from rcllm.core.ranking import Interaction, ItemId
from rcllm.data import Catalogue, ReadReport, load_dataset, read_interactions
from rcllm.errors import ConfigError, DataError
from rcllm.sid.build import build_codes, code_index_of, item_texts, split_histories
from rcllm.sid.collaborative import FloatArray
from rcllm.sid.config import BuildConfig, CodeConfig, NetworkConfig, SequenceConfig, TrainConfig
from rcllm.sid.embed import SentenceEncoder, fetch_minilm
from rcllm.sid.held_out import advice, cases_of, compare_held_out
from rcllm.sid.quantise import fitting
from rcllm.sid.recommend import HeldOut, add_knn
from rcllm.sid.train import CodeEvaluation, CodeTrainer, TrainProgress, best_of, check_out
from rcllm.sid.vocabulary import sid_text


def build_command(
    source: SourceOptions,
    vectors: VectorOptions,
    config: BuildConfig,
    out: Path,
    level: LevelOptions,
    shape: CodeConfig,
) -> None:
    """Writes the codes and says what they are like."""
    if out.suffix not in (".parquet", ".json"):
        raise ConfigError(f"expected --out to be named .parquet or .json, got {out.name}")
    check_file(out, source, vectors)
    catalogue, rows = _read(source)
    shape = fitting(len(catalogue), level.levels, level.size, shape.seed)
    config = replace(config, codes=shape)
    embeddings = _embeddings(catalogue, vectors)
    training = split_histories(rows, _numbers(catalogue), "train")
    together = bool(training) and config.collaborative_weight > 0
    with progress() as bar:
        task = bar.add_task("quantising levels", total=shape.levels)
        codes = build_codes(embeddings, training, config, lambda done: bar.update(task, completed=done))
    write_codes(out, code_index_of(codes, tuple(catalogue)))
    console().print(levels_of(codes))
    first = next(iter(catalogue))
    facts = {
        "codes": f"{out}: {len(catalogue):,} items, such as {first} {sid_text(codes.codes[0].tolist())}",
        "made of": f"embeddings and {len(training):,} training users" if together else "embeddings alone",
    }
    console().print(facts_table("Semantic IDs", facts | code_facts(codes)))
    for warning in code_warnings(codes):
        say(f"warning: {warning}")


def train_command(
    source: SourceOptions,
    codes: Path,
    out: Path,
    schedule: TrainConfig,
    sequences: SequenceConfig,
    network: NetworkConfig,
) -> None:
    """Trains, and says what became better."""
    config = replace(schedule, sequences=sequences, network=_network(network))
    config.check()
    if source.interactions is None and source.dataset is None:
        raise ConfigError("there is nothing to learn from: give --interactions FILE or --dataset FOLDER")
    check_folder(out, source, codes)
    check_out(out)
    with busy("reading codes"):
        code_index = read_codes(codes)
    numbers = {item_id: number for number, item_id in enumerate(code_index.item_ids)}
    catalogue, rows = _read(source)
    if strangers := [item_id for item_id in catalogue if item_id not in numbers]:
        say(f"warning: {len(strangers):,} of {len(catalogue):,} items have no codes, such as {strangers[0]!r}")
    train, validation = (split_histories(rows, numbers, split) for split in ("train", "validation"))
    trainer = CodeTrainer(code_index, train, validation, config, out)
    with interruptible(GOES_ON), progress("epoch", "loss", "validation") as bar:
        task = bar.add_task("training, percent", total=100, epoch="", loss="", validation="")
        told: list[CodeEvaluation] = []

        def show(now: TrainProgress) -> None:
            loss, epoch = f"loss {now.loss:.3f}", f"epoch {now.epoch}"
            bar.update(task, completed=int(now.share * 100), epoch=epoch, loss=loss, validation=_told(now.last))
            if now.last is not None and now.last not in told:
                told.append(now.last)
                say(f"epoch {now.last.epoch}: {_told(now.last)}, {now.tokens_per_s:,.0f} tokens/s", "dim")

        curve = trainer.run(show)
    best = best_of(curve)
    facts = {
        "model": str(out),
        "best": f"epoch {best.epoch}: {_told(best)}; a guess among all items has {math.log(code_index.num_items):.3f}",
        "trained": f"{curve[-1].epoch} epochs in {curve[-1].minutes:.1f} minutes, {len(trainer.histories):,} users",
    }
    console().print(facts_table("Trained", facts))
    with busy("asking validation users"):
        knn = add_knn(out, trainer.histories, validation)
    say(f"item-kNN has {knn.share:.0%} of the scores, by validation users; `--knn 0` leaves it out")
    _compare(code_index, trainer, split_histories(rows, numbers, "test"), validation)


def _compare(
    code_index: CodeIndex,
    trainer: CodeTrainer,
    test: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]],
) -> None:
    """Shows the model beside its decoder alone, a guess, popularity and item-kNN, and says where it loses."""
    max_items = trainer.config.sequences.max_items
    whom, held_out = ("test users", test) if cases_of(test)[0] else ("validation users", validation)
    with busy("asking held-out users"):
        asked = HeldOut(trainer.folder, code_index.item_ids)
        found = compare_held_out(
            asked.answer(), asked.answer(knn=0.0), trainer.histories, held_out, code_index.num_items, max_items
        )
    if found is None:
        say("no held-out user chose something new at last, so that nothing tells what the model is worth")
        return
    console().print(comparison_table(found, whom))
    curve = trainer.state.curve
    tries = advice(
        len(trainer.histories),
        code_index.num_items / len(np.unique(code_index.codes[:, 0])),
        still_better=best_of(curve) is curve[-1],
    )
    if told := verdict(found, tries):
        say(f"warning: {told}")


def _network(asked: NetworkConfig) -> NetworkConfig:
    """Heads of 32 dimensions, which the compiled kernels serve, as many as the size holds."""
    if asked.hidden_size % 32:
        raise ConfigError(f"expected --hidden-size to be a multiple of 32, got {asked.hidden_size}")
    heads = asked.hidden_size // 32
    return replace(asked, num_heads=heads, num_kv_heads=heads, ffn_size=3 * asked.hidden_size)


def _told(point: CodeEvaluation | None) -> str:
    if point is None:
        return ""
    return f"validation loss {point.validation_loss:.3f}, NDCG@10 {point.validation_ndcg10:.3f}"


def _read(source: SourceOptions) -> tuple[Catalogue, Sequence[Interaction]]:
    """The catalogue, and the interactions where there are any; tells of rows that could not be used."""
    if source.items is None and source.dataset is None:
        raise ConfigError("there are no items: give --items FILE (a catalogue) or --dataset FOLDER")
    check_of_items(source)
    with busy("reading items"):
        columns = (
            None if source.interactions is not None else columns_of(source)
        )  # they are those of what holds the log
        data = None if source.dataset is None else load_dataset(source.format, source.dataset, columns=columns)
        reports: list[ReadReport] = list(data.reports) if data else []
        if source.items is not None:
            catalogue, report = Catalogue.read(source.items, source.id_field)
            reports.append(report)
        else:
            assert data is not None
            catalogue = data.catalogue
        rows: Sequence[Interaction] = data.interactions if data else ()
        if source.interactions is not None:
            rows, report = read_interactions(source.interactions, columns_of(source), items=catalogue)
            reports.append(report)
    tell_read(reports, data.notes if data else ())
    return catalogue, rows


def _numbers(catalogue: Catalogue) -> dict[ItemId, int]:
    return {item_id: number for number, item_id in enumerate(catalogue)}


def _embeddings(catalogue: Catalogue, options: VectorOptions) -> FloatArray:
    if options.embeddings is not None:
        if replace(options, embeddings=None) != VectorOptions():
            raise ConfigError("--embeddings are read as they are; leave out --encoder, --field and --max-tokens")
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
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(table, np.ndarray):
        table.close()
        raise DataError(f"{path} is an archive of arrays; expected one array, as np.save writes it")
    if table.ndim != 2 or table.shape[0] != num_items or not np.issubdtype(table.dtype, np.floating):
        raise DataError(
            f"{path}: expected floats [{num_items} items, dimensions], in the order of the catalogue, got "
            f"{table.dtype} {list(table.shape)}"
        )
    return np.asarray(table, dtype=np.float32)
