"""Builds responses and receipts from what a batch did. Decides and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rcllm.core.ranking import (
    BlockReceipt,
    ContentKey,
    Level,
    RankRequest,
    RankResponse,
    Receipt,
    Scores,
    Source,
    order,
)
from rcllm.reuse.plan import Planned


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What all receipts of a batch share."""

    node: str
    model: str
    context: str
    backend: str
    bytes_copied: int
    num_computed: int
    batch_size: int
    sources: Mapping[ContentKey, Source]
    stage_ms: Mapping[str, float]


def respond(
    request: RankRequest,
    planned: Planned,
    level: Level,
    scores: Scores,
    kv_bytes_read: int,
    facts: BatchFacts,
    notes: tuple[str, ...],
) -> RankResponse:
    """`level`: as asked, and as resolved where the model's mask decides otherwise (then a note says so)."""
    prompt, plan, options = planned.prompt, planned.plan, planned.prompt.options
    receipt = Receipt(
        level=str(level),
        readout=options.readout,
        layout=options.layout + (" parallel" if options.parallel else ""),
        label_place=options.label_place if options.readout == "label" else "none",
        context=facts.context,
        history=options.history,
        bias=options.bias,
        backend=facts.backend,
        node=facts.node,
        model=facts.model,
        num_tokens=prompt.num_tokens,
        num_fresh=plan.num_fresh,
        num_reused=plan.num_reused,
        num_computed=facts.num_computed,
        kv_bytes_read=kv_bytes_read,
        kv_bytes_copied=facts.bytes_copied,
        stage_ms=facts.stage_ms,
        batch_size=facts.batch_size,
        blocks=_block_receipts(planned, facts.sources),
        notes=prompt.notes + notes,
    )
    values = tuple(float(value) for value in scores)
    return RankResponse(request.request_id, request.candidates, values, order(values), receipt)


def _block_receipts(planned: Planned, sources: Mapping[ContentKey, Source]) -> tuple[BlockReceipt, ...]:
    receipts = []
    for index, block in enumerate(planned.prompt.blocks):
        pieces = [piece for piece in planned.plan.pieces if piece.block == index]
        reused = [piece for piece in pieces if piece.key is not None]
        key = reused[0].key if reused else None
        receipts.append(
            BlockReceipt(
                kind=block.kind,
                owner=block.owner,
                slot=block.slot,
                source=sources[key] if key is not None else "fresh",
                num_fresh=sum(len(piece) for piece in pieces if piece.key is None),
                num_reused=sum(len(piece) for piece in reused),
                key=key.hex()[:12] if key is not None else None,
                why="; ".join(dict.fromkeys(piece.why for piece in pieces)),
            )
        )
    return tuple(receipts)
