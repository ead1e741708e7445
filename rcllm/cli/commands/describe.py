"""The options of `rcllm describe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rcllm.annotated import Ge, Interval, Opt
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.spread import spread
from rcllm.describe.options import DescribeOptions

_SPECULATION, _JOB = "Speculation", "The job"


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """How answers are drafted."""

    speculate: Annotated[
        Literal["strict", "relaxed", "none"],
        Opt(
            "Draft from earlier answers. strict: the text is that of plain decoding. relaxed: likely tokens are "
            "accepted, too; faster, the text depends on the pools, and every divergence is counted.",
            panel=_SPECULATION,
        ),
    ] = "strict"
    k: Annotated[int, Ge(1), Opt("relaxed: accept tokens of this rank or better …", panel=_SPECULATION)] = 2
    p: Annotated[float, Interval(ge=0, le=1), Opt("… and above this probability.", panel=_SPECULATION)] = 0.1
    pools: Annotated[
        Path | None,
        Opt(
            "Earlier answers to draft from; those of this job are added when it ends.",
            metavar="FOLDER",
            panel=_SPECULATION,
        ),
    ] = None
    groups: Annotated[
        int,
        Ge(1),
        Opt(
            "Users are grouped by what they chose, and drafted from answers about their group; --pools that are there "
            "keep theirs.",
            panel=_SPECULATION,
        ),
    ] = 1


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How the job runs."""

    strict: Annotated[bool, Opt("Stop at the first row that cannot be used.", panel=_JOB)] = False
    dry_run: Annotated[bool, Opt("Count, measure a few answers, estimate; write nothing.", panel=_JOB)] = False
    price_per_hour: Annotated[float | None, Ge(0), Opt("Of this machine, to tell the cost.", panel=_JOB)] = None
    cluster: Annotated[
        str | None,
        Opt(
            "Describe with several processes, on Ray: local:4 begins four on this machine; a file is the "
            "configuration, with a section [cluster].",
            metavar="local:N|FILE",
            panel=_JOB,
        ),
    ] = None


@spread("rcllm.cli.describe:describe_command")
def describe(
    rows: Annotated[
        Path,
        Opt(
            "Users (user_id, history: item ids or texts, oldest first) or items (item_id and text fields), as "
            '.parquet, .jsonl or .csv (there a history is one cell: ["i1", "i2"] or i1|i2).',
            name="ROWS",
        ),
    ],
    out: Annotated[Path, Opt("The parquet file to write.", metavar="FILE")],
    options: DescribeOptions,
    speculation: SpeculationOptions,
    job: JobOptions,
    engine_options: EngineOptions,
    item_options: ItemOptions,
) -> None:
    """Describe every user or item in text: knowledge for a click model.

    Killed or interrupted, it goes on where it was when it is run again with the same options. Rows that cannot be used
    go to OUT.rejects.jsonl. Each answer has its finish reason, its tokens, how many were accepted per pass, where
    relaxed verification diverged, and which model, template and version wrote it.

    Example: `rcllm describe users.parquet --items items.jsonl --out knowledge.parquet --dry-run`
    """
