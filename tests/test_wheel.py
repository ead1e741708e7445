"""What `pip install` gives: the wheel holds every file and works without the checkout, with and without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rcllm.codes.index import CodeIndex
from rcllm.model.attend.native import find_compiler
from rcllm.sid.model_folder import save_model
from rcllm.sid.network import CodeNetwork, NetworkConfig
from rcllm.sid.vocabulary import Vocabulary
from tests.engine import tiny
from tests.fresh_environment import FreshEnvironment

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy, since builds leave files behind; by the setuptools that is installed here."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT / "rcllm", source / "rcllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = _build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    (folder / "of-sdist").mkdir()
    return Built(_build("wheel", source, folder), sdist, _build("wheel", unpacked, folder / "of-sdist"))


def _build(kind: str, source: Path, out: Path) -> Path:
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.splitlines()[-1]


def test_the_wheel_holds_every_file_of_the_package(built: Built) -> None:
    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "rcllm").rglob("*") if path.is_file()}
    in_tree = {name for name in in_tree if "__pycache__" not in name}
    assert "rcllm/prompt/chat_formats.toml" in in_tree
    in_wheel = {name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert _contents(built.wheel_of_sdist) == _contents(built.wheel)


def _contents(wheel: Path) -> dict[str, bytes]:
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist()}


@dataclass(frozen=True)
class Shop:
    """What a user has: a model, a catalogue, requests, a decoder of semantic IDs, users to describe."""

    folder: Path

    @property
    def rank(self) -> list[object]:
        given = {"--model": tiny.model_folder(), "--items": self.folder / "items.jsonl", "--memory-mb": 4000}
        options = {"--in": self.folder / "to-rank.jsonl", "--level": "blocks", "--readout": "pointwise"}
        return ["rcllm", "rank", *_words(given | options), "--allow-uncalibrated"]

    @property
    def recommend(self) -> list[object]:
        given = {"--model": self.folder / "decoder", "--in": self.folder / "to-recommend.jsonl", "--n": 5, "--beam": 8}
        return ["rcllm", "recommend", *_words(given), "--memory-mb", 4000]

    def describe(self, out: Path) -> list[object]:
        given = {"--model": tiny.model_folder(), "--items": self.folder / "items.jsonl", "--out": out}
        options = {"--max-tokens": 4, "--memory-mb": 4000, "--speculate": "none"}
        return ["rcllm", "describe", self.folder / "users.jsonl", *_words(given | options)]


def _words(options: dict[str, object]) -> list[object]:
    return [word for pair in options.items() for word in pair]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    items = [{"item_id": item.item_id, **item.fields} for item in tiny.catalogue().values() if item.fields]
    _write(folder / "items.jsonl", items)
    history = list(tiny.IDS[10:13])
    _write(folder / "to-rank.jsonl", [{"request_id": "r1", "candidates": tiny.IDS[:4], "history": history}])
    _write(folder / "to-recommend.jsonl", [{"request_id": "r1", "history": history}])
    _write(folder / "users.jsonl", [{"user_id": "ann", "history": history}])
    sizes, network = (4, 16), NetworkConfig(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, ffn_size=32)
    codes = np.array([[n // 16, n % 16] for n in range(len(tiny.IDS))], dtype=np.int32)
    hf_config = network.hf_config(len(Vocabulary(sizes)), 256)
    weights = CodeNetwork(network, hf_config)
    weights.reset(1)
    (folder / "decoder").mkdir()
    index = CodeIndex.build(codes, tiny.IDS, sizes)
    save_model(folder / "decoder", weights.state_dict(), hf_config, index, {})
    return Shop(folder)


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """With what the wheel requires; not even with its extras."""
    return FreshEnvironment.create(tmp_path_factory.mktemp("environment") / "env", built.wheel)


def test_the_environment_holds_nothing_that_is_not_declared(environment: FreshEnvironment, tmp_path: Path) -> None:
    for package in ("transformers", "pytest", "pyarrow", "gguf"):
        assert environment.run("python", "-c", f"import {package}", away=tmp_path).returncode == 1
    told = environment.run("python", "-c", "import rcllm; print(rcllm.__file__)", away=tmp_path)
    assert told.stdout.startswith(str(environment.folder))


def test_an_environment_without_pip_is_told_what_fetching_needs(environment: FreshEnvironment, tmp_path: Path) -> None:
    script = "from pathlib import Path; from rcllm.fetch import from_wheel; from_wheel('a==1', 'b', Path('c'))"
    refused = environment.run("python", "-c", script, away=tmp_path)
    assert "needs pip, which this environment lacks" in refused.stderr


COMPILERS = [
    pytest.param(
        os.environ["PATH"], True, id="compiler", marks=pytest.mark.skipif(not find_compiler(), reason="no g++")
    ),
    pytest.param("", False, id="no compiler"),
]


@pytest.mark.parametrize(("path", "compiles"), COMPILERS)
def test_the_wheel_ranks_and_recommends(
    environment: FreshEnvironment, shop: Shop, tmp_path: Path, path: str, compiles: bool
) -> None:
    ranked = environment.run(*shop.rank, away=tmp_path, path=path)
    assert ranked.returncode == 0, ranked.stderr
    assert set(json.loads(ranked.stdout)["ranking"]) == set(tiny.IDS[:4])
    recommended = environment.run(*shop.recommend, away=tmp_path, path=path)
    assert recommended.returncode == 0, recommended.stderr
    assert len(set(json.loads(recommended.stdout)["items"]) & set(tiny.IDS)) == 5
    assert bool(list(tmp_path.glob("native/*.so"))) == compiles


def test_the_wheel_says_what_describing_needs(environment: FreshEnvironment, shop: Shop, tmp_path: Path) -> None:
    """Answers go to a parquet file, whose library comes with the extra `data`."""
    refused = environment.run(*shop.describe(tmp_path / "knowledge.parquet"), away=tmp_path)
    assert refused.returncode == 1
    assert "rcllm[data]" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_wheel_describes(built: Built, shop: Shop, tmp_path: Path) -> None:
    with_data = FreshEnvironment.create(tmp_path / "env", built.wheel, "data")
    described = with_data.run(*shop.describe(tmp_path / "knowledge.parquet"), away=tmp_path)
    assert described.returncode == 0, described.stderr
    assert (tmp_path / "knowledge.parquet").stat().st_size > 0
