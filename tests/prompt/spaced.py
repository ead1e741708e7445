"""Tokenizers that begin every text with a space: shaped as those of Llama 2 (normaliser) and Mistral 0.3 (Metaspace).

Knows nothing of what is tested. Invariant: both know every byte and the merges of MERGED, so any text comes back.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer

KINDS = ("normaliser", "metaspace", "metaspace-always")
MERGED = ("▁yes", "▁no", "▁You", "The", "▁The")


def spaced(kind: str) -> BackendTokenizer:
    backend = BackendTokenizer(_model())
    if kind == "normaliser":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if kind == "metaspace-always" else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def _model() -> models.BPE:
    letters = ["▁", *sorted({letter for word in MERGED for letter in word} - {"▁"})]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in MERGED:
        for i in range(1, len(word)):
            pair = (word[:i], word[i])
            if pair not in merges:
                merges.append(pair)
                tokens.append(word[: i + 1])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def save_spaced(folder: Path, kind: str) -> Path:
    """A folder with the tokenizer's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    spaced(kind).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
