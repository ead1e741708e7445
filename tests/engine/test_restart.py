"""Engines over a store on disk: what one computed the next one reads, and what was erased nobody finds again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.cache.rates import Rate
from rcllm.config import StoreConfig
from rcllm.core.ranking import ItemId, UserId
from rcllm.engine.engine import Engine
from rcllm.errors import StoreWarning
from tests.engine import tiny

ASKED = tiny.request(6, (1, 2), level="blocks")
MINE = tiny.request(3, ("my own words", "and more of them"), level="exact", user="ann")


def built(folder: Path, template: str | None = None, **cache: object) -> Engine:
    config = tiny.config(**cache)
    if template is not None:
        config = replace(config, prompt=replace(config.prompt, template=template))
    config = replace(config, store=StoreConfig(enabled=True, folder=str(folder), disk_mb=64))
    engine = Engine.build(tiny.catalogue(), config)
    engine.pool.rates.bytes_of["disk"] = Trusted(1e15)
    return engine


class Trusted(Rate):
    """Blocks of so small a model are sooner computed than read; that decision has tests of its own."""

    def saw(self, amount: float, seconds: float) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def sources(engine: Engine, asked: object = ASKED) -> set[str]:
    receipt = engine.rank(asked).receipt  # type: ignore[arg-type]
    return {block.source for block in receipt.blocks if block.num_reused or block.source == "computed"}


def test_the_first_request_after_a_restart_is_read_from_disk(folder: Path) -> None:
    with built(folder) as engine:
        wanted = engine.rank(ASKED).scores
        engine.warm()
    with built(folder) as engine:
        answer = engine.rank(ASKED)
        assert answer.receipt.num_computed == 0
        assert {b.source for b in answer.receipt.blocks if b.num_reused} == {"disk"}
        assert answer.scores == wanted
        assert sources(engine) == {"device"}
        assert engine.warm().computed_tokens == 0


def test_a_catalogue_that_does_not_fit_is_read_in_place(folder: Path) -> None:
    with built(folder) as engine:
        engine.warm()
        wanted = engine.rank(ASKED).scores
    with built(folder, pool_mb=1) as engine:
        engine.pool = engine.pool  # the smallest pool there is holds this catalogue, so fill it
        engine.pool._index.budget = engine.pool._index.used
        answer = engine.rank(ASKED)
        assert {b.source for b in answer.receipt.blocks if b.num_reused} == {"disk"}
        assert answer.scores == wanted
        assert engine.stats().num_blocks == 0


def test_another_template_or_dtype_reads_nothing_of_the_old(folder: Path) -> None:
    with built(folder) as engine:
        engine.rank(ASKED)
        spaces = {engine.pool._below.space}
    with built(folder, kv_dtype="fp16") as engine:
        assert "disk" not in sources(engine)
        spaces.add(engine.pool._below.space)
    with built(folder, template="titles") as engine:
        assert "disk" not in sources(engine)
        spaces.add(engine.pool._below.space)
    assert len(spaces) == 3


def test_an_erased_user_is_in_no_file_of_the_next_process(folder: Path) -> None:
    with built(folder) as engine:
        engine.rank(MINE)
    with built(folder) as engine:
        assert "disk" in sources(engine, MINE)
        assert engine.erase_user(UserId("ann")) >= 2
        assert engine.erase_user(UserId("ann")) == 0
    with built(folder) as engine:
        history = [b.source for b in engine.rank(MINE).receipt.blocks if b.kind == "history"]
        assert set(history) == {"fresh"}
    assert b"ann" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_item_that_changed_while_nobody_ran_is_not_read(folder: Path) -> None:
    with built(folder) as engine:
        engine.warm()
    with built(folder) as engine:
        changed = replace(engine.catalogue[tiny.IDS[0]], fields={"title": "quite another thing"})
        assert engine.upsert_items([changed]).num_blocks == 2, "as a candidate and as an event"
        receipt = engine.rank(ASKED).receipt
        by_owner = {b.owner: b.source for b in receipt.blocks if b.slot is not None and b.num_reused}
        assert by_owner[str(tiny.IDS[0])] == "computed"
        assert by_owner[str(ItemId(tiny.IDS[1]))] == "disk"


def test_what_was_learned_of_the_tiers_is_known_after_a_restart(folder: Path) -> None:
    with built(folder) as engine:
        engine.pool.rates.flops.saw(7e9, 1.0)
    config = replace(tiny.config(), store=StoreConfig(enabled=True, folder=str(folder)))
    with Engine.build(tiny.catalogue(), config) as engine:
        assert engine.pool.rates.flops.per_s == pytest.approx(7e9, rel=0.5)


def test_a_folder_that_is_no_store_is_told_of_and_requests_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(StoreWarning, match="Nothing is kept on disk"):
        engine = built(tmp_path / "file")
    with engine:
        assert engine.rank(ASKED).scores == tiny.build().rank(ASKED).scores
        assert engine.stats().tiers == ()
