"""What the rows of a decoding pass say, of all sequences at once: the model's own choices, and its view of drafts.

Knows nothing of requests or of what is accepted. Invariant: the host waits for the device once, for one copy of all
answers; a sequence whose rows are not numbers is told apart, and changes nothing for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.codes.trie import Places
from rcllm.core.decoding import Speculation
from rcllm.decode.judge import LookedUp, Tabled, chances_at_once, judge
from rcllm.decode.sample import Draw, drawn
from rcllm.decode.verify import Judged
from rcllm.drafts.draft import DraftTree
from rcllm.model.decoder import Decoder
from rcllm.model.upload import is_near, upload


@dataclass(frozen=True, slots=True)
class Asked:
    """What one sequence asks of its rows: that of its root, and those of the nodes of its tree."""

    tree: DraftTree
    rule: Speculation
    draws: Sequence[Draw] = ()  # of each row; none: the likeliest tokens

    @property
    def num_rows(self) -> int:
        return len(self.tree) + 1

    @property
    def is_judged(self) -> bool:
        return self.rule.name == "relaxed" and len(self.tree) > 0


@dataclass(frozen=True, slots=True)
class Told:
    targets: list[int]  # the model's own choice after each row
    judged: Judged | None  # None: drafts have to equal it


@torch.inference_mode()
def told(decoder: Decoder, hidden: torch.Tensor, asked: Sequence[Asked]) -> list[Told | None]:
    """Per sequence, of hidden [rows of all in order, d]; None where its rows are not numbers."""
    sound = torch.isfinite(hidden).all(dim=-1)
    logits = decoder.logits(hidden.nan_to_num(0.0, 0.0, 0.0))  # what comes of rows that are not sound is dropped
    targets = _targets(logits, asked)
    ends = np.cumsum([each.num_rows for each in asked])
    looks = is_near(logits.device)
    table = logits.new_empty(4, 0) if looks else _table(logits, targets, asked, ends)
    parts = [sound.int(), targets.int(), table.flatten().view(torch.int32)]
    read = torch.cat(parts).cpu().numpy()  # the one wait
    are_sound, ids, values = np.split(read, np.cumsum([len(part) for part in parts])[:-1])
    columns, at = values.view(np.float32).reshape(4, -1), 0
    found = list[Told | None]()
    for each, end in zip(asked, ends.tolist(), strict=True):
        rows, own = slice(end - each.num_rows, end), ids[end - each.num_rows : end].tolist()
        judged = None
        if each.is_judged:
            tree, nodes = each.tree, slice(at, at := at + len(each.tree))
            chances = LookedUp(logits[rows], tree, own) if looks else Tabled(columns[:, nodes])
            judged = judge(tree, own, chances, each.rule)
        found.append(Told(own, judged) if are_sound[rows].all() else None)
    return found


def _targets(logits: torch.Tensor, asked: Sequence[Asked]) -> torch.Tensor:
    """The model's own choice after each row, [rows]."""
    targets = logits.argmax(dim=-1)
    draws = [draw for each in asked for draw in each.draws]
    if draws:
        are_drawn = np.repeat([len(each.draws) > 0 for each in asked], [each.num_rows for each in asked])
        rows = upload(np.flatnonzero(are_drawn), logits.device)
        targets[rows] = drawn(logits[rows], draws)
    return targets


def _table(logits: torch.Tensor, targets: torch.Tensor, asked: Sequence[Asked], ends: Places) -> torch.Tensor:
    """`chances_at_once` of all trees that are judged, one after the other."""
    judged = [(each.tree, end - each.num_rows) for each, end in zip(asked, ends, strict=True) if each.is_judged]
    if not judged:
        return logits.new_empty(4, 0)
    parents = np.concatenate([tree.parents + start for tree, start in judged])
    return chances_at_once(logits, targets, parents, np.concatenate([tree.token_ids for tree, _ in judged]))
