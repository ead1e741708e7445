"""The slow twin of `rcllm.engine.jobs.generate` and its decisions: each token by a full recompute, each path tried.

Exact: equal token ids in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rcllm.drafts.draft import DraftTree
from rcllm.model.decoder import Decoder

Choose = Callable[[torch.Tensor, int], int]  # from logits [vocab] and the place in the answer to a token


def decode(decoder: Decoder, prompt: Sequence[int], num_tokens: int, choose: Choose) -> list[int]:
    """`num_tokens` tokens after `prompt`, whatever they are."""
    tokens = list(prompt)
    for place in range(num_tokens):
        tokens.append(choose(decoder.full_logits(tokens)[-1], place))
    return tokens[len(prompt) :]


def likeliest(logits: torch.Tensor, place: int) -> int:
    return int(np.argmax(logits.numpy()))


def distribution(logits: npt.ArrayLike, temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities [vocab] in fp64, after temperature and nucleus."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    kept, mass = np.zeros_like(chances), 0.0
    for token in np.argsort(-chances, kind="stable"):
        if mass >= top_p:
            break
        kept[token] = chances[token]
        mass += chances[token]
    return kept / kept.sum()


def path_of(tree: DraftTree, row: int) -> list[int]:
    """The rows from below the root to `row`."""
    path: list[int] = []
    while row:
        path.append(row)
        row = int(tree.parents[row - 1])
    return path[::-1]


def longest_acceptable(tree: DraftTree, ranks: Sequence[int], acceptable: Sequence[bool]) -> list[int]:
    """Among all paths of acceptable nodes the longest, and of those the one with the best ranks, in order."""
    paths = [path_of(tree, row) for row in range(len(tree) + 1)]
    possible = [path for path in paths if all(acceptable[row - 1] for row in path)]
    return min(possible, key=lambda path: (-len(path), [ranks[row - 1] for row in path]))
