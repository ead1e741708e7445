"""Tokenizers that read a text as the continuation of another.

Some tokenizers put a space before every text, or strip it: those of Llama 2, TinyLlama and Mistral up to 0.3. A prompt
is tokenised block by block, so there each block would get a space that the template does not write. Knows nothing of
prompts. Invariant: what is taken out acts at the edges of a text alone, never inside of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PARTS = ("normalizers", "pretokenizers", "decoders")  # the lists of a Sequence, by kind


def continuing(described: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` that adds nothing at the start of a text; equal to the given one where that adds nothing."""
    stages = {stage: _without_edges(described.get(stage)) for stage in ("normalizer", "pre_tokenizer", "decoder")}
    if (bytes_ := described.get("decoder")) and bytes_.get("type") == "ByteLevel":
        stages["decoder"] = bytes_  # its add_prefix_space is written, but not read
    return {**described, **{stage: value for stage, value in stages.items() if value != described.get(stage)}}


def _without_edges(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One stage without what it does at the edges; None where nothing is left."""
    if part is None:
        return None
    match part.get("type"):
        case "Prepend" | "Strip":
            return None
        case "Metaspace":
            return {key: value for key, value in part.items() if key != "add_prefix_space"} | {
                "prepend_scheme": "never"
            }
        case "ByteLevel":
            return {**part, "add_prefix_space": False}
        case "Sequence":
            name = next(name for name in _PARTS if name in part)
            kept = [inner for each in part[name] if (inner := _without_edges(each)) is not None]
            return {**part, name: kept} if kept else None
    return dict(part)
