"""`rcllm recommend` on a tiny random decoder with its catalogue inside, and on a model with codes from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tokenizers
from tokenizers import AddedToken

from rcllm.cache import rates
from rcllm.cli.clustered import recommender_of
from rcllm.cli.inputs import load_inputs, make_engine
from rcllm.cli.options import ItemOptions
from rcllm.codes.index import CodeIndex
from rcllm.codes.sid_files import write_codes
from rcllm.config import MIB, CacheConfig, Config, ModelConfig
from rcllm.core.ranking import ItemId
from rcllm.sid.config import NetworkConfig
from rcllm.sid.model_folder import save_model
from rcllm.sid.network import CodeNetwork
from rcllm.sid.vocabulary import Vocabulary
from tests.cli.conftest import Run, Shop, read_lines, write_lines
from tests.tiny_models import tiny_model

SIZES = (5, 6, 4)
NUM_ITEMS = 40
TEMPLATE = """
name = "asks-for-codes"
version = 1
open = true
system = "You recommend."
instruction = "The user bought:"
history_head = ""
event = ["\\n- {title} {sid}"]
event_text = "\\n- {text}"
question = "\\nNext: "
max_event_tokens = 60
"""


@dataclass(frozen=True)
class Decoder:
    model: Path  # of `rcllm sid train`
    requests: Path

    @property
    def words(self) -> list[object]:
        return ["recommend", "--model", self.model, "--memory-mb", 6000, "--in", self.requests]


def _code_index() -> CodeIndex:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, NUM_ITEMS) for size in SIZES], axis=1).astype(np.int32)
    codes[0] = [size - 1 for size in SIZES]  # so that a file of codes tells the sizes
    return CodeIndex.build(codes, tuple(ItemId(f"i{i}") for i in range(NUM_ITEMS)), SIZES)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("decoder")
    config = NetworkConfig(hidden_size=32, num_layers=2, num_heads=1, num_kv_heads=1, ffn_size=48)
    hf_config = config.hf_config(len(Vocabulary(SIZES)), 256)
    network = CodeNetwork(config, hf_config)
    network.reset(seed=1)
    save_model(folder / "model", network.state_dict(), hf_config, _code_index(), {})
    requests: list[dict[str, Any]] = [{"request_id": f"r{i}", "history": ["i1", f"i{i}"]} for i in range(4)]
    requests[1] |= {"n": 3, "deny": ["i5"], "user_id": "u1"}
    requests[2] |= {"allow": ["i7", "i8"], "rule": "mask", "beam": 2, "level": "full"}
    return Decoder(folder / "model", write_lines(folder / "requests.jsonl", requests))


def test_answers_come_in_order(run: Run, decoder: Decoder) -> None:
    shown = run(*decoder.words, "--n", 6, "--batch", 3)
    assert shown.exit_code == 0, shown.stderr
    answers = read_lines(shown.stdout)
    assert [answer["request_id"] for answer in answers] == ["r0", "r1", "r2", "r3"]
    assert [len(answer["items"]) for answer in answers] == [6, 3, 2, 6]
    assert sorted(answers[2]["items"]) == ["i7", "i8"]
    for answer in answers:
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert "receipt" not in answer
        assert answer["tokens_fresh"] > 0


def test_histories_are_kept_for_the_next_run(run: Run, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates._FIRST_BYTES_PER_S, "disk", 1e15)  # so small a model sooner computes than reads
    monkeypatch.setattr(rates.Rate, "saw", lambda rate, amount, seconds: None)
    first, second, without = (
        read_lines(run(*decoder.words, "--explain", *more).stdout) for more in ((), (), ("--no-store",))
    )
    for a, b, c in zip(first, second, without, strict=True):
        assert a["items"] == b["items"] == c["items"]
    fresh = [[answer["tokens_fresh"] for answer in answers] for answers in (first, second, without)]
    assert fresh[1] < fresh[0] == fresh[2]


def test_files_of_items_hold_for_every_request(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "allow.txt").write_text("i3\ni4\n\ni5 \ni7\n", encoding="utf-8")
    (tmp_path / "deny.txt").write_text("i4\ni7\n", encoding="utf-8")
    words = ("--allow", tmp_path / "allow.txt", "--deny", tmp_path / "deny.txt")
    answers = read_lines(run(*decoder.words, *words).stdout)
    assert [sorted(answer["items"]) for answer in answers] == [["i3", "i5"], ["i3"], ["i8"], ["i3", "i5"]]


def test_lists_that_windows_editors_saved_hold_and_unknown_ids_are_told(
    run: Run, decoder: Decoder, tmp_path: Path
) -> None:
    (tmp_path / "deny.txt").write_bytes(b"\xef\xbb\xbfi3\r\ni4\r\n")
    shown = run(*decoder.words, "--n", 100, "--deny", tmp_path / "deny.txt")
    assert shown.exit_code == 0, shown.stderr
    assert not any({"i3", "i4"} & set(answer["items"]) for answer in read_lines(shown.stdout))
    assert "not in the catalogue" not in shown.stderr
    (tmp_path / "allow.txt").write_text("i3\nZ1\nZ2\n", encoding="utf-8")
    shown = run(*decoder.words, "--allow", tmp_path / "allow.txt")
    assert "--allow: 2 of 3 ids are not in the catalogue, such as 'Z1'" in shown.stderr


def test_unseen_leaves_out_each_users_own_history(run: Run, decoder: Decoder) -> None:
    answers = read_lines(run(*decoder.words, "--n", 100, "--unseen").stdout)
    for i, answer in enumerate(answers):
        assert not {"i1", f"i{i}"} & set(answer["items"])
    assert "i0" in answers[3]["items"], "what others have seen is not left out"


def test_explain_shows_items_levels_and_the_receipt(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    shown = run(*decoder.words, "--explain", "--out", out)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout == ""
    for words in ("Request r0: 10 items", "valid children", "not allowed", "KV read", "epoch 0", "forward"):
        assert words in shown.stderr
    receipt = read_lines(out.read_text(encoding="utf-8"))[0]["receipt"]
    assert len(receipt["steps"]) == 3
    assert receipt["beam"] == 64


def test_ids_that_no_item_has_are_told_of(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "allow.txt").write_text("nope\nnever\n", encoding="utf-8")
    (tmp_path / "deny.txt").write_text("i1\ngone\n", encoding="utf-8")
    rows = [{"request_id": "r0"}, {"request_id": "r1", "allow": ["i3", "i99"], "deny": ["i3", "i77", "i78"]}]
    requests = write_lines(tmp_path / "requests.jsonl", rows)
    lists = ("--allow", tmp_path / "allow.txt", "--deny", tmp_path / "deny.txt")
    shown = run(*decoder.words[:-1], requests, *lists)
    assert shown.exit_code == 0, shown.stderr
    allow = "--allow: all 2 ids are not in the catalogue, such as 'nope'"
    deny = "--deny: 1 of 2 ids are not in the catalogue, such as 'gone'"
    own_allow = "allow: 1 of 2 ids are not in the catalogue, such as 'i99'"
    own_deny = "deny: 2 of 3 ids are not in the catalogue, such as 'i77'"
    first, second = read_lines(shown.stdout)
    assert first["items"] == []
    assert first["notes"] == [allow, deny]
    assert second["notes"] == [own_allow, deny, own_deny], "its own allow replaces that of the run"
    for told in (allow, deny, "allow or deny names items that are not in the catalogue in 1 of the requests"):
        assert shown.stderr.count(f"warning: {told}") == 1
    assert "notes" not in read_lines(run(*decoder.words).stdout)[0]


def test_answers_go_on(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(*decoder.words, "--out", out).exit_code == 0
    whole = out.read_text(encoding="utf-8")
    out.write_text("".join(whole.splitlines(keepends=True)[:3])[:-9], encoding="utf-8")  # two whole ones
    shown = run(*decoder.words, "--out", out)
    assert shown.exit_code == 0, shown.stderr
    assert "2 of 4 requests are answered already" in shown.stderr
    expected = read_lines(whole)
    for answer, like in zip(read_lines(out.read_text(encoding="utf-8")), expected, strict=True):
        assert (answer["line"], answer["items"]) == (like["line"], like["items"])
    assert run(*decoder.words, "--out", out, "--n", 3).exit_code == 2


def test_answers_do_not_go_on_without_their_items(run: Run, decoder: Decoder, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(*decoder.words, "--out", out, "--items", shop.items).exit_code == 0
    shown = run(*decoder.words, "--out", out)
    assert shown.exit_code == 2
    assert "answers of another job: nothing is given for the items now" in " ".join(shown.stderr.split())
    assert run(*decoder.words, "--out", out, "--items", shop.items).exit_code == 0


def test_a_ranker_and_a_decoder_beside_it_keep_within_one_memory(decoder: Decoder, shop: Shop) -> None:
    inputs = load_inputs(ItemOptions(items=shop.items))
    config = Config(ModelConfig(path=str(shop.model), device="cpu"), cache=CacheConfig(memory_mb=6000))
    beside = recommender_of(config, decoder.model, inputs).engine.pool
    pool = make_engine(config, inputs, beside=beside).pool
    taken = psutil.Process().memory_info().rss
    assert beside.budget + pool.budget + taken < 6000 * MIB
    assert beside.budget == pytest.approx(pool.budget / 15, rel=0.2), "the decoder has a sixteenth"


def test_options_about_items_are_refused_where_there_are_none(run: Run, decoder: Decoder) -> None:
    shown = run(*decoder.words, "--volatile", "price")
    assert shown.exit_code == 2
    assert "give --items FILE, or leave them out" in " ".join(shown.stderr.split())


def test_bad_requests_become_lines(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    good = {"request_id": "good", "history": ["i1"]}
    rows = [good, {**good, "history": ["nope"]}, {**good, "n": 0}, {**good, "candidates": ["i1"]}, good]
    path = write_lines(tmp_path / "requests.jsonl", rows)
    shown = run(*decoder.words[:-1], path)
    assert shown.exit_code == 1
    answers = read_lines(shown.stdout)
    assert len(answers) == 5
    assert answers[0]["items"] == answers[4]["items"] != []
    for answer, said in zip(
        answers[1:4], ("'nope' is not in the catalogue", "n must be at least 1, got 0", "'candidates'"), strict=True
    ):
        assert said in answer["error"]
    assert "3 of 5 requests failed" in shown.stderr
    assert run(*decoder.words[:-1], path, "--strict").exit_code == 1


def test_what_is_missing_is_said(run: Run, decoder: Decoder, shop: Shop, tmp_path: Path) -> None:
    requests = ("--in", decoder.requests)
    for words, said, code in (
        (("recommend", *requests), "rcllm sid train", 2),
        (("recommend", "--model", shop.model, *requests), "holds no catalogue", 1),
        ((*decoder.words, "--deny", tmp_path / "none.txt"), "none.txt: no such file", 1),
        ((*decoder.words, "--codes", tmp_path / "codes.json"), "--template", 2),
    ):
        shown = run(*words)
        assert shown.exit_code == code, shown.stderr
        assert said in shown.stderr


def test_a_model_with_semantic_ids_in_its_vocabulary(run: Run, shop: Shop, decoder: Decoder, tmp_path: Path) -> None:
    """As MiniOneRec's: added tokens beside those of text, and an index file."""
    code_index = _code_index()
    model = tiny_model("llama", tmp_path, vocab_size=512 + sum(SIZES), max_position_embeddings=2048)
    backend = tokenizers.Tokenizer.from_file(str(shop.model / "tokenizer.json"))
    names = [f"<{'abc'[level]}_{code}>" for level, size in enumerate(SIZES) for code in range(size)]
    backend.add_tokens([AddedToken(name, normalized=False) for name in names])
    backend.save(str(model / "tokenizer.json"))
    (tmp_path / "template.toml").write_text(TEMPLATE, encoding="utf-8")
    write_codes(tmp_path / "codes.json", code_index)
    items = [{"item_id": item_id, "title": f"lamp {item_id}"} for item_id in code_index.item_ids]
    words = ["recommend", "--model", model, "--memory-mb", 6000, "--codes", tmp_path / "codes.json"]
    words += ["--items", write_lines(tmp_path / "items.jsonl", items), "--in", decoder.requests, "--explain"]
    shown = run(*words, "--template", tmp_path / "template.toml")
    assert shown.exit_code == 0, shown.stderr
    answers = read_lines(shown.stdout)
    assert sorted(answers[2]["items"]) == ["i7", "i8"]
    assert all(set(answer["items"]) <= set(code_index.item_ids) for answer in answers)
    assert "lamp i" in shown.stderr
    title = len(backend.encode("\n- lamp i1 ", add_special_tokens=False).ids)
    begin = len(backend.encode("You recommend.The user bought:", add_special_tokens=False).ids)
    assert answers[0]["receipt"]["num_tokens"] < begin + 2 * (title + len(SIZES)) + 20, "a code is one token"


@pytest.mark.filterwarnings("default::rcllm.errors.ModelWarning")
def test_items_that_the_catalogue_lacks_are_told_of_and_left_out(run: Run, decoder: Decoder, tmp_path: Path) -> None:
    kept = [f"i{i}" for i in range(10)]
    items = write_lines(tmp_path / "items.jsonl", [{"item_id": item_id, "title": "lamp"} for item_id in kept])
    shown = run(*decoder.words, "--items", items, "--n", 40)
    assert shown.exit_code == 0, shown.stderr
    assert "warning: 30 of 40 items with semantic IDs are not in the catalogue, such as 'i10'" in shown.stderr
    assert [set(answer["items"]) <= set(kept) for answer in read_lines(shown.stdout)] == [True] * 4


def test_a_style_without_a_code_is_told_of(run: Run, decoder: Decoder) -> None:
    for style in ("<{x}_{code}>", "<{level}>"):
        shown = run(*decoder.words, "--style", style)
        assert shown.exit_code == 2
        assert "expected a style with {code}, and {level}" in shown.stderr
        assert "Traceback" not in shown.stderr


def test_help_teaches(run: Run) -> None:
    shown = run("recommend", "--help").stdout
    for words in ("--beam", "--allow", "--deny", "--codes", "rcllm sid train", "request_id"):
        assert words in shown
