"""`rcllm enrich`: a catalogue with fields made of interactions and of described items.

Knows nothing of models that rank. Invariant: the output is whole or not there, and so is each file that is kept for the
next time.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from rcllm.cli.commands.enrich import FieldOptions
from rcllm.cli.inputs import load_inputs, tell_read
from rcllm.cli.options import ItemOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, say
from rcllm.cli.tables import facts_table
from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import Item, ItemId
from rcllm.data import Catalogue, histories
from rcllm.data import neighbours as near
from rcllm.data.neighbours import Lists, Neighbours, find_neighbours, put
from rcllm.data.popularity import with_chosen
from rcllm.data.requests import training_histories
from rcllm.durable import write, writing
from rcllm.errors import ConfigError, DataError
from rcllm.plain_json import as_json, read_object, to_json
from rcllm.sid.build import item_texts
from rcllm.sid.embed import FloatArray, SentenceEncoder, fetch_minilm

KNOWLEDGE = "knowledge"
_CHUNK = 1024  # texts that are embedded before they are kept
_MAX_TOKENS = 64  # of a text that is embedded
_LISTS = "lists.json"
_NO_VECTORS = np.zeros((0, 0), dtype=np.float32)


def enrich_command(out: Path, config: NeighbourConfig, field_options: FieldOptions, item_options: ItemOptions) -> None:
    """Writes the catalogue, and says what is in it and what changed."""
    kept = out.with_name(out.name + ".kept")
    check_file(out, item_options, field_options, beside=kept)
    if out.suffix != ".jsonl":
        raise ConfigError(f"expected --out to be named .jsonl, got {out.name}")
    inputs = load_inputs(item_options)
    if inputs.dataset is None:
        raise ConfigError("neighbours are made of interactions: give --dataset FOLDER")
    known = _read_knowledge(field_options.knowledge)
    rows = inputs.dataset.interactions
    catalogue = with_chosen(inputs.catalogue, rows)
    training = list(training_histories(histories(rows), catalogue).values())
    before = _lists_before(kept / _LISTS, config)
    with interruptible(GOES_ON):
        with busy("finding neighbours"):
            found = find_neighbours(catalogue, training, config, before)
        if found.num_without and not field_options.interactions_only:
            vectors = _vectors(catalogue, kept, field_options.encoder)
            found = find_neighbours(catalogue, training, config, before, vectors)
    catalogue = put(catalogue, near.FIELD, found.texts)
    if known:
        catalogue = put(catalogue, KNOWLEDGE, known)
    with writing(out):
        write(kept / _LISTS, to_json({"settings": as_json(config), "lists": found.lists}).encode())
        write(out, "".join(f"{to_json(_row(item))}\n" for item in catalogue.values()).encode())
    console().print(facts_table("Enriched", _facts(out, catalogue, found, len(before))))
    if strangers := [item_id for item_id in known if item_id not in catalogue]:
        say(f"warning: {len(strangers):,} described items are not in the catalogue, such as {strangers[0]!r}")


def _row(item: Item) -> dict[str, str]:
    """A field that is called as the id is would hide it, so that none may be."""
    if "item_id" in item.fields:
        raise DataError(f"item {item.item_id!r} has a field 'item_id' beside its id: rename that column")
    return {"item_id": item.item_id, **item.fields, **item.volatile}


def _facts(out: Path, catalogue: Mapping[ItemId, Item], found: Neighbours, num_before: int) -> dict[str, str]:
    fields = Counter(name for item in catalogue.values() for name in (near.FIELD, KNOWLEDGE) if name in item.fields)
    facts = {
        "catalogue": f"{out}: {len(catalogue):,} items",
        "neighbours": f"{fields[near.FIELD]:,} items, of which {len(found.by_text):,} by text alone",
    }
    if fields[KNOWLEDGE]:
        facts["knowledge"] = f"{fields[KNOWLEDGE]:,} items"
    if num_before:
        changed = f"{found.num_changed:,} of {num_before:,} lists"
        facts["changed since the last time"] = f"{changed}; made anew, {found.num_would_change:,} would have"
    return facts


def _lists_before(path: Path, config: NeighbourConfig) -> Lists:
    """The lists of an earlier run with the same settings; none of another. Raises DataError."""
    if not path.exists():
        return {}
    value = read_object(path.read_bytes(), str(path), DataError)
    if value.get("settings") != as_json(config):
        say(f"note: {path} was made with other settings, so that every list is made anew", "dim")
        return {}
    lists = value.get("lists")
    if not isinstance(lists, dict):
        raise DataError(f"{path}: expected lists of neighbours; delete it to make them anew")
    return {ItemId(item_id): tuple(map(ItemId, others)) for item_id, others in lists.items()}


def _read_knowledge(path: Path | None) -> dict[ItemId, str]:
    """Item → what is known of it. Raises DataError."""
    if path is None:
        return {}
    catalogue, report = Catalogue.read(path, "name")
    tell_read([report])
    texts = {item_id: item.fields["text"] for item_id, item in catalogue.items() if "text" in item.fields}
    if not texts:
        raise DataError(f"{path}: expected columns 'name' and 'text', as `rcllm describe` writes them")
    return texts


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Texts that are embedded together, and the file that keeps their vectors."""

    path: Path
    texts: Sequence[str]


def _vectors(catalogue: Mapping[ItemId, Item], kept: Path, encoder: Path | None) -> FloatArray:
    """[items, d]. Each chunk is kept as it is done, so that a killed run embeds none twice."""
    texts = item_texts(catalogue.values(), [near.TITLE, "categories", "genres", "brand"])
    folder = encoder or fetch_minilm()
    chunks = [_chunk(kept, folder, texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK)]
    missing = [chunk for chunk in chunks if not chunk.path.exists()]
    if missing:
        model = SentenceEncoder.load(folder, _MAX_TOKENS)
        with progress() as bar:
            task = bar.add_task("embedding items", total=len(texts))
            bar.advance(task, len(texts) - sum(len(chunk.texts) for chunk in missing))
            for chunk in missing:
                content = io.BytesIO()
                np.save(content, model.encode(chunk.texts))
                write(chunk.path, content.getvalue())
                bar.advance(task, len(chunk.texts))
    return np.concatenate([np.load(chunk.path) for chunk in chunks]).astype(np.float32) if chunks else _NO_VECTORS


def _chunk(kept: Path, encoder: Path, texts: Sequence[str]) -> _Chunk:
    digest = blake3("\n".join([str(encoder.resolve()), str(_MAX_TOKENS), *texts]).encode()).hexdigest()[:16]
    return _Chunk(kept / f"vectors-{digest}.npy", texts)
