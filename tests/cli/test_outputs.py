"""Where commands write: inputs are spared, and what cannot be written is said before the model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rcllm.cli.outputs import check_file, check_folder
from rcllm.config import Config
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError
from tests.cli.conftest import Run, Shop, write_lines


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one is a failure of the test."""

    def build(*given: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "build", build)


@pytest.fixture
def own(shop: Shop, tmp_path: Path) -> Shop:
    """The shop's files, to be lost by this test alone."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for path in shop.dataset.iterdir():
        (dataset / path.name).write_bytes(path.read_bytes())
    items, requests = tmp_path / "items.jsonl", tmp_path / "requests.jsonl"
    items.write_bytes(shop.items.read_bytes())
    requests.write_bytes(shop.requests.read_bytes())
    return Shop(shop.model, items, dataset, requests)


Way = Callable[[Path, Path], Path]  # from a file and an empty folder to another name of it


def _link(path: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(path)
    return folder / "link"


def _hard_link(path: Path, folder: Path) -> Path:
    (folder / "hard").hardlink_to(path)
    return folder / "hard"


WAYS: dict[str, Way] = {
    "itself": lambda path, folder: path,
    "relative": lambda path, folder: Path(os.path.relpath(path)),
    "roundabout": lambda path, folder: folder / ".." / folder.name / ".." / path.name,
    "link": _link,
    "hard link": _hard_link,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_name_of_an_input_is_written_to(own: Shop, tmp_path: Path, way: str) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="would overwrite"):
        check_file(WAYS[way](own.items, tmp_path / "other"), [own.requests, own.items])


def test_an_option_left_empty_is_not_the_current_folder(own: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.items.parent)
    check_file(own.items, Config(), "")
    with pytest.raises(ConfigError, match="would overwrite"):
        check_file(own.items, Path())


def _commands(own: Shop) -> dict[str, tuple[list[object], list[Path]]]:
    """Each command that has --out FILE, and files that it reads."""
    on_items = [*own.on_items, "--in", own.requests]
    config = own.items.with_name("config.toml")
    config.write_text('[prompt]\ncontext = "none"\n', encoding="utf-8")
    users, texts = own.dataset / "users.jsonl", own.items.with_name("texts.txt")
    texts.write_text("I like lamps\n", encoding="utf-8")
    read = [own.items, own.requests]
    return {
        "rank": (["rank", *on_items, "--config", config], [*read, config, own.model / "tokenizer.json"]),
        "rank on a data set": (["rank", *own.on_dataset, "--in", own.requests], [own.dataset / "items.jsonl", users]),
        "recommend": (
            ["recommend", "--model", own.model, "--in", own.requests, "--deny", texts],
            [texts, own.requests],
        ),
        "bench": (["bench", "ttft", *on_items], read),
        "probe": (["probe", "position", *on_items], read),
        "calibrate": (["calibrate", *on_items, "--count", 3], read),
        "describe": (["describe", own.items, "--kind", "item", "--model", own.model], [own.items]),
        "pool": (["pool", "build", *own.on_items, "--texts", texts], [own.items, texts]),
    }


COMMANDS = ["rank", "rank on a data set", "recommend", "bench", "probe", "calibrate", "describe", "pool"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_spares_what_it_reads(run: Run, own: Shop, no_model: None, command: str) -> None:
    words, read = _commands(own)[command]
    for path in read:
        before = path.read_bytes()
        shown = run(*words, "--out", path)
        assert shown.exit_code == 2, (path, shown.stderr, shown.exception)
        assert "which this command reads" in shown.stderr
        assert path.read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_is_found_before_the_model_is_loaded(
    run: Run, own: Shop, tmp_path: Path, no_model: None, command: str
) -> None:
    words, _ = _commands(own)[command]
    folder = run(*words, "--out", tmp_path)
    assert folder.exit_code == 2, folder.stderr
    assert "is a folder: expected the name of a file" in folder.stderr
    for path in (own.items / "below.jsonl", own.items / "far" / "below.jsonl", tmp_path / ("n" * 300)):
        shown = run(*words, "--out", path)
        assert shown.exit_code == 1, (shown.stderr, shown.exception)
        assert "cannot be written" in shown.stderr


@pytest.mark.parametrize("command", ["rank", "recommend"])
@pytest.mark.parametrize("name", ["answers.parquet", "answers.jsonl.gz", "answers.CSV"])
def test_a_name_that_promises_another_format(
    run: Run, own: Shop, tmp_path: Path, no_model: None, command: str, name: str
) -> None:
    shown = run(*_commands(own)[command][0], "--out", tmp_path / name)
    assert shown.exit_code == 2
    assert "answers are JSON lines" in shown.stderr


def test_sid_build_spares_what_it_reads(run: Run, own: Shop, tmp_path: Path) -> None:
    items = own.items.rename(tmp_path / "items.json")
    shown = run("sid", "build", "--items", items, "--out", items)
    assert shown.exit_code == 2
    assert "which this command reads" in shown.stderr


def test_commands_that_write_a_folder(run: Run, own: Shop, tmp_path: Path, no_model: None) -> None:
    codes = write_lines(tmp_path / "codes.json", [])
    for words in (
        ["tune", "--dataset", own.dataset, "--model", own.model],
        ["sid", "train", "--dataset", own.dataset, "--codes", codes],
    ):
        file = run(*words, "--out", own.items)
        assert file.exit_code == 2
        assert "is a file: expected the name of a folder" in file.stderr
        below = run(*words, "--out", own.items / "below")
        assert below.exit_code == 1
        assert "cannot be written" in below.stderr
        read = run(*words, "--out", own.dataset)
        assert read.exit_code == 2
        assert "a folder that this command reads" in read.stderr


def test_an_adapter_that_is_gone_on_from_is_spared(own: Shop, run: Run, tmp_path: Path) -> None:
    (tmp_path / "ranker" / "best").mkdir(parents=True)
    words = ("--dataset", own.dataset, "--model", own.model, "--start", tmp_path / "ranker" / "best")
    shown = run("tune", *words, "--out", tmp_path / "ranker")
    assert shown.exit_code == 2
    assert "a folder that this command reads" in shown.stderr


def test_what_an_earlier_run_made_in_a_folder_that_is_read_is_its_own(own: Shop) -> None:
    out, mark = own.dataset / "answers.jsonl", own.dataset / "answers.jsonl.job.json"
    check_file(out, own.dataset, beside=mark)
    out.touch()
    with pytest.raises(ConfigError, match="would overwrite"):
        check_file(out, own.dataset, beside=mark)
    mark.touch()
    check_file(out, own.dataset, beside=mark)
    with pytest.raises(ConfigError, match="would overwrite"):
        check_file(out, own.dataset, out, beside=mark)


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_file(tmp_path / "new" / "file", "text\0that is no name", None)
    check_folder(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="cannot be written"):
        check_file(Path("/proc/nowhere/file"))
