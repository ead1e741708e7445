"""Folders of models: what is read back, what is refused, what is left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from rcllm.codes.index import CodeIndex
from rcllm.codes.knn import Knn
from rcllm.codes.updates import Update
from rcllm.config import Config, ModelConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Item, ItemId
from rcllm.data import Catalogue
from rcllm.errors import ConfigError, DataError, ModelError, ModelWarning, RcllmError, TextWarning
from rcllm.model.checkpoint import CHECKPOINT
from rcllm.model.weights import CATALOG_PREFIX
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import (
    KNN,
    RECORD,
    TEXTS,
    WEIGHTS,
    load_codes,
    load_knn,
    load_max_items,
    save_knn,
    save_model,
)
from rcllm.sid.network import CodeNetwork, NetworkConfig
from rcllm.sid.train import CodeTrainer
from tests.killed import run_killed
from tests.sid.toys import HELD_OUT, IDS, QUICK, SIZES, TRAIN, toy_codes, toy_index

NETWORK = NetworkConfig(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, ffn_size=32)
SHORT = replace(QUICK, epochs=3)
_TRAIN = """
from dataclasses import replace
from pathlib import Path
from rcllm.sid import train
from rcllm.sid.train import CodeTrainer
from tests.sid.test_model_folder import SHORT
from tests.sid.toys import HELD_OUT, TRAIN, toy_index
{patch}
CodeTrainer(toy_index(), TRAIN, HELD_OUT, SHORT, Path({folder!r})).run()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_config = NETWORK.hf_config(64, 128)
    network = CodeNetwork(NETWORK, hf_config)
    network.reset(0)
    save_model(tmp_path / "model", network.state_dict(), hf_config, toy_index(), {"made": "by hand"})
    return tmp_path / "model"


def _trainer(folder: Path) -> CodeTrainer:
    return CodeTrainer(toy_index(), TRAIN, HELD_OUT, SHORT, folder)


def test_the_catalogue_is_read_back(folder: Path) -> None:
    found = load_codes(folder)
    assert tuple(found.item_ids) == IDS
    assert np.array_equal(found.codes, toy_codes())
    assert tuple(found.sizes) == SIZES
    assert json.loads((folder / RECORD).read_text(encoding="utf-8")) == {"made": "by hand"}
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, RECORD, *TEXTS}


def test_what_is_not_on_offer_stays_so(tmp_path: Path) -> None:
    index = toy_index().changed(Update(enabled={IDS[3]: False, IDS[7]: False}))
    CodeTrainer(index, TRAIN, HELD_OUT, SHORT, tmp_path).run(max_steps=30)
    assert load_codes(tmp_path).enabled.tolist() == index.enabled.tolist()
    recommender = load_recommender(Config(model=ModelConfig(path=str(tmp_path))))
    found = recommender.recommend(RecommendRequest("r", n=12)).items
    assert set(found) == set(IDS) - {IDS[3], IDS[7]}
    with pytest.raises(ConfigError, match="made with other settings, codes or users"):
        _trainer(tmp_path).run()


def test_items_that_the_catalogue_lacks_are_left_out(folder: Path) -> None:
    served = Catalogue(Item(item_id, {"title": "lamp"}) for item_id in (*IDS[:5], ItemId("new")))
    config = Config(model=ModelConfig(path=str(folder)))
    with pytest.warns(ModelWarning, match="7 of 12 items with semantic IDs are not in the catalogue, such as 'item 5"):
        recommender = load_recommender(config, items=served)
    assert set(recommender.recommend(RecommendRequest("r", n=12)).items) == set(IDS[:5])
    with pytest.warns(ModelWarning, match="12 of 12 items"), pytest.warns(TextWarning, match="no item has any of sid"):
        recommender = load_recommender(config, items=Catalogue([Item(ItemId("new"), {})]))
    assert recommender.recommend(RecommendRequest("r", n=12)).items == ()


def test_only_a_training_says_how_much_of_a_history_is_read(folder: Path) -> None:
    assert load_max_items(folder) is None
    for content, found in (
        ('{"settings": {"sequences": {"max_items": 7}}}', 7),
        ('{"settings": ["another program\'s"]}', None),
    ):
        (folder / RECORD).write_text(content, encoding="utf-8")
        assert load_max_items(folder) == found
    for wrong in ("0", '"7"', "1.5"):
        (folder / RECORD).write_text(f'{{"settings": {{"sequences": {{"max_items": {wrong}}}}}}}', encoding="utf-8")
        with pytest.raises(ModelError, match=r"training\.json: expected max_items of 1 or more"):
            load_max_items(folder)
    (folder / RECORD).unlink()
    assert load_max_items(folder) is None


@pytest.mark.parametrize("style", ["<{x}_{code}>", "<{level}>", "<{}_{code}>", "<{code:03}>", "{code}}"])
def test_a_style_says_where_the_code_stands(folder: Path, style: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a style with \{code\}") as raised:
        load_recommender(Config(model=ModelConfig(path=str(folder))), style=style)
    assert style in str(raised.value)


def _changed(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        save_file(load_file(path) | {CATALOG_PREFIX + name: tensor for name, tensor in tensors.items()}, path)

    return change


def _names(text: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"junk"),
        lambda path: path.write_bytes(random.Random(0).randbytes(400)),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: save_file({"model.norm.weight": torch.ones(3)}, path),
        _changed(item_ids=_names(b"\xff not json")),
        _changed(item_ids=_names(b'{"a": 1}')),
        _changed(item_ids=_names(b'["one", "two"]')),
        _changed(item_ids=_names(json.dumps([IDS[0]] * 12).encode())),
        _changed(codes=torch.full((12, 2), 9, dtype=torch.int32)),
        _changed(codes=torch.full((12, 2), -1, dtype=torch.int32)),
        _changed(codes=torch.zeros(12, dtype=torch.int32)),
        _changed(sizes=torch.tensor([4], dtype=torch.int32)),
        _changed(enabled=torch.ones(11, dtype=torch.bool)),
        _changed(enabled=torch.ones(12, dtype=torch.float32)),
    ],
    ids=str,
)
def test_a_catalogue_that_cannot_be_is_a_model_error(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_codes(folder)


def _damaged(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return _changed(**{f"knn.{name}": tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: save_file({"other": torch.ones(3)}, path),
        _changed(item_ids=_names(b'["one", "two"]')),
        _damaged(near=torch.full((24,), 99, dtype=torch.int32)),
        _damaged(starts=torch.zeros(3, dtype=torch.int64)),
        _damaged(likeness=torch.full((24,), torch.nan)),
        _damaged(likeness=torch.full((24,), -1.0)),
        _damaged(share=torch.tensor(1.0, dtype=torch.float64)),
        _damaged(share=torch.tensor([0.1, 0.2], dtype=torch.float64)),
    ],
    ids=str,
)
def test_an_item_knn_that_cannot_be_is_a_model_error(folder: Path, change: Callable[[Path], object]) -> None:
    near = sparse.csr_array(np.roll(np.eye(12), 1, axis=1) + np.roll(np.eye(12), 2, axis=1))
    save_knn(folder, Knn(IDS, near, 0.25))
    whole = load_knn(folder)
    assert whole is not None
    assert whole.share == 0.25
    change(folder / KNN)
    with pytest.raises(ModelError, match=r"knn\.safetensors.*remove this file"):
        load_knn(folder)


def test_a_folder_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine", encoding="utf-8")
    (tmp_path / WEIGHTS).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds model\.safetensors, config\.json of something else"):
        _trainer(tmp_path).run()
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file: expected the name of a folder"):
        _trainer(tmp_path / "model").run()
    with pytest.raises(DataError, match="cannot be written"):
        _trainer(tmp_path / "model" / "below").run()


def test_junk_in_the_place_of_the_checkpoint(tmp_path: Path) -> None:
    _trainer(tmp_path).run(max_steps=9)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], random.Random(1).randbytes(300)):
        path.write_bytes(content)
        with pytest.raises(RcllmError, match=r"checkpoint\.pt"):
            _trainer(tmp_path).run()
        assert path.read_bytes() == content


def test_another_catalogue_or_other_users_do_not_go_on(tmp_path: Path) -> None:
    _trainer(tmp_path).run(max_steps=9)
    moved = toy_codes()[::-1].copy()
    for index, train in (
        (CodeIndex.build(moved, IDS, SIZES), TRAIN),
        (CodeIndex.build(toy_codes(), [ItemId(f"new {n}") for n in range(12)], SIZES), TRAIN),
        (toy_index(), TRAIN[:-1]),
    ):
        with pytest.raises(ConfigError, match="made with other settings, codes or users"):
            CodeTrainer(index, train, HELD_OUT, SHORT, tmp_path).run()


@pytest.mark.parametrize(
    "patch",
    [
        "train.save_model = die_at(2, train.save_model)",  # between an epoch's validation and its model
        "CodeTrainer.save = die_at(2, CodeTrainer.save)",  # the model is written, the checkpoint is not
    ],
    ids=["before the model", "before the checkpoint"],
)
def test_a_killed_process_goes_on_as_if_it_had_not_been(tmp_path: Path, patch: str, one_compute_thread: None) -> None:
    _trainer(tmp_path / "whole").run()
    run_killed(_TRAIN.format(patch=patch, folder=str(tmp_path / "cut")))
    again = _trainer(tmp_path / "cut")
    again.run()
    assert again.state.steps > 0
    for name, tensor in load_file(tmp_path / "whole" / WEIGHTS).items():
        assert torch.equal(tensor, load_file(tmp_path / "cut" / WEIGHTS)[name]), name
