"""Rank: one pass, whose last rows say how the candidates score.

Decides how a request is answered, reads its scores, and builds its receipt. Invariant: nothing of it outlives the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rcllm.config import Config, check_options
from rcllm.core.ranking import ContentKey, RankOptions, RankRequest, RankResponse, Scores, order
from rcllm.core.receipts import BlockReceipt, RankReceipt, Source
from rcllm.decode.finite import not_numbers
from rcllm.decode.rank import Asked, launch
from rcllm.engine.job import Answer, Entered, OnePass, Opening
from rcllm.engine.jobs.bias import LabelBias
from rcllm.engine.prefill import Prefill
from rcllm.errors import ConfigError, ModelError
from rcllm.metrics import Stage
from rcllm.model.decoder import Decoder
from rcllm.prompt.blocks import Prompter
from rcllm.reuse.plan import Planned
from rcllm.schedule.admission import Admission
from rcllm.schedule.work import NO_LIMITS, KindLimits


class Rank(OnePass):
    """The job of `Engine.rank`. `admission`: which reuse levels may be used; it may be replaced at any time."""

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        prompter: Prompter,
        prefill: Prefill,
        admission: Admission,
        kind: str = "rank",
        limits: KindLimits = NO_LIMITS,
    ) -> None:
        self.admission, self.kind, self.limits = admission, kind, limits
        self._config, self._decoder, self._prompter, self._prefill = config, decoder, prompter, prefill
        self._bias = LabelBias(prefill.score_content_free)

    def open(self, request: RankRequest) -> Opening:
        """The prompt at the level that the request is admitted to. Raises RequestError, ConfigError."""
        options = request.options or self._config.rank
        check_options(options)
        admitted = self.admission.admit(options)
        self._check(admitted.options)
        prompt = self._prompter.build(replace(request, options=admitted.options))
        return Opening(replace(prompt, notes=prompt.notes + admitted.notes), guard=admitted.guard)

    def cheaper(self, opening: Opening) -> Iterator[Opening]:
        """The same at the cheaper levels that the admission allows, the dearest first."""
        for admitted in self.admission.cheaper(opening.prompt.options):
            self._check(admitted.options)
            prompt = replace(opening.prompt, options=admitted.options, notes=opening.prompt.notes + admitted.notes)
            yield replace(opening, prompt=prompt, degraded=("level",), guard=admitted.guard)

    def fewer(self, request: RankRequest, opening: Opening, keep: Sequence[int]) -> tuple[RankRequest, Opening]:
        """The same for some of its candidates alone."""
        fewer = replace(request, candidates=tuple(request.candidates[i] for i in keep))
        prompt = self._prompter.build(replace(fewer, options=opening.prompt.options))
        said = f"{len(keep)} of {len(request.candidates)} candidates, those with the highest prior"
        notes = tuple(dict.fromkeys((*prompt.notes, *opening.prompt.notes, said)))
        return fewer, replace(opening, prompt=replace(prompt, notes=notes), degraded=(*opening.degraded, "candidates"))

    def _check(self, options: RankOptions) -> None:
        """Raises ConfigError for options that this model, or what was loaded with it, cannot serve."""
        if options.history == "semantic" and not self._prefill.has_prototypes:
            raise ConfigError(
                "history 'semantic' needs a semantic pool: build one with `rcllm pool build` and name it in "
                "cache.semantic_pool"
            )
        check_layer, last = options.selection.check_layer, self._decoder.spec.num_layers - 1
        if options.level.name == "corrected" and check_layer >= last:
            raise ConfigError(
                f"selection.check_layer is {check_layer}; the model has the layers 0 to {last}, of which at least the "
                "last must be left to run for the chosen tokens alone"
            )

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterator[Answer]:
        with stage("readout"):
            asked = [Asked(each.planned.prompt, each.read_rows) for each in entered]
            scores = launch(self._decoder, entered[0].hidden, asked)
        return self._answers(entered, scores, stage)

    def _answers(
        self, entered: Sequence[Entered], scores: Callable[[], list[Scores]], stage: Stage
    ) -> Iterator[Answer]:
        with stage("readout"):
            receipts = [_receipt(each, self._prompter.context_name) for each in entered]  # while the device computes
            outcomes = list(map(self._outcome, entered, scores(), receipts))
        for each, outcome in zip(entered, outcomes, strict=True):
            yield Answer(each.ticket.number, outcome)

    def _outcome(self, entered: Entered, scores: Scores, receipt: RankReceipt) -> RankResponse | ModelError:
        if not np.isfinite(scores).all():
            return not_numbers()
        request = entered.ticket.request
        values = tuple(self._bias.correct(entered.planned.prompt.options, scores).tolist())
        return RankResponse(request.request_id, request.candidates, values, order(values), receipt)


def _receipt(entered: Entered, context: str) -> RankReceipt:
    options = entered.planned.prompt.options
    shared = dict(entered.shared)
    if options.bias == "running_mean":
        shared["notes"] += ("bias running_mean: the scores depend on the requests before this one",)
    return RankReceipt(
        **shared,
        readout=options.readout,
        layout=options.layout + (" parallel" if options.parallel else ""),
        label_place=options.label_place if options.readout == "label" else "none",
        context=context,
        bias=options.bias,
        selection=options.selection if options.level.name == "corrected" else None,
        kv_bytes_read=entered.kv_bytes_read,
        kv_bytes_copied=entered.kv_bytes_copied,
        blocks=_block_receipts(entered.planned, entered.held.sources),
    )


def _block_receipts(planned: Planned, sources: Mapping[ContentKey, Source]) -> tuple[BlockReceipt, ...]:
    blocks = planned.prompt.blocks
    keys: list[ContentKey | None] = [None] * len(blocks)
    reused = [0] * len(blocks)
    whys: list[list[str]] = [[] for _ in blocks]
    for piece in planned.plan.pieces:
        if piece.why not in whys[piece.block]:
            whys[piece.block].append(piece.why)
        if piece.key is not None:
            keys[piece.block] = piece.key
            reused[piece.block] += piece.stop - piece.start
    return tuple(
        BlockReceipt(
            block.kind,
            block.owner,
            block.slot,
            sources[key] if key is not None else "fresh",
            len(block.token_ids) - num_reused,
            num_reused,
            key[:6].hex() if key is not None else None,
            "; ".join(why),
        )
        for block, key, num_reused, why in zip(blocks, keys, reused, whys, strict=True)
    )
