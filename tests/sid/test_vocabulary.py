"""Semantic IDs as tokens."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rcllm.codes.sid_files import token
from rcllm.core.ranking import Item, ItemId
from rcllm.data import Catalogue
from rcllm.errors import ConfigError, ModelError
from rcllm.prompt.tokenizer import Tokenizer
from rcllm.sid.vocabulary import Vocabulary, find_code_tokens, items_of_codes, sid_text, with_semantic_ids
from tests.sid.toys import IDS, NUM_ITEMS, toy_codes, toy_index

SIZES = (3, 12)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return _saved(Vocabulary(SIZES), tmp_path)


def _saved(vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    vocabulary.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(vocabulary.tokenizer_config(), encoding="utf-8")
    return Tokenizer.load(folder)


def test_text_and_ids_agree(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(SIZES)
    assert sid_text((2, 11)) == "<a_2><b_11>"
    assert tokenizer.encode("<a_2><b_11>") == tuple(vocabulary.token_ids(np.array([2, 11], np.int32)).tolist())
    assert tokenizer.encode("<|next|> <a_0>\n<b_0>") == (vocabulary.next, 4, 7)
    assert tokenizer.vocab_size == len(vocabulary) == 19
    assert tokenizer.bos_ids == ()
    assert tokenizer.chat_format == "plain"
    assert tokenizer.decode(tokenizer.encode("<a_2>")) == "<a_2>"


def test_users_cannot_write_control_tokens_and_strange_text_is_unknown(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(SIZES)
    assert vocabulary.begin in tokenizer.encode_control("<|begin|>")
    ids = tokenizer.encode("<|begin|> <a_3> lamp <|pad|>")  # there is no <a_3>
    assert ids
    assert not {vocabulary.begin, vocabulary.pad}.intersection(ids)
    assert len(set(ids)) == 1


def test_code_tokens_of_a_vocabulary_are_found_again(tokenizer: Tokenizer) -> None:
    for found, made in zip(find_code_tokens(tokenizer, SIZES).ids, Vocabulary(SIZES).code_tokens.ids, strict=True):
        assert np.array_equal(found, made)


def test_what_a_vocabulary_lacks_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"lacks 7 of the 22 .*\(<a_3>, <a_4>, <a_5>, <a_6>, <a_7>, …\)"):
        find_code_tokens(tokenizer, (10, 12))
    with pytest.raises(ModelError, match=r"lacks 15 of the 15 .*<s_a_0>"):
        find_code_tokens(tokenizer, SIZES, "<s_{level}_{code}>")


@pytest.mark.parametrize("special", [True, False])
def test_codes_that_were_added_to_a_language_model(tmp_path: Path, special: bool) -> None:
    """As MiniOneRec does: an item's text yields them, and other added tokens stay out of its reach."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["lamp"], trainer)
    codes = [token(level, code) for level, size in enumerate(SIZES) for code in range(size)]
    made.add_tokens([tokenizers.AddedToken(code, special=special) for code in codes])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path, item_tokens=r"<[a-z]_\d+>")
    found = find_code_tokens(loaded, SIZES)
    assert loaded.encode("<a_2><b_11>") == (found.ids[0][2], found.ids[1][11])
    assert loaded.encode_control("<|endoftext|>")[0] not in loaded.encode("<a_2><|endoftext|>")


@pytest.mark.parametrize("sizes", [(3,), (2,) * 7, (3, 0)])
def test_levels_that_cannot_be(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="2 to 6 levels"):
        Vocabulary(sizes)


def test_items_get_their_semantic_ids() -> None:
    code_index, codes = toy_index(), toy_codes()
    named = Catalogue(
        [Item(IDS[5], {"title": "lamp", "sid": "an old one"}), Item(ItemId("new"), {"title": "rug", "sid": "<a_9>"})]
    )
    found = with_semantic_ids(named, code_index)
    assert found[IDS[5]].fields == {"title": "lamp", "sid": sid_text(codes[5].tolist())}
    assert found[ItemId("new")].fields == {"title": "rug"}
    alone = items_of_codes(code_index)
    assert len(alone) == NUM_ITEMS
    assert alone[IDS[0]].fields == {"sid": "<a_0><b_0>"}
