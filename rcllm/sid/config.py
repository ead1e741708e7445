"""What is asked of semantic IDs and of the decoder that generates them.

Knows nothing of vectors or networks, and imports nothing that takes time, because the command line is made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from rcllm.annotated import Ge, Gt, Interval, MultipleOf, Opt
from rcllm.errors import ConfigError
from rcllm.fields import check

_CODES, _LEARN, _SIZE = "Which codes", "How to learn", "How large"
_RMS_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class CodeConfig:
    """The shape of the codes."""

    levels: Annotated[
        int, Interval(ge=2, le=6), Opt("Codes of an item; default by the catalogue's size.", panel=_CODES)
    ] = 3
    size: Annotated[int, Ge(2), Opt("Codes of a level; default by the catalogue's size.", panel=_CODES)] = 256
    iterations: Annotated[int, Ge(1)] = 50  # of k-means, at most
    seed: Annotated[int, Ge(0), Opt()] = 0

    def check(self, num_items: int) -> None:
        """Raises ConfigError."""
        check(self)
        if self.size**self.levels < num_items:
            raise ConfigError(
                f"{self.levels} levels of {self.size} codes tell {self.size**self.levels:,} items apart, the catalogue "
                f"has {num_items:,}: raise levels or size"
            )


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """How vectors are joined before they are quantised."""

    codes: CodeConfig = field(default_factory=CodeConfig)
    text_dimensions: Annotated[int, Ge(0), Opt("Principal components to keep; 0: all.", panel=_CODES)] = 64
    # length of the collaborative part against the text's, which is one
    collaborative_weight: Annotated[
        float, Ge(0), Opt("Of who touched what, against the text; 0: text alone.", panel=_CODES)
    ] = 1.5
    collaborative_dimensions: Annotated[int, Ge(1)] = 64
    # items of a history at most so far apart count as touched together
    window: Annotated[int, Ge(1)] = 5

    def check(self) -> None:
        """Raises ConfigError."""
        check(self)


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """How large the decoder is."""

    hidden_size: Annotated[int, Ge(1), Opt("A multiple of 32: heads have 32 dimensions.", panel=_SIZE)] = 128
    num_layers: Annotated[int, Ge(1), Opt(name="--layers", panel=_SIZE)] = 3
    num_heads: Annotated[int, Ge(1)] = 4
    num_kv_heads: Annotated[int, Ge(1)] = 4
    head_dim: Annotated[int, Ge(32), MultipleOf(32)] = 32  # such heads are served by the compiled kernels
    ffn_size: Annotated[int, Ge(1)] = 384
    # of the embeddings and of what each layer adds
    dropout: Annotated[float, Interval(ge=0, lt=1), Opt("Of embeddings and layers.", panel=_LEARN)] = 0.2
    rope_theta: Annotated[float, Gt(0)] = 10_000.0

    def hf_config(self, vocab_size: int, max_positions: int) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": _RMS_EPS,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }

    def check(self) -> None:
        """Raises ConfigError."""
        check(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"expected num_heads a multiple of num_kv_heads, got {self}")


@dataclass(frozen=True, slots=True)
class SequenceConfig:
    """What is learnt from a history."""

    # besides the one that is predicted last
    max_items: Annotated[int, Ge(1), Opt("Most items of a history.", name="--history", panel=_LEARN)] = 20
    batch_tokens: Annotated[int, Ge(1)] = 1024
    # drawn anew in every epoch
    skip: Annotated[float, Interval(ge=0, lt=1), Opt("Chance to leave an item out of a history.", panel=_LEARN)] = 0.1
    # who likes what, apart from when
    shuffle: Annotated[float, Interval(ge=0, le=1), Opt("Chance to put a history in random order.", panel=_LEARN)] = 0.4

    def check(self) -> None:
        """Raises ConfigError."""
        check(self)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    epochs: Annotated[int, Ge(1), Opt("At most.", panel=_LEARN)] = 16
    # over all runs; the learning rate falls towards whichever end is nearer
    minutes: Annotated[float, Gt(0), Opt("Stop after this much training.", panel=_LEARN)] = math.inf
    learning_rate: Annotated[float, Gt(0), Opt("The highest; it rises, then falls.", panel=_LEARN)] = 2e-3
    weight_decay: Annotated[float, Ge(0)] = 0.05  # of matrices
    warm_up_steps: Annotated[int, Ge(0)] = 100
    clip: Annotated[float, Gt(0)] = 1.0  # largest norm of a gradient
    # without a better NDCG@10 of validation users
    patience: Annotated[int, Ge(1), Opt("Epochs without gain before it stops.", panel=_LEARN)] = 5
    # items of a history at most so far apart count as touched together, where embeddings begin
    window: Annotated[int, Ge(1)] = 5
    seed: Annotated[int, Ge(0), Opt()] = 0

    def check(self) -> None:
        """Raises ConfigError."""
        check(self)
        self.network.check()
