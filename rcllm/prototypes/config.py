"""What the semantic history pool is asked to hold.

Knows nothing of vectors, and imports nothing that takes time, because the command line is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rcllm.annotated import Ge, Interval, Opt, Rule, check_regex

MemberContext = Literal["history", "instruction"]
FRESH_PATTERN = r"\d|^[\W_]*$"  # a digit (numbers, ids, timestamps), or no letter at all (delimiters)
_PANEL = "Which prototypes"


@dataclass(frozen=True, slots=True)
class PrototypeConfig:
    """How prototypes are chosen."""

    prototypes: Annotated[int, Ge(1), Opt("At most so many.", panel=_PANEL)] = 100_000
    tables: Annotated[int, Ge(1), Opt("Hash tables.", panel=_PANEL)] = 8
    # 10 to 20 are useful
    bits: Annotated[int, Interval(ge=1, le=48), Opt("Hyperplanes of a table.", panel=_PANEL)] = 14
    bucket_width: Annotated[int, Ge(1), Opt("Positions that count as one place.", panel=_PANEL)] = 16
    # the same word two places on has about 0.91
    threshold: Annotated[
        float,
        Interval(gt=0, le=1),
        Opt("Least cosine at which a prototype stands for a token.", panel=_PANEL),
    ] = 0.9
    member_context: Annotated[
        MemberContext,
        Opt(
            "What stood before a prototype's text when its KV was computed; default history, or instruction for a "
            "model tuned under the mask blocks.",
            panel=_PANEL,
        ),
    ] = "history"
    # 1: RcLLM's canonical member
    members: Annotated[int, Ge(1), Opt("Occurrences whose mean is a prototype's KV.", panel=_PANEL)] = 1
    fresh_pattern: Annotated[
        str,
        Rule(check_regex),
        Opt("Tokens that are never taken from the pool.", metavar="REGEX", panel=_PANEL),
    ] = FRESH_PATTERN
    texts_per_shard: Annotated[int, Ge(1)] = 64
    seed: Annotated[int, Ge(0), Opt(panel=_PANEL)] = 0
