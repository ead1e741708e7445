"""README and docs/store.md are true: files, commands and snippets are used as they stand, and so are the examples.

They run in a sandbox. Its cache folder holds a tiny random model under the name of the default one, and its working
folder a small data set under the name of the one that would be fetched. Long commands are told to do less.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rcllm.cli.app import app
from rcllm.config import ModelConfig
from rcllm.data.formats import MOVIELENS
from tests.engine import tiny

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w.-]+\.jsonl)`[^`\n]*:\n\n```json\n(.*?)```", README, flags=re.DOTALL))
STORE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
SNIPPETS = [each for page in (README, STORE) for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]


def commands_of(page: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


COMMANDS = commands_of(README)
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md")]
NUM_FILMS, NUM_USERS = 200, 80
LESS = {  # what is added to a command, so that it takes seconds
    "calibrate": "--count 6 --timed 1 --levels blocks --readouts label --layouts history_first --label-places after",
    "enrich": "--interactions-only",
    "tune": "--losses 4 --evaluate-every 2 --rank 2 --candidates 4 --history 3",
    "sid build": "--embeddings embeddings.npy --levels 2 --size 16",
    "sid train": "--epochs 1 --hidden-size 32 --layers 1",
    "describe": "--max-tokens 4",
    "probe position": "--count 2 --candidates 4 --history 3 --permutations 2",
    "bench ttft": "--count 2 --candidates 4 --history 3",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the files of the README, beside a cache folder with the model."""
    folder = tmp_path_factory.mktemp("readme")
    models = folder / "home" / "models"
    models.mkdir(parents=True)
    (models / ModelConfig().path).symlink_to(tiny.model_folder())
    work = folder / "work"
    films = [{"item_id": str(n), "title": f"Film {n}", "year": 1950 + n % 50} for n in range(1, NUM_FILMS + 1)]
    users = [
        {"user_id": f"u{n}", "items": [str((n * 7 + step * (1 + n % 5)) % NUM_FILMS + 1) for step in range(12)]}
        for n in range(NUM_USERS)
    ]
    _write(work / MOVIELENS / "items.jsonl", films)
    _write(work / MOVIELENS / "users.jsonl", users)
    np.save(work / "embeddings.npy", np.random.default_rng(0).normal(size=(NUM_FILMS, 8)).astype(np.float32))
    for name, text in FILES.items():
        (work / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCLLM_HOME", str(folder / "home"))
        patch.setattr("rcllm.model.ceilings._SECONDS", 0.0)  # `doctor` measures for so long
        patch.chdir(work)
        yield work


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_what_is_tested_here_was_found() -> None:
    assert set(FILES) == {"items.jsonl", "requests.jsonl", "viewers.jsonl", "users.jsonl"}
    assert len(SNIPPETS) == 2
    assert {command for _, command, *_ in COMMANDS} >= {"rank", "recommend", "describe", "calibrate", "tune", "sid"}


def test_the_snippets_run(sandbox: Path, capsys: pytest.CaptureFixture[str], one_compute_thread: None) -> None:
    for snippet in SNIPPETS:
        exec(compile(snippet, "a snippet", "exec"), {})
    shown = capsys.readouterr().out
    assert "tokens reused" in shown
    assert "0 tokens computed" in shown
    assert re.search(r"disk: \d+ blocks", shown)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_examples_run(
    sandbox: Path, capsys: pytest.CaptureFixture[str], one_compute_thread: None, example: Path
) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert "tokens reused" in capsys.readouterr().out


def run_all(commands: Sequence[Sequence[str]]) -> None:
    for program, *words in commands:
        assert program == "rcllm"
        less = next((more for name, more in LESS.items() if words[: len(name.split())] == name.split()), "")
        ran = CliRunner().invoke(app, [*words, *less.split()])
        assert ran.exit_code == 0, f"{shlex.join(words)}\n{ran.output}\n{ran.exception!r}"


def test_the_commands_of_the_store_run(sandbox: Path, one_compute_thread: None) -> None:
    commands = commands_of(STORE)
    assert {words[2] for words in commands if words[1] == "cache"} == {
        "stats", "verify", "erase", "prune", "compact", "export", "import"
    }  # fmt: skip
    run_all(commands)
    assert (sandbox / "warmed" / "manifest.json").exists()


def test_the_commands_run(sandbox: Path, one_compute_thread: None) -> None:
    """In one test, since later commands use what earlier ones made."""
    run_all(COMMANDS)
    answers = [json.loads(line) for line in (sandbox / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(answers[0]["ranking"]) == {"b2", "b3"}
    for name in (
        "fidelity.json",
        "codes.parquet",
        "knowledge.parquet",
        "decoder/model.safetensors",
        "rankers/films/best",
    ):
        assert (sandbox / name).exists(), name


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^ +make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_read_once(page: str) -> None:
    """Short ones, for engineers whose first language is another."""
    lengths = {sentence: len(sentence.split()) for sentence in _sentences((ROOT / page).read_text(encoding="utf-8"))}
    longest = max(lengths, key=lambda sentence: lengths[sentence])
    assert lengths[longest] <= 36, longest
    assert sum(lengths.values()) / len(lengths) < 20


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.(?:py|cpp|json|toml))?)`", text):
        assert (ROOT / name).exists() or (ROOT / "rcllm" / name).exists(), f"{page} names {name}, which does not exist"


def _sentences(page: str) -> list[str]:
    """The sentences of prose: without code, drawings, tables and headings."""
    prose = re.sub(r"```.*?```", "\n\n", page, flags=re.DOTALL)
    lines = [
        "" if re.match(r"#| *\||    ", line) else re.sub(r"^ *(-|\d+\.) ", "\n\n", line) for line in prose.splitlines()
    ]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return [
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[])", " ".join(paragraph.split()))
        if sentence
    ]
