"""What users bring: items, events, requests, and how a request is to be answered.

Frozen and without tensors. Imports nothing that takes time, because options of the command line are made from it: what
becomes of a request stands in `core/ranking.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, NewType

from rcllm.annotated import Ge, Interval, MinLen, Opt
from rcllm.errors import ConfigError

ItemId = NewType("ItemId", str)
UserId = NewType("UserId", str)
TokenIds = tuple[int, ...]

Readout = Literal["label", "pointwise", "likelihood"]
Layout = Literal["history_first", "items_first"]
LabelPlace = Literal["before", "after"]
Bias = Literal["none", "content_free", "running_mean"]
Mask = Literal["causal", "blocks"]
HistoryMode = Literal["chain", "shared", "semantic"]
Negatives = Literal["uniform", "popularity", "retrieved"]  # how candidates that a user did not choose are drawn
BeamRule = Literal["renormalise", "mask"]
Policy = Literal["rcllm", "k_difference", "first", "question", "static", "two_pass", "tail", "random"]
Reduction = Literal["question", "mean", "sum"]
_PANEL = "How to rank"  # the heading of these options on the command line

# ---- what users bring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of the catalogue."""

    item_id: ItemId
    fields: Mapping[str, str]  # text that may be cached: title, brand, description, …
    volatile: Mapping[str, str] = field(default_factory=dict)  # may change at any time (price, stock): rendered fresh


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a user did. Exactly one of the two fields is given."""

    item_id: ItemId | None = None  # rendered from the catalogue: shared between users
    text: str | None = None  # the user's own words, a review for example: never shared between users


@dataclass(frozen=True, slots=True)
class Interaction:
    """One row of an interaction log."""

    user_id: UserId
    item_id: ItemId
    timestamp: float  # seconds since 1970, or the row's rank in the file where the data has no clock
    text: str | None = None  # review text, where the data has it
    rating: float | None = None


def whose(user_id: UserId | None, tenant: str) -> UserId | None:
    """The name under which a user's KV is kept: two tenants' users never share one, whatever they are called."""
    if user_id is None or (not tenant and not user_id.startswith("\x1f")):
        return user_id
    return UserId(f"\x1f{len(tenant)}:{tenant}:{user_id}")


@dataclass(frozen=True, slots=True)
class RankRequest:
    """Rank `candidates` for a user with this `history` (oldest event first)."""

    request_id: str
    candidates: Annotated[tuple[ItemId, ...], MinLen(1)]
    history: tuple[Event, ...] = ()
    user_id: UserId | None = None
    volatile: Mapping[ItemId, Mapping[str, str]] = field(default_factory=dict)  # overrides the catalogue's, per item
    # fields of items that come with the request, instead of the catalogue's
    texts: Mapping[ItemId, Mapping[str, str]] = field(default_factory=dict)
    options: RankOptions | None = None  # None: the engine's defaults
    positive: ItemId | None = None  # the item the user did choose, where it is known; for evaluation only
    tenant: str = ""  # whose user it is; items are shared among tenants, users never


# ---- how a request is answered --------------------------------------------------------------------------------------

_LEVEL = re.compile(r"^(full|exact|blocks|linked|tail|corrected|auto)(?:\(([^()]*)\))?$")


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the exactness ladder: `exact`, `corrected(0.3, 0.3)`, `linked(16)`, `tail(0.1)`, `blocks`.

    Beside it `full`, which reuses nothing, and `auto`, the cheapest rung that passes the model's calibration.
    """

    name: Literal["full", "exact", "corrected", "linked", "tail", "blocks", "auto"]
    budget: float = 0.0  # linked: fresh tokens per reused block; tail, corrected: fresh share of the reused item tokens
    history_budget: float = 0.0  # corrected: fresh share of the reused history tokens

    @classmethod
    def parse(cls, text: str | Level) -> Level:
        """Reads `text`; raises ConfigError that names the levels there are."""
        if isinstance(text, Level):
            return text
        found = _LEVEL.match(text.strip())
        name, argument = found.groups() if found else (None, None)
        try:
            match name:
                case "full" | "exact" | "blocks" | "auto" if argument is None:
                    return cls(name)
                case "corrected":
                    shares = [float(part) for part in (argument or "0.3").split(",")]
                    items, history = shares if len(shares) == 2 else (*shares, *shares)
                    if 0.0 <= items <= 1.0 and 0.0 <= history <= 1.0:
                        return cls("corrected", items, history)
                case "linked" if (k := int(argument or "16")) >= 0:
                    return cls("linked", k)
                case "tail" if 0.0 <= (share := float(argument or "0.1")) <= 1.0:
                    return cls("tail", share)
        except ValueError:
            pass
        raise ConfigError(
            f"unknown reuse level {text!r}: expected full (nothing reused), exact, corrected(r_item, r_history) or "
            "tail(r) with shares from 0 to 1, linked(k) with k ≥ 0 tokens, blocks, or auto"
        )

    def __str__(self) -> str:
        if self.name == "linked":
            return f"linked({int(self.budget)})"
        if self.name == "corrected":
            return f"corrected({self.budget}, {self.history_budget})"
        return f"tail({self.budget})" if self.name == "tail" else self.name


@dataclass(frozen=True, slots=True)
class Selection:
    """Which reused tokens level `corrected` computes afresh, at equal budgets.

    RcLLM (§III-D, its M7) scores S_i = (1 - λ)·A_i + λ·(|ΔK_i| + |ΔV_i|) after the check layer, items by A_i alone; it
    discloses neither λ, nor the reduction of A, nor the window. In layer 0, K and V depend on the token alone, so there
    only KV of other tokens (prototypes) differs. The policies: `reuse/select.py`.
    """

    policy: Policy = "rcllm"
    divergence: Annotated[float, Interval(ge=0, le=1)] = (
        0.5  # λ: weight of the KV difference against the attention, for history tokens
    )
    reduction: Reduction = "question"  # whose attention A_i is: the question's, or the mean or sum over all that see i
    window: Annotated[int, Ge(0)] = 0  # the last reused tokens before the question, fresh on top of the budgets
    check_layer: Annotated[int, Ge(0)] = 0  # layers up to this one run for all tokens; the scores are taken there


@dataclass(frozen=True, slots=True)
class RankOptions:
    """How to answer; every field has a default that works with an ordinary model."""

    # auto is exact until a calibration allows more; a model tuned under the block mask is exact at `blocks`
    level: Annotated[
        Level,
        Opt(
            "auto (the fastest that is calibrated, else exact), full (nothing reused), exact (cached prefix), "
            "corrected(r_item, r_history), linked(k), tail(r) or blocks.",
            metavar="LEVEL",
            panel=_PANEL,
        ),
    ] = Level("auto")
    readout: Annotated[
        Readout,
        Opt(
            "label: a letter per candidate; pointwise: yes or no; likelihood: how likely its text is (the one that "
            "works with an untuned model).",
            panel=_PANEL,
        ),
    ] = "label"
    layout: Annotated[Layout, Opt("What comes first in the prompt.", panel=_PANEL)] = "history_first"
    # fresh label tokens after their item see history and item
    label_place: Annotated[LabelPlace, Opt("Where a candidate's label stands, by its item.", panel=_PANEL)] = "after"
    parallel: bool = False  # all candidates share one base position and do not see each other
    bias: Bias = "none"  # correction of the label letters' own bias
    history: HistoryMode = "shared"  # reuse events position-free, only the user's own chain, or from token prototypes
    selection: Selection = Selection()  # level corrected: which tokens are fresh
