"""The nouns of the jobs that decode: open prompts, recommendations from the whole catalogue, answers in text.

Frozen and without tensors, like those of `core.py`; this module never imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from rcllm.annotated import Ge, Interval, MinLen, Opt
from rcllm.core.requests import BeamRule, Event, HistoryMode, ItemId, Level, TokenIds, UserId
from rcllm.errors import ConfigError
from rcllm.fields import check as check_fields

if TYPE_CHECKING:
    from rcllm.core.receipts import GenerateReceipt, RecommendReceipt


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A prompt without candidates, which decoding continues: instruction, `history` (oldest first), question."""

    request_id: str
    history: tuple[Event, ...] = ()
    user_id: UserId | None = None
    level: Level | None = None  # None: exact, which reuses the instruction and this user's own chain
    history_mode: HistoryMode = "chain"
    tenant: str = ""


# ---- recommending from the whole catalogue ---------------------------------------------------------------------------

STYLE = "<{level}_{code}>"  # how LC-Rec and MiniOneRec write a code of a semantic ID; level 0 is a
_PANEL = "What to recommend"  # the heading of these options on the command line


@dataclass(frozen=True, slots=True)
class RecommendRequest:
    """The `n` best items of the whole catalogue for a user with this `history` (oldest event first)."""

    request_id: str
    history: tuple[Event, ...] = ()
    user_id: UserId | None = None
    n: Annotated[int, Ge(1), Opt("Items per answer.", panel=_PANEL)] = 10
    # at least n are kept
    beam: Annotated[int, Ge(1), Opt("Prefixes that are kept at each level; wider finds more.", panel=_PANEL)] = 64
    allow: tuple[ItemId, ...] | None = None  # these items alone may come; None: all that the catalogue offers
    deny: tuple[ItemId, ...] = ()  # these may not: out of stock, already seen
    # a code's probability among those that lead to an allowed item (renormalise), so that it depends on what is
    # allowed, or among the whole vocabulary (mask), as the model gave it
    rule: Annotated[
        BeamRule,
        Opt(
            "Probability of a code: among the valid codes (renormalise) or the whole vocabulary (mask).",
            panel=_PANEL,
        ),
    ] = "renormalise"
    # share of item-kNN in the scores, for a decoder that carries one: (1 - knn) · decoder + knn · item-kNN
    knn: Annotated[
        float | None,
        Interval(ge=0, lt=1),
        Opt(
            "Share of item-kNN in the scores; default: what was best on validation users. 0: the decoder alone.",
            panel=_PANEL,
        ),
    ] = None
    level: Level | None = None  # reuse of the prompt; None: exact
    tenant: str = ""  # whose user it is, as in RankRequest


@dataclass(frozen=True, slots=True)
class RecommendResponse:
    request_id: str
    items: tuple[ItemId, ...]  # best first; fewer than n where fewer are valid
    scores: tuple[float, ...]  # log-probability of each item's semantic ID, under the rule; mixed with item-kNN's share
    receipt: RecommendReceipt = field(repr=False)


# ---- generating text -------------------------------------------------------------------------------------------------

FinishReason = Literal["eos", "stop", "length"]
_SPECULATION = re.compile(r"^(none|strict|relaxed)(?:\(([^()]*)\))?$")


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are verified: `none` (nothing is drafted), `strict`, or `relaxed(k, p)`.

    Strict keeps the answer that plain decoding gives: to the bit on the compiled kernels, but for ties in the last bits
    on torch alone. Relaxed accepts a drafted token that is among the k likeliest with a probability above p (DARE,
    arXiv 2408.05676) and repeats no phrase of the answer, so its answer depends on the drafts, and they on earlier
    answers; relaxed(1, 0) is strict.
    """

    name: Literal["none", "strict", "relaxed"] = "strict"
    k: int = 1
    p: float = 0.0

    @classmethod
    def parse(cls, text: str | Speculation) -> Speculation:
        """Reads `text`; raises ConfigError that names the modes there are."""
        if isinstance(text, Speculation):
            return text
        found = _SPECULATION.match(text.strip())
        name, argument = found.groups() if found else (None, None)
        try:
            if name in ("none", "strict") and argument is None:
                return cls("none" if name == "none" else "strict")
            if name == "relaxed":
                k, p = (argument or "2, 0.1").split(",")
                if int(k) >= 1 and 0.0 <= float(p) <= 1.0:
                    return cls("relaxed", int(k), float(p))
        except ValueError:
            pass
        raise ConfigError(
            f"unknown speculation {text!r}: expected none, strict, or relaxed(k, p) with k ≥ 1 and p from 0 to 1"
        )

    def __str__(self) -> str:
        return f"relaxed({self.k}, {self.p})" if self.name == "relaxed" else self.name


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How an answer is decoded."""

    max_tokens: Annotated[int, Ge(1)] = 256  # fewer where the model's context ends
    temperature: Annotated[float, Ge(0)] = 0.0  # 0: the likeliest token (greedy)
    top_p: Annotated[float, Interval(gt=0, le=1)] = (
        1.0  # draw from the smallest set of tokens with this probability mass
    )
    seed: Annotated[int, Interval(ge=0, lt=1 << 64)] = 0  # draws depend on it and on the place in the answer alone
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()  # the answer ends before the first of these
    speculation: Speculation = Speculation("strict")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """An answer in text, after instruction, `history` (oldest first) and question."""

    request_id: str
    history: tuple[Event, ...] = ()
    user_id: UserId | None = None
    options: GenerateOptions = GenerateOptions()
    level: Level | None = None  # reuse of the prompt; None: exact
    history_mode: HistoryMode = "chain"
    tenant: str = ""

    @property
    def opening(self) -> OpenRequest:
        """The prompt that is answered."""
        return OpenRequest(self.request_id, self.history, self.user_id, self.level, self.history_mode, self.tenant)


@dataclass(frozen=True, slots=True)
class Generated:
    request_id: str
    text: str  # without the end-of-sequence token, and cut before the stop string
    token_ids: TokenIds  # all that were decoded, up to the one that ended the answer
    finish_reason: FinishReason
    receipt: GenerateReceipt = field(repr=False)


def check(options: GenerateOptions) -> None:
    """Raises ConfigError for values that cannot work."""
    check_fields(options)
    if options.temperature > 0 and options.speculation.name == "relaxed":
        raise ConfigError(
            f"speculation {options.speculation} is for greedy decoding: it would change the distribution that "
            f"temperature {options.temperature} draws from; use strict, which keeps it"
        )
