"""The slow, obvious twin of level `corrected`: whole attention maps in fp64, tokens chosen one by one.

Every layer runs over every token; up to the check layer nothing is read from a block, and after it the K and V of the
tokens that were not chosen are replaced by the cached ones, so that what those tokens compute reaches nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rcllm.core.ranking import Level, Prompt, TokenIds
from rcllm.core.receipts import BlockKind
from tests.reference.full_model import Computed, Dense, FullModel

Contexts = dict[int, Sequence[TokenIds]]


@dataclass
class Corrected:
    scores: list[float]
    chosen: list[tuple[int, int]]  # block and offset of each reused token that became fresh


class CorrectedTwin:
    def __init__(self, model: FullModel, prompt: Prompt, contexts: Contexts) -> None:
        self.model, self.prompt, self.contexts = model, prompt, contexts
        self.selection = prompt.options.selection
        self.dense: Dense = model.dense(prompt)
        reused = (BlockKind.INSTRUCTION, BlockKind.HISTORY, BlockKind.ITEM)
        self.blocks = {i for i, b in enumerate(prompt.blocks) if b.kind in reused and b.key is not None}
        self.k, self.v = model.cached(prompt, self.blocks, contexts)
        self.reused = [i for i, (b, _) in enumerate(self.dense.places) if b in self.blocks]
        # the instruction, and a user's own words right after it in context `instruction`, are cached as they stand here
        self.inexact = [i for i in self.reused if not self.is_exact(self.dense.places[i][0])]
        self.question = [i for i in range(len(self.dense.places)) if self.kind(i) is BlockKind.QUESTION]

    def is_exact(self, block: int) -> bool:
        return self.prompt.blocks[block].key == self.prompt.blocks[block].chain_key

    def kind(self, token: int) -> BlockKind:
        return self.prompt.blocks[self.dense.places[token][0]].kind

    def run(self, level: Level) -> Corrected:
        policy = _POLICIES[self.selection.policy]
        windowed = self.window()
        chosen = set(windowed)
        score = policy(self)
        for tokens, share in self.budgets(level):
            tokens = [i for i in tokens if i not in windowed]
            best = sorted(tokens, key=lambda i: (-score[i], i))
            chosen |= set(best[: math.ceil(share * len(tokens))])
        from_scoring = self.selection.policy in ("rcllm", "k_difference", "question")
        kept = [i for i in self.reused if i not in chosen]
        hidden = self.compute(kept, self.selection.check_layer + 1 if from_scoring else 0).hidden
        scores = self.model.read(self.prompt, self.model.logits(self.prompt, self.dense, hidden))
        return Corrected(scores, [self.dense.places[i] for i in sorted(chosen)])

    def compute(self, kept: Sequence[int], given_from: int) -> Computed:
        """The pass in which the tokens `kept` are read from their blocks, from layer `given_from` on."""
        given = torch.zeros(len(self.dense.places), dtype=torch.bool)
        given[list(kept)] = True
        dense = self.dense
        return self.model.compute(dense.token_ids, dense.positions, dense.mask, given, self.k, self.v, given_from)

    def budgets(self, level: Level) -> list[tuple[list[int], float]]:
        """Tokens that share a budget: of history, and of all candidates, or of each that no other sees."""
        history = [i for i in self.inexact if self.kind(i) is BlockKind.HISTORY]
        items = [i for i in self.inexact if self.kind(i) is BlockKind.ITEM]
        slots = {self.prompt.blocks[self.dense.places[i][0]].slot for i in items}
        isolated = self.prompt.options.parallel or self.prompt.options.readout != "label"
        lists = [
            [i for i in items if self.prompt.blocks[self.dense.places[i][0]].slot in group]
            for group in ([{slot} for slot in slots] if isolated else [slots])
        ]
        return [(history, level.history_budget), *((tokens, level.budget) for tokens in lists)]

    def window(self) -> set[int]:
        inside: set[int] = set()
        for block in {self.dense.places[i][0] for i in self.question}:
            seen = [i for i in self.inexact if self.prompt.sees[block, self.dense.places[i][0]]]
            inside |= set(seen[len(seen) - self.selection.window :] if self.selection.window else [])
        return inside

    def received(self, attention: torch.Tensor, reduction: str) -> list[float]:
        """attention [H, rows, rows]"""
        weights, mask, found = attention.mean(0), self.dense.mask, []
        for i in range(len(self.dense.places)):
            if reduction == "question":
                rows = [j for j in self.question if mask[j, i]]
            else:
                rows = [j for j in range(len(self.dense.places)) if mask[j, i] and (j != i or reduction == "sum")]
            total = sum(float(weights[j, i]) for j in rows)
            found.append(total if reduction == "sum" else total / max(len(rows), 1))
        return found

    def deltas(self, full: Computed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ΔK and ΔV at the check layer, and K and V side by side; [rows, KV · D] each, keys at their positions."""
        layer, at = self.selection.check_layer, self.dense.positions
        fresh, cached = self.model.turn(full.k[layer], at), self.model.turn(self.k[layer], at)
        both = torch.cat((fresh, full.v[layer]), dim=1)
        return (fresh - cached).flatten(1), (full.v[layer] - self.v[layer]).flatten(1), both.flatten(1)


def _rcllm(twin: CorrectedTwin) -> list[float]:
    full = twin.compute([], 0)
    attention = twin.received(full.attention[twin.selection.check_layer], twin.selection.reduction)
    delta_k, delta_v, both = twin.deltas(full)
    history = [i for i in twin.inexact if twin.kind(i) is BlockKind.HISTORY]
    if not history:
        return attention
    divergence = (delta_k.abs().sum(1) + delta_v.abs().sum(1)).tolist()
    size = float(both.abs().sum(1)[history].mean())
    mean_attention = sum(attention[i] for i in history) / len(history)
    mean_divergence = max(sum(divergence[i] for i in history) / len(history), 0.01 * size)
    weight = twin.selection.divergence
    return [
        (1 - weight) * a / mean_attention + weight * divergence[i] / mean_divergence if i in history else a
        for i, a in enumerate(attention)
    ]


def _k_difference(twin: CorrectedTwin) -> list[float]:
    values: list[float] = twin.deltas(twin.compute([], 0))[0].square().sum(1).tolist()
    return values


def _question(twin: CorrectedTwin) -> list[float]:
    return twin.received(twin.compute([], 0).attention[twin.selection.check_layer], "question")


def _two_pass(twin: CorrectedTwin) -> list[float]:
    return twin.received(twin.compute(twin.reused, 0).attention.mean(0), "question")


def _static(twin: CorrectedTwin) -> list[float]:
    """Relative ranks within each block, from the sequence [first context, block as cached, question]."""
    score = [0.0] * len(twin.dense.places)
    question = twin.prompt.blocks[twin.dense.places[twin.question[0]][0]].token_ids
    for index in (i for i in twin.blocks if twin.prompt.blocks[i].kind is not BlockKind.INSTRUCTION):
        ids, before = twin.prompt.blocks[index].token_ids, twin.contexts[index][0]
        size = len(before) + len(ids) + len(question)
        context_k, context_v = twin.model.block([()], before) if before else (twin.k[:, :0], twin.v[:, :0])
        columns = slice(len(before), len(before) + len(ids))
        rows = slice(twin.dense.row(index, 0), twin.dense.row(index, len(ids) - 1) + 1)
        later = torch.zeros(len(twin.k), len(question), *twin.k.shape[2:], dtype=torch.float64)
        given_k = torch.cat((context_k, twin.k[:, rows], later), dim=1)
        given_v = torch.cat((context_v, twin.v[:, rows], later), dim=1)
        run = twin.model.compute(
            (*before, *ids, *question),
            torch.arange(size),
            torch.ones(size, size, dtype=torch.bool).tril(),
            torch.arange(size) < size - len(question),
            given_k,
            given_v,
        )
        received = run.attention.mean((0, 1))[-len(question) :, columns].mean(0).tolist()
        best = sorted(range(len(ids)), key=lambda offset: (-received[offset], offset))
        for rank, offset in enumerate(best):
            score[twin.dense.row(index, offset)] = 1 - (rank + 0.5) / len(ids)
    return score


def _first(twin: CorrectedTwin) -> list[float]:
    return [-float(offset) for _, offset in twin.dense.places]


def _tail(twin: CorrectedTwin) -> list[float]:
    return [float(i) for i in range(len(twin.dense.places))]


_POLICIES: dict[str, Callable[[CorrectedTwin], list[float]]] = {
    "rcllm": _rcllm,
    "k_difference": _k_difference,
    "question": _question,
    "two_pass": _two_pass,
    "static": _static,
    "first": _first,
    "tail": _tail,
}
