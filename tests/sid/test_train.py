"""Training end to end on a toy set: what is learnt, what is written, what a restart changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcllm.config import Config, ModelConfig, PromptConfig
from rcllm.core.decoding import OpenRequest, RecommendRequest
from rcllm.core.ranking import Event
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError, ModelError
from rcllm.model.checkpoint import CHECKPOINT
from rcllm.model.weights import load_model
from rcllm.sid.config import NetworkConfig, TrainConfig
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import load_codes
from rcllm.sid.train import CodeTrainer, best_of
from rcllm.sid.vocabulary import items_of_codes, sid_text
from tests.sid.toys import HELD_OUT, IDS, NUM_ITEMS, QUICK, SIZES, TRAIN, toy_codes, toy_index


def _trainer(folder: Path, config: TrainConfig = QUICK) -> CodeTrainer:
    return CodeTrainer(toy_index(), TRAIN, HELD_OUT, config, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sid") / "model"
    curve = _trainer(folder).run()
    assert curve[-1].validation_loss < curve[0].validation_loss
    return folder


def _best(engine: Engine, history: Sequence[int]) -> int:
    """The item whose codes are the most likely continuation, by plain sequences."""
    prompt = engine.prompter.build_open(OpenRequest("r", tuple(Event(IDS[i]) for i in history)))
    tokens = list(prompt.token_ids)
    scores = []
    for codes in toy_codes().tolist():
        ids = engine.prompter.tokenizer.encode(sid_text(codes))
        logp = engine.decoder.full_logits([*tokens, ids[0]]).log_softmax(dim=-1)
        scores.append(float(logp[-2, ids[0]] + logp[-1, ids[1]]))
    return int(np.argmax(scores))


def _engine(folder: Path) -> Engine:
    config = Config(model=ModelConfig(path=str(folder)), prompt=PromptConfig(template="sid", chat="plain"))
    return Engine.build(items_of_codes(load_codes(folder)), config)


def test_the_engine_finds_the_next_item(trained: Path) -> None:
    engine = _engine(trained)
    hits = [_best(engine, [start, start + 1, start + 2]) == (start + 3) % NUM_ITEMS for start in range(NUM_ITEMS - 3)]
    assert sum(hits) >= 8  # of 9; chance is below one


def test_the_recommender_finds_the_next_item(trained: Path) -> None:
    recommender = load_recommender(Config(model=ModelConfig(path=str(trained))))
    asked = [
        RecommendRequest(str(n), tuple(Event(IDS[i % NUM_ITEMS]) for i in (n, n + 1, n + 2)), n=3)
        for n in range(NUM_ITEMS)
    ]
    answers = recommender.recommend_batch(asked)
    hits = [answer.items[0] == IDS[(n + 3) % NUM_ITEMS] for n, answer in enumerate(answers)]
    assert sum(hits) >= 10  # of 12; chance is one


def test_prompts_are_beginnings_of_training_sequences(trained: Path) -> None:
    engine, trainer = _engine(trained), _trainer(trained)
    for history in ([], [3], [4, 2, 11]):
        prompt = engine.prompter.build_open(OpenRequest("r", tuple(Event(IDS[i]) for i in history)))
        tokens = list(prompt.token_ids)
        assert tokens == trainer.sequences.prompt(history).tolist()
        assert tokens == trainer.sequences.sequence([*history, 7])[: len(tokens)].tolist()


def test_engine_and_transformers_compute_what_was_trained(trained: Path) -> None:
    trainer = _trainer(trained)
    trainer.run()  # done: reads the checkpoint alone
    network = trainer.network
    _, weights = load_model(trained)
    network.embed_tokens.weight.data.copy_(weights.embed)
    state = {
        name.removeprefix("model."): t for name, t in AutoModelForCausalLM.from_pretrained(trained).state_dict().items()
    }
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    tokens = trainer.sequences.prompt([3, 4, 5])
    with torch.no_grad():
        network.eval()
        expected = network.logits(network(torch.from_numpy(tokens)[None].long()))[0]
        theirs = AutoModelForCausalLM.from_pretrained(trained)(torch.from_numpy(tokens)[None].long()).logits[0]
    ours = _engine(trained).decoder.full_logits(tokens.tolist())
    assert (ours - expected).abs().max() < 1e-4
    assert (theirs - expected).abs().max() < 1e-4


def test_transformers_reads_the_tokenizer(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer("<|begin|><|next|><a_1><b_2>")["input_ids"] == [1, 2, 5, 10]


def test_the_catalogue_travels_in_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    found = load_codes(trained)
    assert tuple(found.item_ids) == IDS
    assert tuple(found.sizes) == SIZES
    assert np.array_equal(found.codes, toy_codes())
    with pytest.raises(ModelError, match="is missing"):
        load_codes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="not a whole safetensors"):
        load_codes(tmp_path)


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    config = replace(QUICK, epochs=4)
    whole, parts = _trainer(tmp_path / "whole", config), tmp_path / "parts"
    curve = whole.run()
    for steps in (1, 7, 5):
        killed = _trainer(parts, config)
        killed.run(max_steps=steps)
        if steps == 7:
            assert killed.state.batch > 0
            killed.save()  # as a long epoch does now and then; without, what was done of the epoch is done again
    again = _trainer(parts, config)
    resumed = again.run()
    assert again.state.steps == whole.state.steps
    assert [(p.epoch, p.train_loss, p.validation_loss) for p in resumed] == [
        (p.epoch, p.train_loss, p.validation_loss) for p in curve
    ]
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    assert not list(parts.glob(".*.partial"))


def test_another_run_in_the_same_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made with other settings, codes or users"):
        _trainer(trained, replace(QUICK, seed=1)).run()
    other = CodeTrainer(toy_index(), TRAIN[1:], HELD_OUT, QUICK, trained)
    with pytest.raises(ConfigError, match="made with other settings, codes or users"):
        other.run()
    assert (trained / CHECKPOINT).exists()


def test_it_stops_when_validation_users_gain_nothing(tmp_path: Path) -> None:
    backwards = [list(reversed(history)) for history in HELD_OUT]
    config = replace(QUICK, patience=2)
    curve = CodeTrainer(toy_index(), TRAIN, backwards, config, tmp_path).run()
    assert len(curve) < QUICK.epochs
    best = curve.index(best_of(curve))
    assert best == len(curve) - 3


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    for config, message in (
        (replace(QUICK, network=NetworkConfig(head_dim=48)), "multiple of 32"),
        (replace(QUICK, network=NetworkConfig(num_heads=4, num_kv_heads=3)), "multiple of num_kv_heads"),
        (replace(QUICK, epochs=0), "epochs must be at least 1, got 0"),
        (replace(QUICK, sequences=replace(QUICK.sequences, max_items=5000)), "lower it"),
        (replace(QUICK, sequences=replace(QUICK.sequences, skip=1.0)), r"sequences\.skip must be below 1, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            _trainer(tmp_path, config)
    with pytest.raises(DataError, match="two items or more, got 0 and 6"):
        CodeTrainer(toy_index(), [[1]], HELD_OUT, QUICK, tmp_path)
