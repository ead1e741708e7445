"""Building a semantic pool, its file, and the KV blocks that come out of it, against plain prefills."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.core.ranking import Event, Interaction, Item, ItemId, TokenIds, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError, ModelError
from rcllm.prototypes.build import BuildProgress, BuildReport, PrototypeBuilder
from rcllm.prototypes.config import PrototypeConfig
from rcllm.prototypes.pool import PrototypePool
from rcllm.prototypes.texts import dataset_histories, file_histories, token_runs
from rcllm.reuse.assemble import assemble_blocks
from tests.engine import tiny
from tests.killed import run_killed

CONFIG = PrototypeConfig(prototypes=500, bits=6, bucket_width=4, texts_per_shard=3, seed=1)


def texts(engine: Engine, count: int = 15) -> list[TokenIds]:
    histories = [tuple(Event(tiny.IDS[(n * 7 + step * 3) % 58]) for step in range(4)) for n in range(count)]
    return token_runs(engine.prompter, histories, "history")


def builder(engine: Engine, out: Path, kv_dtype: torch.dtype = torch.float32, **options: object) -> PrototypeBuilder:
    config = replace(CONFIG, **options)  # type: ignore[arg-type]
    return PrototypeBuilder(engine.decoder, engine.prompter, config, out, model_id=engine.model_id, kv_dtype=kv_dtype)


def build(engine: Engine, out: Path, **options: object) -> BuildReport:
    return builder(engine, out, **options).run(texts(engine), "histories")


def opened(engine: Engine, path: Path) -> PrototypePool:
    return PrototypePool.open(path, engine.decoder, engine.prompter.namespace)


def prefilled(engine: Engine, run: TokenIds) -> torch.Tensor:
    """KV of a run after the instruction, in one plain pass; K turned to block-local positions."""
    instruction = engine.prompter.instructions["history_first"]
    work = assemble_blocks([instruction + run], None, 0, engine.decoder.device)
    kv = engine.decoder.forward(work).kept[0]
    own = kv[:, :, :, len(instruction) :].clone()
    back = torch.full((len(run),), -len(instruction))
    own[:, 0] = (
        engine.decoder.rope.shift(own[:, 0].transpose(1, 2).flatten(0, 1), back.repeat(len(kv)))
        .unflatten(0, (len(kv), len(run)))
        .transpose(1, 2)
    )
    return own


# ---- what is built --------------------------------------------------------------------------------------------------


def test_prototypes_hold_the_kv_of_their_member_in_its_context(any_engine: Engine, tmp_path: Path) -> None:
    runs = texts(any_engine, 1)
    builder(any_engine, tmp_path / "pool", threshold=1.0).run(runs, "one history")
    pool = opened(any_engine, tmp_path / "pool")
    matches = pool.match(runs[0], 0)
    assert matches.reused.sum() > 10
    expected = prefilled(any_engine, runs[0])
    got = pool.block(matches)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    words = list(zip(runs[0], (np.arange(len(runs[0])) // CONFIG.bucket_width).tolist(), strict=True))
    firsts = [i for i in np.flatnonzero(matches.reused).tolist() if words.index(words[i]) == i]
    torch.testing.assert_close(got[:, :, :, firsts], expected[:, :, :, firsts], atol=2e-5, rtol=1e-4)
    assert not got[:, :, :, np.flatnonzero(~matches.reused)].any()


def test_layer_0_is_right_wherever_the_same_token_stands(engine: Engine, tmp_path: Path) -> None:
    runs = texts(engine)
    build(engine, tmp_path / "pool", threshold=1.0)
    pool = opened(engine, tmp_path / "pool")
    matches = pool.match(runs[2], 0)
    place = np.flatnonzero(matches.reused)
    assert len(place) > 10
    got, expected = pool.block(matches), prefilled(engine, runs[2])
    torch.testing.assert_close(got[0][:, :, place], expected[0][:, :, place], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(got[-1][:, :, place], expected[-1][:, :, place], atol=1e-3)  # deeper, it is approximate


def test_several_members_are_averaged(engine: Engine, tmp_path: Path) -> None:
    run = texts(engine, 1)[0]
    runs = [run, run[-1:] + run[1:]]  # the same words after another beginning
    builder(engine, tmp_path / "pool", threshold=1.0, bucket_width=1, members=2).run(runs, "two histories")
    pool = opened(engine, tmp_path / "pool")
    matches = pool.match(run, 0)
    place = [i for i in np.flatnonzero(matches.reused).tolist() if i > 0]
    assert place
    mean = (prefilled(engine, runs[0])[:, :, :, place] + prefilled(engine, runs[1])[:, :, :, place]) / 2
    torch.testing.assert_close(pool.block(matches)[:, :, :, place], mean, atol=2e-5, rtol=1e-4)


def test_nothing_that_is_always_fresh_gets_in(engine: Engine, tmp_path: Path) -> None:
    build(engine, tmp_path / "pool")
    pool = opened(engine, tmp_path / "pool")
    told = {engine.prompter.tokenizer.decode([token]) for token in pool.matcher.index.words.token_ids.tolist()}
    assert told
    assert not [text for text in told if any(c.isdigit() for c in text) or not any(c.isalpha() for c in text)]


def test_the_report_tells_sizes_and_what_new_texts_find(engine: Engine, tmp_path: Path) -> None:
    report = builder(engine, tmp_path / "pool", torch.float16).run(texts(engine, 58), "histories")
    header, spec = report.header, engine.decoder.spec
    assert header.prototypes * spec.kv_bytes_per_token(2) == report.bytes_per_layer * spec.num_layers
    assert report.file_bytes > header.kv_bytes
    assert report.covered_share == 1.0  # 500 prototypes are enough
    assert report.held_out is not None
    assert report.held_out.num_texts == 2
    assert 0 < report.held_out.reused_share < report.held_out.language_share <= 1
    assert opened(engine, tmp_path / "pool")._kv.dtype == torch.float16


def test_fewer_prototypes_stand_for_less(engine: Engine, tmp_path: Path) -> None:
    whole, few = (build(engine, tmp_path / f"pool{n}", prototypes=n) for n in (500, 30))
    assert few.header.prototypes == 30
    assert few.covered_share < whole.covered_share


# ---- interruption ---------------------------------------------------------------------------------------------------


class _KilledError(Exception):
    pass


def test_an_interrupted_build_goes_on_and_ends_in_the_same_file(engine: Engine, tmp_path: Path) -> None:
    build(engine, tmp_path / "whole")

    def die(now: BuildProgress) -> None:
        if now.done_shards == 2:
            raise _KilledError

    out = tmp_path / "pool"
    with pytest.raises(_KilledError):
        builder(engine, out).run(texts(engine), "histories", die)
    assert not out.exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool.work").glob("shard-*")}
    assert len(done) == 2
    kept: list[bool] = []

    def watch(now: BuildProgress) -> None:
        kept.append(all(path.stat().st_mtime_ns == time for path, time in done.items()))
        assert now.done_shards <= now.num_shards

    builder(engine, out).run(texts(engine), "histories", watch)
    assert len(kept) > 2
    assert all(kept)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("pool")] == ["pool"]


def test_another_build_in_the_work_folder_is_refused(engine: Engine, tmp_path: Path) -> None:
    def die(now: BuildProgress) -> None:
        raise _KilledError

    with pytest.raises(_KilledError):
        builder(engine, tmp_path / "pool").run(texts(engine), "histories", die)
    with pytest.raises(ConfigError, match="unfinished build with other texts"):
        build(engine, tmp_path / "pool", members=2)
    with pytest.raises(ConfigError, match="unfinished build with other texts"):
        builder(engine, tmp_path / "pool").run(texts(engine, 14), "histories")


def test_options_that_cannot_work_are_refused(engine: Engine, tmp_path: Path) -> None:
    for options in ({"tables": 0}, {"bits": 60}, {"threshold": 0.0}, {"members": 0}):
        with pytest.raises(ConfigError):
            builder(engine, tmp_path / "pool", **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no token"):
        builder(engine, tmp_path / "pool").run([engine.prompter.tokenizer.encode("12345")], "numbers")


# ---- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(engine: Engine, tmp_path: Path) -> Path:
    build(engine, tmp_path / "pool")
    return tmp_path / "pool"


def test_the_file_is_mapped_and_not_read(engine: Engine, path: Path) -> None:
    pool = opened(engine, path)
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in part.split("-")) for part in mapped]
    assert any(start <= pool._kv.data_ptr() < stop for start, stop in ranges)


def test_another_model_or_template_is_refused(engine: Engine, path: Path) -> None:
    with pytest.raises(ConfigError, match="another model, adapter, tokenizer"):
        PrototypePool.open(path, engine.decoder, engine.prompter.namespace + b"x")


@pytest.mark.parametrize("size", [4, 200, -1])
def test_a_truncated_file_is_refused(engine: Engine, path: Path, size: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ModelError, match="not a whole semantic pool"):
        opened(engine, path)


def test_a_missing_or_foreign_file_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no semantic pool"):
        opened(engine, tmp_path / "nothing")
    with pytest.raises(ModelError, match="but no semantic pool"):
        opened(engine, tiny.model_folder() / "model.safetensors")


def test_another_format_is_refused(engine: Engine, path: Path) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    meta = json.loads(head["__metadata__"]["rcllm_semantic_pool"])
    head["__metadata__"]["rcllm_semantic_pool"] = json.dumps(meta | {"version": 99})
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(ModelError, match="has format 99"):
        opened(engine, path)


# ---- what a request reads -------------------------------------------------------------------------------------------


def test_a_prompts_history_is_matched_by_place(engine: Engine, path: Path, tmp_path: Path) -> None:
    prompt = engine.prompter.build(tiny.request(3, (7, 10, 13), history="semantic"))
    builder(engine, tmp_path / "alone", member_context="instruction").run(texts(engine), "events")
    for file, moves in ((path, True), (tmp_path / "alone", False)):
        pool = opened(engine, file)
        found = pool.borrow(prompt)
        assert [prompt.blocks[i].kind for i in found] == ["history"] * 3
        first = prompt.blocks[min(found)].base
        for i, borrowed in found.items():
            block = prompt.blocks[i]
            again = pool.match(block.token_ids, block.base - first if moves else 0)
            assert np.array_equal(borrowed.matches.prototype, again.prototype)
            assert np.array_equal(borrowed.matches.reused, again.reused)
        assert len({borrowed.key for borrowed in found.values()}) == 3
        assert {i: b.key for i, b in pool.borrow(prompt).items()} == {i: b.key for i, b in found.items()}


def test_a_history_of_which_nothing_is_there_borrows_nothing(engine: Engine, path: Path) -> None:
    assert opened(engine, path).borrow(engine.prompter.build(tiny.request(3, ("12345", "...")))) == {}
    assert opened(engine, path).borrow(engine.prompter.build(tiny.request(3, ()))) == {}


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_texts_are_written_as_prompts_write_them(engine: Engine) -> None:
    history = tiny.request(2, (7, "my own words", 13)).history
    prompt = engine.prompter.build(tiny.request(2, (7, "my own words", 13)))
    events = [block.token_ids for block in prompt.blocks if block.kind == "history"]
    assert token_runs(engine.prompter, [history], "instruction") == events
    assert token_runs(engine.prompter, [history], "history") == [tuple(t for event in events for t in event)]


def test_rows_of_a_user_form_a_history_and_users_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    rows = [("a", "one"), ("b", "two"), ("a", "three"), (None, "four"), (None, "five"), ("a", "six"), ("c", None)]
    path.write_text("".join(json.dumps({"user_id": user, "text": text}) + "\n" for user, text in rows))
    histories, report = file_histories(path, 2)
    assert [[event.text for event in history] for history in histories] == [
        ["three", "six"],
        ["two"],
        ["four"],
        ["five"],
    ]
    assert report is not None
    assert report.rows_skipped == 1
    without, told = file_histories(path, 2, {"a", "z"})  # type: ignore[arg-type]
    assert [[event.text for event in history] for history in without] == [["two"]]
    assert told is not None
    assert told.rows_skipped == 3, "a text of nobody may be one of theirs"
    assert told.notes == ("1 of 2 ids of the users to leave out is not in the data: 'z'.",)


def test_lines_of_a_text_file_are_histories_of_nobody(tmp_path: Path) -> None:
    path = tmp_path / "reviews.txt"
    path.write_text("one\n\n two \n")
    histories, _ = file_histories(path, 5)
    assert histories == [(Event(text="one"),), (Event(text="two"),)]
    with pytest.raises(ConfigError, match="names no users"):
        file_histories(path, 5, {"a"})  # type: ignore[arg-type]


def test_a_data_set_gives_training_users_alone() -> None:
    rows = [
        Interaction(UserId(f"u{n}"), ItemId(f"i{step}"), step, f"said {step}") for n in range(50) for step in range(4)
    ]
    data = Dataset("some", Catalogue(Item(ItemId(f"i{n}"), {}) for n in range(4)), tuple(rows))
    training = [UserId(f"u{n}") for n in range(50) if split_of(UserId(f"u{n}")) == "train"]
    assert dataset_histories(data, 2) == [(Event(ItemId("i2")), Event(ItemId("i3")))] * len(training)
    assert len(dataset_histories(data, 2, {training[0]})) == len(training) - 1
    assert dataset_histories(data, 1, reviews=True)[0] == (Event(text="said 3"),)
    silent = replace(data, interactions=tuple(replace(row, text=None) for row in rows))
    with pytest.raises(DataError, match="no review texts"):
        dataset_histories(silent, 1, reviews=True)


# ---- what is in the way ---------------------------------------------------------------------------------------------

_BUILD = """
from pathlib import Path
from rcllm.prototypes import build as module
from rcllm.prototypes.build import PrototypeBuilder
from tests.engine import tiny
from tests.prototypes.test_build import build
{patch}
build(tiny.fresh(), Path({out!r}))
"""


@pytest.mark.parametrize(
    "patch",
    [
        "PrototypeBuilder._compute = die_at(3, PrototypeBuilder._compute)",
        "PrototypeBuilder._remove_work = die_at(2, PrototypeBuilder._remove_work)",  # the pool is there, the work, too
    ],
    ids=["between shards", "before the work is removed"],
)
def test_a_killed_process_goes_on_as_if_it_had_not_been(engine: Engine, tmp_path: Path, patch: str) -> None:
    build(engine, tmp_path / "whole")
    run_killed(_BUILD.format(patch=patch, out=str(tmp_path / "cut")))
    build(engine, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def _interrupted(engine: Engine, out: Path) -> Path:
    """The work folder of a build that stopped after two shards."""

    class Stop(Exception):
        pass

    def stop(now: BuildProgress) -> None:
        if now.done_shards == 2:
            raise Stop

    with pytest.raises(Stop):
        builder(engine, out).run(texts(engine), "histories", stop)
    return out.with_name(out.name + ".work")


def test_a_damaged_shard_is_computed_again(engine: Engine, tmp_path: Path) -> None:
    build(engine, tmp_path / "whole")
    work = _interrupted(engine, tmp_path / "cut")
    first, second = sorted(work.glob("shard-*"))
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"junk")
    build(engine, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_shards_without_their_recipe_belong_to_nobody(engine: Engine, tmp_path: Path) -> None:
    """As a kill while the folder was removed used to leave them: the next build took them for its own."""
    build(engine, tmp_path / "whole", threshold=0.95)
    work = _interrupted(engine, tmp_path / "cut")
    (work / "recipe").unlink()
    build(engine, tmp_path / "cut", threshold=0.95)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_recipe_of_junk_is_another_build(engine: Engine, tmp_path: Path) -> None:
    work = _interrupted(engine, tmp_path / "cut")
    (work / "recipe").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="holds an unfinished build with other texts"):
        build(engine, tmp_path / "cut")


def test_only_a_pool_is_replaced(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(engine, out)
    build(engine, out, seed=2)  # as after --exclude-users
    for content in (b"", b"mine", out.read_bytes()[:50]):
        out.write_bytes(content)
        with pytest.raises(ConfigError, match="exists and is no pool"):
            build(engine, out)
        assert out.read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder: expected the name of a file"):
        build(engine, tmp_path / "folder")
    with pytest.raises(DataError, match="cannot be written"):
        build(engine, out / "below")
    (tmp_path / "new.work").write_text("mine", encoding="utf-8")
    (tmp_path / "old.work").mkdir()
    (tmp_path / "old.work" / "thesis.txt").write_text("mine", encoding="utf-8")
    for name, file in (("new", "new.work"), ("old", "old.work/thesis.txt")):
        with pytest.raises(ConfigError, match=f"{file} is not of `rcllm pool build`"):
            build(engine, tmp_path / name)
        assert (tmp_path / file).read_text(encoding="utf-8") == "mine"
