"""Semantic IDs as tokens: `<a_12><b_3><c_9>`, one token per level and code, and the tokenizer that knows them alone.

Knows nothing of weights. Invariant: token ids of a `Vocabulary` are its control tokens, then the codes level by level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.codes.sid_files import STYLE, token
from rcllm.core.ranking import IntArray, Item, ItemId
from rcllm.data import Catalogue
from rcllm.errors import ConfigError, ModelError
from rcllm.prompt.tokenizer import Tokenizer

PAD, BEGIN, NEXT, UNKNOWN = "<|pad|>", "<|begin|>", "<|next|>", "<|unk|>"
_FIRST = (PAD, BEGIN, NEXT, UNKNOWN)
FIELD = "sid"  # the field of an item's text that holds its semantic ID
_SHOWN = 5  # missing tokens that an error names


def sid_text(codes: Sequence[int], style: str = STYLE) -> str:
    """An item's codes as the text that a prompt holds, such as `<a_12><b_3>`."""
    return "".join(token(level, code, style) for level, code in enumerate(codes))


def with_semantic_ids(catalogue: Mapping[ItemId, Item], code_index: CodeIndex, style: str = STYLE) -> Catalogue:
    """The items of `catalogue` with their semantic ID as field `sid`; items without one lose that field."""
    codes = dict(zip(code_index.item_ids, code_index.codes.tolist(), strict=True))
    return Catalogue(with_sid(item, codes.get(item.item_id), style) for item in catalogue.values())


def items_of_codes(code_index: CodeIndex, style: str = STYLE) -> Catalogue:
    """Items that have no text but their semantic ID: enough to serve a decoder that reads nothing else."""
    ids = zip(code_index.item_ids, code_index.codes.tolist(), strict=True)
    return Catalogue(Item(item_id, {FIELD: sid_text(codes, style)}) for item_id, codes in ids)


def with_sid(item: Item, codes: Sequence[int] | None, style: str = STYLE) -> Item:
    """The item with its semantic ID as field `sid`, or without that field."""
    fields = {name: text for name, text in item.fields.items() if name != FIELD}
    return Item(item.item_id, fields if codes is None else {**fields, FIELD: sid_text(codes, style)}, item.volatile)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All tokens of a decoder of `rcllm sid train`."""

    sizes: tuple[int, ...]  # codes per level

    def __post_init__(self) -> None:
        if not 2 <= len(self.sizes) <= 6 or min(self.sizes) < 1:
            raise ConfigError(f"expected 2 to 6 levels of at least one code, got sizes {self.sizes}")

    @property
    def pad(self) -> int:
        return _FIRST.index(PAD)

    @property
    def begin(self) -> int:
        return _FIRST.index(BEGIN)

    @property
    def next(self) -> int:
        return _FIRST.index(NEXT)

    @property
    def first_code(self) -> int:
        """The first token id that is a code; those before are control tokens."""
        return len(_FIRST)

    @property
    def num_levels(self) -> int:
        return len(self.sizes)

    def __len__(self) -> int:
        return len(_FIRST) + sum(self.sizes)

    @property
    def code_tokens(self) -> CodeTokens:
        starts = len(_FIRST) + np.cumsum((0, *self.sizes[:-1]))
        return CodeTokens(
            tuple(
                np.arange(start, start + size, dtype=np.int32) for start, size in zip(starts, self.sizes, strict=True)
            )
        )

    def token_ids(self, codes: IntArray) -> IntArray:
        """[…, levels] codes -> token ids of the same shape."""
        starts = [int(ids[0]) for ids in self.code_tokens.ids]
        return np.asarray(codes + np.array(starts, dtype=np.int32), dtype=np.int32)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Splits text into what stands between angle brackets; all else is unknown, white space nothing."""
        tokens = [*_FIRST, *(token(level, code) for level, size in enumerate(self.sizes) for code in range(size))]
        numbers = {text: number for number, text in enumerate(tokens)}
        made = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
        bracketed = pre_tokenizers.Split(Regex("<[^<>]*>"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bracketed])
        made.add_special_tokens([PAD, BEGIN])  # which no text of a user may produce
        return made

    def tokenizer_config(self) -> str:
        """The content of tokenizer_config.json, from which transformers loads the tokenizer."""
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BEGIN,
            "unk_token": UNKNOWN,
            "add_bos_token": False,  # the template writes it
            "clean_up_tokenization_spaces": False,
        }
        return json.dumps(content, indent=2)


def find_code_tokens(tokenizer: Tokenizer, sizes: Sequence[int], style: str = STYLE) -> CodeTokens:
    """The token ids of all codes in the vocabulary of any model, such as MiniOneRec's or OpenOneRec's.

    `style`: how the vocabulary writes a code, with the placeholders {level} (a, b, …) and {code}. Raises ModelError
    that names codes which are not one token each.
    """
    found: list[IntArray] = []
    missing: list[str] = []
    for level, size in enumerate(sizes):
        names = [token(level, code, style) for code in range(size)]
        ids = [tokenizer.encode_control(name) for name in names]
        whole = [
            len(each) == 1 and tokenizer.decode(each).strip() == name for each, name in zip(ids, names, strict=True)
        ]
        missing += [name for name, known in zip(names, whole, strict=True) if not known]
        found.append(
            np.array([each[0] if known else 0 for each, known in zip(ids, whole, strict=True)], dtype=np.int32)
        )
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise ModelError(
            f"the model's vocabulary lacks {len(missing):,} of the {sum(sizes):,} semantic-ID tokens of the catalogue "
            f"({shown}): use the codes that the model was trained with, or say how it writes them (here {style!r})"
        )
    return CodeTokens(tuple(found))
