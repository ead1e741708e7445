"""Text to token ids and back, with what users write kept apart from what templates write.

Knows nothing of templates or blocks. Invariants: `encode` never yields a control token, whatever the text says; only
`encode_control`, meant for the product's own templates, does. Both read a text as what follows another, so that blocks
join to the text of a prompt; only `encode_opening` gives the ids of its beginning. Ids are never added by themselves:
the begin-of-sequence ids that a model expects are `bos_ids`, for the template to place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from blake3 import blake3

from rcllm.core.ranking import TokenIds
from rcllm.errors import ModelError
from rcllm.plain_json import read_json, read_json_if_there
from rcllm.prompt.continuing import continuing
from rcllm.prompt.template import told_format

_ROLES = ("bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class _Backends:
    """One vocabulary read in three ways."""

    full: tokenizers.Tokenizer  # knows the control tokens
    plain: tokenizers.Tokenizer  # the same, but blind to them
    opening: tokenizers.Tokenizer | None  # as `full`, at the very start of a text; None where that is no different


@dataclass(frozen=True, slots=True)
class ChatTold:
    """How conversations are written for a model, as the files beside its tokenizer say."""

    format: str | None  # a name of chat_formats.toml; None: a chat template that is none of them
    template: str | None  # in Jinja; None: the model has none
    tokens: Mapping[str, str]  # that a template may name: bos_token, eos_token, …


class Tokenizer:
    """A Hugging Face `tokenizer.json` and the files beside it. Safe to share between threads."""

    def __init__(
        self,
        backends: _Backends,
        *,
        control: Sequence[str],
        bos_ids: TokenIds,
        chat: ChatTold,
        unknown_id: int | None,
        vocab_size: int,
        fingerprint: bytes,
    ) -> None:
        """Use `load`."""
        self.bos_ids = bos_ids
        self.chat = chat
        self.unknown_id = unknown_id  # what stands for text that the vocabulary cannot write
        self.vocab_size = vocab_size  # one more than the highest id
        self.fingerprint = fingerprint  # 32 bytes: blake3 of tokenizer.json
        self._full, self._plain, self._opening = backends.full, backends.plain, backends.opening
        self._control_ids = frozenset(self._full.token_to_id(token) for token in control)
        self._any_control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self._inside_control = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control))

    @classmethod
    def load(cls, folder: Path, item_tokens: str = "") -> Tokenizer:
        """Reads tokenizer.json and, where they exist, the configuration and chat template beside it. Raises ModelError.

        `item_tokens`: regular expression of added tokens that `encode` yields all the same, such as semantic IDs.
        """
        path = folder / "tokenizer.json"
        described = read_json(path, "a model with a fast tokenizer, as `save_pretrained` writes it")
        config = _configured(folder)
        try:
            described = _with_special_tokens(described, config)
            control = [token for token in _control_tokens(described) if not re.fullmatch(item_tokens, token)]
            backends = _backends(described, control)
            return cls(
                backends,
                control=control,
                bos_ids=_bos_ids(backends.full, config),
                chat=_chat_told(folder, config, backends.full),
                unknown_id=_unknown_id(described, backends.full),
                vocab_size=1 + max(_vocabulary(described).values(), default=-1),
                fingerprint=blake3(path.read_bytes()).digest(),
            )
        except ModelError:
            raise
        except Exception as error:  # the library raises bare Exception for what it cannot parse
            raise ModelError(f"{path} is not a tokenizer that can be read ({error}); fetch it again") from error

    @property
    def chat_format(self) -> str | None:
        """A name of chat_formats.toml; None: a chat template that is none of them."""
        return self.chat.format

    def encode(self, text: str) -> TokenIds:
        """Ids of a user's text. What looks like a control token in it is spelled out in ordinary tokens."""
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

    def encode_control(self, text: str) -> TokenIds:
        """Ids of a template's own text, in which control tokens such as `<|im_start|>` are meant."""
        return tuple(self._full.encode(text, add_special_tokens=False).ids)

    def encode_opening(self, text: str) -> TokenIds:
        """The same for the text that begins a prompt: there alone some tokenizers put a space first."""
        if self._opening is None:
            return self.encode_control(text)
        control = self._any_control.search(text)
        start = control.start() if control else len(text)
        opening = tuple(self._opening.encode(text[:start], add_special_tokens=False).ids)
        return opening + self.encode_control(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included.

        Ids that begin as prompts do (`bos_ids`) are read as a whole prompt, without the space that a tokenizer put
        first; others as what follows some text.
        """
        ids, num_bos = list(ids), len(self.bos_ids)
        if self._opening is None or not num_bos or tuple(ids[:num_bos]) != self.bos_ids:
            return self._full.decode(ids, skip_special_tokens=False)
        begin = self._full.decode(ids[:num_bos], skip_special_tokens=False)
        return begin + self._opening.decode(ids[num_bos:], skip_special_tokens=False)


def end_token(folder: Path) -> int | None:
    """The id of the end token that tokenizer_config.json names, if any. Raises ModelError."""
    config = _configured(folder)
    end = _text(config.get("eos_token"))
    if not end or not (folder / "tokenizer.json").exists():
        return None
    described = read_json(folder / "tokenizer.json")
    try:
        return _vocabulary({"added_tokens": [], **described}).get(end)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'tokenizer.json'} is not a tokenizer that can be read ({error!r})") from error


def _configured(folder: Path) -> dict[str, Any]:
    """What special tokens are, and what is done with them; the newer file goes before the older."""
    files = (read_json_if_there(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    return {key: value for content in files for key, value in content.items()}


def _backends(described: Mapping[str, Any], control: Sequence[str]) -> _Backends:
    within = continuing(described)
    # special tokens can be switched off; taking them out would shift the ids of those that follow
    added = [{**token, "special": token["content"] in control} for token in within["added_tokens"]]
    full, plain = _backend(within), _backend({**within, "added_tokens": added})
    plain.encode_special_tokens = True
    return _Backends(full, plain, None if within == described else _backend(described))


def _backend(described: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _control_tokens(described: dict[str, Any]) -> list[str]:
    """Added tokens that text must not produce: all but runs of white space and the model's own unknown token.

    That includes those not marked special (`<think>`, `<tool_call>`): models read them as control all the same.
    """
    unknown = described["model"].get("unk_token")
    texts = [token["content"] for token in described.setdefault("added_tokens", [])]
    return [text for text in texts if text.strip() and text != unknown]


def _vocabulary(described: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, added ones included. Unigram models write a list of pairs, the others a mapping."""
    vocab = described["model"]["vocab"]
    known = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return known | {token["content"]: token["id"] for token in described["added_tokens"]}


def _with_special_tokens(described: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the special tokens that tokenizer_config.json alone names, where the vocabulary has them.

    Those that no id stands for are left out: the model has no embedding for them.
    """
    added = list(described.get("added_tokens") or [])
    described = {**described, "added_tokens": added}
    known, listed = _vocabulary(described), {token["content"] for token in added}
    for text in _named_special(config):
        if text in known and text not in listed:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": known[text], "content": text, **flags, "special": True})
            listed.add(text)
    added.sort(key=lambda token: token["id"])
    return described


def _named_special(config: Mapping[str, Any]) -> list[str]:
    named = [config.get(role) for role in _ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        named += list(more.values()) if isinstance(more, dict) else more
    decoded = config.get("added_tokens_decoder") or {}
    named += [token for token in decoded.values() if isinstance(token, dict) and token.get("special")]
    return [text for token in named if (text := _text(token))]


def _text(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _unknown_id(described: Mapping[str, Any], full: tokenizers.Tokenizer) -> int | None:
    model = described["model"]
    unknown = model.get("unk_id") if model.get("type") == "Unigram" else full.token_to_id(model.get("unk_token") or "")
    return unknown if isinstance(unknown, int) else None


def _bos_ids(full: tokenizers.Tokenizer, config: Mapping[str, Any]) -> TokenIds:
    """What stands before every text: as tokenizer_config.json says, else as tokenizer.json's post-processor does."""
    if config.get("add_bos_token") is False:
        return ()
    bos, eos = (full.token_to_id(_text(config.get(f"{role}_token"))) for role in ("bos", "eos"))
    if config.get("add_bos_token") and bos is not None:
        return (bos,)
    around = tuple(full.encode("", add_special_tokens=True).ids)
    return around[:-1] if around and around[-1] == eos != bos else around


def _chat_told(folder: Path, config: Mapping[str, Any], full: tokenizers.Tokenizer) -> ChatTold:
    template = _chat_template(folder, config)
    tokens = {role: text for role in _ROLES if (text := _text(config.get(role)))}
    return ChatTold(told_format(template, full.token_to_id), template, tokens)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The model's own chat template, from where transformers takes it; None where it has none. Raises ModelError."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read ({error}); fetch it again") from error
    template = config.get("chat_template") or read_json_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) and template.strip() else None
