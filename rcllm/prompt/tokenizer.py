"""Text to token ids and back, with what users write kept apart from what templates write.

Knows nothing of templates or blocks. Invariant: `encode` never yields a control token, whatever the text says; only
`encode_control`, meant for the product's own templates, does. Ids are never added by themselves: the
begin-of-sequence ids that a model expects are `bos_ids`, for the template to place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tokenizers
from blake3 import blake3

from rcllm.core.ranking import TokenIds
from rcllm.errors import ModelError

ChatFormat = Literal["chatml", "llama3", "mistral", "plain"]

_CACHED_TEXTS = 16_384  # an item's text and ids are ~4 KB, so this stays under 100 MB
_CHAT_MARKS: dict[str, ChatFormat] = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "[INST]": "mistral"}


class Tokenizer:
    """A Hugging Face `tokenizer.json`. Safe to share between threads."""

    def __init__(
        self,
        full: tokenizers.Tokenizer,
        plain: tokenizers.Tokenizer,
        *,
        control: Sequence[str],
        bos_ids: TokenIds,
        chat_format: ChatFormat,
        fingerprint: bytes,
    ) -> None:
        """full: knows the tokens in `control`; plain: the same, but blind to them. Use `load`."""
        self.bos_ids = bos_ids
        self.chat_format = chat_format
        self.fingerprint = fingerprint  # 32 bytes: blake3 of tokenizer.json
        self.vocab_size = full.get_vocab_size(with_added_tokens=True)
        self._full = full
        self._plain = plain
        self._control_ids = frozenset(full.token_to_id(token) for token in control)
        self._inside_control = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control))
        self._cached: Callable[[str], TokenIds] = lru_cache(_CACHED_TEXTS)(self._encode)

    @classmethod
    def load(cls, folder: Path, item_tokens: str = "") -> Tokenizer:
        """Reads tokenizer.json and, where it exists, tokenizer_config.json. Raises ModelError.

        `item_tokens`: regular expression of added tokens that `encode` yields all the same, such as semantic IDs.
        """
        path = folder / "tokenizer.json"
        try:
            content = path.read_bytes()
            described = json.loads(content)
            full = tokenizers.Tokenizer.from_buffer(content)
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing; expected a fast tokenizer, as `save_pretrained` writes it") from error
        except Exception as error:  # the library raises bare Exception for what it cannot parse
            raise ModelError(f"{path} is not a tokenizer that can be read: {error}") from error
        config = _read_config(folder / "tokenizer_config.json")
        control = [token for token in _control_tokens(described) if not re.fullmatch(item_tokens, token)]
        # special tokens can be switched off; taking them out would shift the ids of those that follow
        added = [{**token, "special": token["content"] in control} for token in described["added_tokens"]]
        plain = tokenizers.Tokenizer.from_str(json.dumps({**described, "added_tokens": added}))
        plain.encode_special_tokens = True
        for backend in (full, plain):
            backend.no_truncation()
            backend.no_padding()
        return cls(
            full,
            plain,
            control=control,
            bos_ids=_bos_ids(full, config),
            chat_format=_chat_format(full, config),
            fingerprint=blake3(content).digest(),
        )

    def encode(self, text: str) -> TokenIds:
        """Ids of a user's text. What looks like a control token in it is spelled out in ordinary tokens."""
        return self._cached(text)

    def encode_unremembered(self, text: str) -> TokenIds:
        """The same, keeping no copy of the text: for a user's own words, which may have to be erased."""
        return self._encode(text)

    def encode_control(self, text: str) -> TokenIds:
        """Ids of a template's own text, in which control tokens such as `<|im_start|>` are meant."""
        return tuple(self._full.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    def _encode(self, text: str) -> TokenIds:
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair, as JSON may bring, is no text
        ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
        if self._control_ids.isdisjoint(ids):
            return ids
        # Some vocabularies can also build a control token from its characters: then its text is cut in two, and
        # what a normaliser still makes of look-alike characters is dropped.
        return tuple(
            token
            for part in self._inside_control.split(text)
            for token in self._plain.encode(part, add_special_tokens=False).ids
            if token not in self._control_ids
        )


def _control_tokens(described: dict[str, Any]) -> list[str]:
    """Added tokens that text must not produce: all but runs of white space and the model's own unknown token.

    That includes those not marked special (`<think>`, `<tool_call>`): models read them as control all the same.
    """
    unknown = described["model"].get("unk_token")
    texts = [token["content"] for token in described.setdefault("added_tokens", [])]
    return [text for text in texts if text.strip() and text != unknown]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _bos_ids(full: tokenizers.Tokenizer, config: dict[str, Any]) -> TokenIds:
    """What stands before every text: as tokenizer_config.json says, else as tokenizer.json's post-processor does."""
    if config.get("add_bos_token") is False:
        return ()
    bos, eos = (_token_id(full, config.get(f"{role}_token")) for role in ("bos", "eos"))
    if config.get("add_bos_token") and bos is not None:
        return (bos,)
    around = tuple(full.encode("", add_special_tokens=True).ids)
    return around[:-1] if around and around[-1] == eos != bos else around


def _token_id(full: tokenizers.Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return full.token_to_id(text) if isinstance(text, str) else None


def _chat_format(full: tokenizers.Tokenizer, config: dict[str, Any]) -> ChatFormat:
    for mark, name in _CHAT_MARKS.items():
        if full.token_to_id(mark) is not None:
            return name
    # before version 3, Mistral's marks were plain text, which only the template tells
    return "mistral" if "[INST]" in str(config.get("chat_template")) else "plain"
