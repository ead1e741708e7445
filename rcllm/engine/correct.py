"""Level `corrected` between materialising and the pass: gather what the policy asks for, choose, carry rows over.

Decides nothing itself (`reuse/select.py` does). Invariant: a published block is read here, never written; what is
computed afresh stands beside it for one request.

    check_layer   layers 0 … c over all tokens, choose, the chosen rows go on from there
    blocks_pass   a pass that reuses everything, choose, then the pass starts anew
    rankings      each block's tokens are ranked once, in a canonical prompt, and the ranks remembered
    none          chosen when the request was planned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rcllm.cache.held import Held
from rcllm.core.ranking import Level, RankOptions
from rcllm.engine.materialise import Materialiser
from rcllm.engine.rankings import Rankings
from rcllm.model.attend.segments import Group
from rcllm.model.decoder import Carried, Decoder
from rcllm.prompt.blocks import Prompter
from rcllm.reuse.assemble import assemble
from rcllm.reuse.missing import Missing, canonical
from rcllm.reuse.plan import Planned, plan
from rcllm.reuse.probe import Heads, Seen, blocks_pass, check_layer
from rcllm.reuse.select import RULES, choose, evidence_of, is_inexact


@dataclass(frozen=True, slots=True)
class Selected:
    """A batch whose choice is made."""

    batch: Sequence[Planned]
    seen: Sequence[Seen] = ()  # what the choice read of the cache, per prompt
    carried: Carried | None = None  # where the fresh rows stand after the check layer
    notes: Sequence[tuple[str, ...]] = ()  # per prompt

    @property
    def bytes_copied(self) -> int:
        return sum(seen.bytes_copied for seen in self.seen)

    def bytes_read(self, groups: Sequence[Group], num_layers: int) -> list[int]:
        """Of cached KV, per prompt: by the pass over `groups`, from where the rows are carried, and by the choice."""
        left = num_layers - (self.carried.num_layers if self.carried else 0)
        by_pass = [sum(segment.num_bytes for segment in group.segments) * left // num_layers for group in groups]
        by_choice = [seen.bytes_read for seen in self.seen] or [0] * len(groups)
        return [a + b for a, b in zip(by_pass, by_choice, strict=True)]


class Corrector:
    """Chooses for batches that agree in `first_phase`."""

    def __init__(self, decoder: Decoder, prompter: Prompter, materialiser: Materialiser, pass_tokens: int) -> None:
        self._decoder, self._prompter = decoder, prompter
        self.rankings = Rankings(decoder, materialiser, pass_tokens)

    def select(self, batch: Sequence[Planned], held: Held) -> Selected:
        """Makes the choice for every prompt; `held` has all that the plans read."""
        match evidence_of(batch[0]):
            case "check_layer":
                return self._after_check_layer(batch, held)
            case "blocks_pass":
                return self._after_blocks_pass(batch, held)
            case "rankings":
                return self._by_rankings(batch, held)
            case "none":
                return Selected(batch, notes=[()] * len(batch))

    def warm(self, blocks: Sequence[Missing], options: RankOptions, held: Held) -> None:
        """Ranks the tokens of blocks that were just computed, where requests will ask for that."""
        if options.level.name == "corrected" and RULES[options.selection.policy].evidence == "rankings":
            self.rankings.learn(blocks, self._prompter.question_ids(options.readout), held)

    def _after_check_layer(self, batch: Sequence[Planned], held: Held) -> Selected:
        """RcLLM §III-D: full layers up to the check layer, then the chosen rows alone."""
        layer = batch[0].prompt.options.selection.check_layer
        work = assemble([_nothing_reused(planned) for planned in batch], {}, self._decoder.device).work
        observed: dict[int, torch.Tensor] = {}

        def observe(number: int, qkv: torch.Tensor) -> None:
            if number == layer:
                observed[number] = qkv

        carried = self._decoder.advance(work, layer + 1, observe)
        heads = Heads.of(self._decoder, observed[layer])
        ends = np.cumsum([planned.prompt.num_tokens for planned in batch]).tolist()
        seen = [
            check_layer(self._decoder, planned, heads.rows(start, stop), layer, held.blocks)
            for planned, start, stop in zip(batch, [0, *ends[:-1]], ends, strict=True)
        ]
        chosen = _chosen(batch, seen)
        fresh = np.concatenate([np.full(len(p), p.key is None) for planned in chosen for p in planned.plan.pieces])
        rows = torch.from_numpy(np.flatnonzero(fresh)).to(self._decoder.device)
        notes = [(f"layers 0 to {layer} ran for all {planned.prompt.num_tokens} tokens",) for planned in batch]
        return Selected(chosen, seen, carried.of_rows(rows), notes)

    def _after_blocks_pass(self, batch: Sequence[Planned], held: Held) -> Selected:
        early = held.blocks.early(key for planned in batch for key in planned.plan.read)
        seen = blocks_pass(self._decoder, batch, early.kv, early.arrivals)
        notes = [(f"a first pass at level blocks computed {planned.plan.num_fresh} tokens",) for planned in batch]
        return Selected(_chosen(batch, seen), seen, None, notes)

    def _by_rankings(self, batch: Sequence[Planned], held: Held) -> Selected:
        seen, notes = [], []
        for planned in batch:
            prompt = planned.prompt
            question = self._prompter.question_ids(prompt.options.readout)
            inexact = [piece for piece in planned.plan.pieces if is_inexact(prompt, piece)]
            blocks = [prompt.blocks[p.block] for p in inexact if p.key == prompt.blocks[p.block].key]
            missing = [canonical(self._prompter, block, prompt.options.layout) for block in blocks]
            num_learnt = self.rankings.learn(missing, question, held)
            seen.append(Seen(self.rankings.signals(planned, question), 0, 0))
            notes.append((f"the tokens of {num_learnt} blocks were ranked",) if num_learnt else ())
        return Selected(_chosen(batch, seen), seen, None, notes)


def _chosen(batch: Sequence[Planned], seen: Sequence[Seen]) -> list[Planned]:
    return [
        replace(planned, plan=choose(planned.prompt, planned.plan, planned.level, found.signals))
        for planned, found in zip(batch, seen, strict=True)
    ]


def _nothing_reused(planned: Planned) -> Planned:
    """All rows fresh; what is kept for publishing is the same."""
    everything = plan(planned.prompt, Level("full"), ())
    return replace(planned, plan=replace(everything, publish=planned.plan.publish))
