"""What a job that describes users or items is asked.

Knows nothing of models or files, and imports nothing that takes time, because the command line is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rcllm.annotated import Ge, MinLen, Of, Opt
from rcllm.core.decoding import GenerateOptions, Speculation
from rcllm.core.decoding import check as check_generation
from rcllm.fields import check

Kind = Literal["user", "item"]
STRICT = Speculation("strict")
_ANSWERS, _SPECULATION, _JOB = "Answers", "Speculation", "The job"


@dataclass(frozen=True, slots=True)
class DescribeOptions:
    """How to describe. All of them are part of what a job is resumed with."""

    kind: Annotated[Kind, Opt("What the rows are.", panel=_ANSWERS)] = "user"
    max_tokens: Annotated[int, Ge(1), Opt("Tokens of an answer, at most.", panel=_ANSWERS)] = 120
    temperature: Annotated[
        float, Of(GenerateOptions, "temperature"), Opt("0: always the likeliest token.", panel=_ANSWERS)
    ] = 0.0
    top_p: Annotated[
        float,
        Of(GenerateOptions, "top_p"),
        Opt("Draw from the likeliest tokens with this share.", panel=_ANSWERS),
    ] = 1.0
    stop: Annotated[
        tuple[Annotated[str, MinLen(1)], ...],
        Opt("End an answer before this text; may repeat.", metavar="TEXT", panel=_ANSWERS),
    ] = ()
    seed: Annotated[int, Of(GenerateOptions, "seed"), Opt("For temperatures above 0.", panel=_ANSWERS)] = 0
    speculation: Speculation = STRICT
    max_events: Annotated[int, Ge(1), Opt("Events of a user: the last so many.", panel=_ANSWERS)] = 15
    # another profile takes the place of one that is complete
    batch: Annotated[int, Ge(1), Opt("Rows that are answered together.", panel=_JOB)] = 16
    checkpoint_every: Annotated[int, Ge(1), Opt("Rows of a part; a kill costs at most one part.", panel=_JOB)] = 64
    limit: Annotated[int | None, Ge(1), Opt("Rows, at most.", panel=_JOB)] = None
    # False: nobody's answer drafts another's
    share_text: Annotated[bool, Opt("May one row's answer draft another's?", panel=_SPECULATION)] = True


def check_options(options: DescribeOptions) -> None:
    """Raises ConfigError."""
    check(options)
    check_generation(generation(options, options.seed))


def generation(options: DescribeOptions, seed: int) -> GenerateOptions:
    """How one answer is decoded."""
    return GenerateOptions(
        options.max_tokens, options.temperature, options.top_p, seed, options.stop, options.speculation
    )
