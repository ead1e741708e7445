"""The options of `rcllm pool build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Of, Opt
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.spread import Without, spread
from rcllm.prototypes.config import MemberContext, PrototypeConfig

_FROM = "From what"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where the texts come from."""

    texts: Annotated[
        Path | None,
        Opt(
            "Texts instead of --dataset: a .txt with one a line, or rows (.jsonl, .csv, .parquet) with text and, "
            "optionally, user_id.",
            metavar="FILE",
            panel=_FROM,
        ),
    ] = None
    reviews: Annotated[bool, Opt("Users' own words instead of items' titles.", panel=_FROM)] = False
    history: Annotated[int, Ge(1), Opt("Events of a user: the last so many, as in requests.", panel=_FROM)] = 10
    limit: Annotated[int | None, Ge(1), Opt("Users, at most.", panel=_FROM)] = None
    exclude_users: Annotated[
        Path | None, Opt("User ids, one a line, whose texts are left out.", metavar="FILE", panel=_FROM)
    ] = None


@dataclass(frozen=True, slots=True)
class MemberOptions:
    """What depends on the model where it is not given."""

    member_context: Annotated[MemberContext | None, Of(PrototypeConfig, "member_context")] = None


@spread("rcllm.cli.pool:build_command")
def build(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    texts: TextOptions,
    prototypes: Annotated[PrototypeConfig, Without(("member_context",))],
    member: MemberOptions,
    out: Annotated[Path, Opt("Where the pool goes; OUT.work beside it while it grows.", metavar="FILE")],
) -> None:
    """Build the semantic history pool: token prototypes shared by all users.

    They are RcLLM's, with K and V of every layer. Run it again with the same options to go on after an interruption.
    Numbers, ids, timestamps, delimiters and field names never get into it. Prototypes are made of users' texts: to
    erase a user, build it again with --exclude-users. Of a data set, training users alone are used.

    Example: `rcllm pool build --dataset movielens --out history.pool`, or
    `rcllm pool build --texts reviews.jsonl --prototypes 20000 --out history.pool`
    """
