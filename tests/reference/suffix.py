"""The slow, obvious twins of `rcllm.drafts.suffix_index` and `rcllm.drafts.draft_tree`: every place of every answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

Row = tuple[tuple[int, ...], float]  # what follows, how much it counts


def agreeing(before: Sequence[int], tail: Sequence[int], longest: int) -> int:
    """How many tokens at the ends of both agree."""
    n = 0
    while n < min(len(before), len(tail), longest) and before[-1 - n] == tail[-1 - n]:
        n += 1
    return n


def places(answers: Sequence[Sequence[int]], tail: Sequence[int], longest: int) -> list[tuple[tuple[int, ...], int]]:
    """(what follows, tokens that agree) of every place of every answer where at least one token agrees."""
    found = []
    for answer in answers:
        for place in range(1, len(answer)):
            length = agreeing(answer[:place], tail, longest)
            if length:
                found.append((tuple(answer[place:]), length))
    return found


def tree(rows: Sequence[Row], max_nodes: int, doubt: float) -> dict[tuple[int, ...], float]:
    """Path → weight, of the `max_nodes` best."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for window, evidence in rows:
        for n in range(len(window) + 1):
            mass[window[:n]] += evidence
    weights = {(): 1.0}
    for path in sorted(mass, key=len):
        if path:
            weights[path] = weights[path[:-1]] * mass[path] / (mass[path[:-1]] + doubt)
    best = sorted((path for path in weights if path), key=lambda path: (-weights[path], len(path), path))
    return {path: weights[path] for path in best[:max_nodes]}


def prompt_lookup(tokens: Sequence[int], max_ngram: int, branch: int) -> list[int]:
    """Hugging Face's rule: the longest n-gram first; what follows its first occurrence."""
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for i in range(len(tokens) - n):
            if list(tokens[i : i + n]) == list(tokens[-n:]):
                return list(tokens[i + n : i + n + branch])
    return []
