"""`rcllm recommend`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from rcllm.cli.answering import raise_first, write_answers
from rcllm.cli.inputs import Inputs, load_inputs, make_config
from rcllm.cli.options import EngineOptions, ItemOptions, spread
from rcllm.cli.screen import busy, console, say
from rcllm.cli.tables import facts_table, item_title
from rcllm.codes.sid_files import STYLE, read_codes
from rcllm.config import Config, PromptConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId
from rcllm.data.ids import tell_unknown
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import CapacityError, ConfigError, RequestError
from rcllm.sid.load import load_recommender
from rcllm.wire.lines import (
    STDIO,
    Failure,
    RecommendLine,
    read_item_ids,
    read_recommend_lines,
    recommendation_to_json,
    without_history,
)

_HOW = "What to recommend"


@spread
def recommend_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    requests: Annotated[str, typer.Option("--in", metavar="FILE|-", help="Requests as JSON lines; - is stdin.")],
    out: Annotated[str, typer.Option(metavar="FILE|-", help="Where answers go, as JSON lines; - is stdout.")] = STDIO,
    n: Annotated[int, typer.Option("--n", min=1, help="Items per answer.", rich_help_panel=_HOW)] = 10,
    beam: Annotated[
        int,
        typer.Option(min=1, help="Prefixes that are kept at each level; wider finds more.", rich_help_panel=_HOW),
    ] = 64,
    rule: Annotated[
        Literal["renormalise", "mask"],
        typer.Option(
            help="Probability of a code: among the valid codes (renormalise) or the whole vocabulary (mask).",
            rich_help_panel=_HOW,
        ),
    ] = "renormalise",
    allow: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only these items: an id per line.", rich_help_panel=_HOW),
    ] = None,
    deny: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="None of these items: an id per line.", rich_help_panel=_HOW),
    ] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="None of the items in the user's history.", rich_help_panel=_HOW)
    ] = False,
    codes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Semantic IDs of items (.parquet, or an index.json as of LC-Rec), for a model that was not made by "
            "`rcllm sid train`. Needs --template.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    style: Annotated[
        str,
        typer.Option(metavar="TEXT", help="How the model's vocabulary writes a code.", rich_help_panel=_HOW),
    ] = STYLE,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are taken at once.")] = 16,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add the receipt to each answer, and show the first answer as a table.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row or request.")] = False,
) -> None:
    """Recommend items of the whole catalogue, with a model that generates semantic IDs.

    A request: `{"request_id": "r1", "history": ["a", "b"]}`; it may bring its own `n`, `beam`, `rule`, `allow` and
    `deny` (which adds to --deny). An answer holds only items that exist and are allowed; fewer than n where fewer are.
    A request that fails becomes a line with its error, the others go on, and the command ends with 1.

    --model is a folder that `rcllm sid train` made; its catalogue is inside. Example:

    `rcllm recommend --model decoder --in requests.jsonl --out answers.jsonl --n 10 --beam 128 --unseen
    --deny sold-out.txt`
    """
    defaults = RecommendRequest(
        "",
        n=n,
        beam=beam,
        rule=rule,
        allow=read_item_ids(allow) if allow else None,
        deny=read_item_ids(deny) if deny else (),
    )
    lines = read_recommend_lines(requests, defaults)
    if strict:
        raise_first(lines, requests)
    if unseen:
        lines = [without_history(line) if isinstance(line, RecommendLine) else line for line in lines]
    inputs = load_inputs(item_options) if item_options.items or item_options.dataset else None
    recommender = _recommender(engine_options, inputs, codes, style)
    _tell_unknown(defaults, recommender, allow, deny)
    answers = _answers(recommender, lines, batch)
    write_answers(
        _first_shown(answers, recommender) if explain else answers,
        len(lines),
        partial(recommendation_to_json, receipts=explain),
        doing="recommending",
        source=requests,
        out=out,
        strict=strict,
    )


def _tell_unknown(defaults: RecommendRequest, recommender: Recommender, allow: Path | None, deny: Path | None) -> None:
    """Warns of ids in the lists that no item has: a misspelt one in --deny would be recommended after all."""
    for path, ids in ((allow, defaults.allow), (deny, defaults.deny)):
        if path is not None and (unknown := tell_unknown(str(path), ids or (), _known_ids(recommender))):
            say(f"warning: {unknown}")


def _known_ids(recommender: Recommender) -> frozenset[ItemId]:
    return frozenset(recommender.codes.epoch().item_ids)


def _first_shown(
    answers: Iterable[RecommendResponse | Failure], recommender: Recommender
) -> Iterator[RecommendResponse | Failure]:
    """The same answers; shows the first recommendation."""
    shown = False
    for answer in answers:
        if not shown and not isinstance(answer, Failure):
            _show(answer, recommender)
            shown = True
        yield answer


def _recommender(options: EngineOptions, inputs: Inputs | None, codes: Path | None, style: str) -> Recommender:
    config = _config(options, codes)
    code_index = read_codes(codes) if codes else None
    with busy(f"loading {config.model.path}"):
        return load_recommender(config, code_index, inputs.catalogue if inputs else None, style=style)


def _config(options: EngineOptions, codes: Path | None) -> Config:
    config = make_config(options)
    if options.model is None and options.config is None:
        raise ConfigError(
            "there is no model: give --model FOLDER, made by `rcllm sid train`, or another model whose vocabulary "
            "holds semantic IDs together with --codes FILE and --template"
        )
    if codes is not None and config.prompt.template == PromptConfig().template:
        raise ConfigError("--codes is for a model with prompts of its own: give --template FILE, which writes them")
    return config


def _answers(
    recommender: Recommender, lines: Sequence[RecommendLine | Failure], size: int
) -> Iterator[RecommendResponse | Failure]:
    """One answer per line, in order."""
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        good = [line for line in some if not isinstance(line, Failure)]
        answers = iter(_recommend(recommender, good) if good else [])
        yield from (line if isinstance(line, Failure) else next(answers) for line in some)


def _recommend(recommender: Recommender, batch: Sequence[RecommendLine]) -> list[RecommendResponse | Failure]:
    """Answers a batch; where it is refused for one request, that one fails and the others are answered alone."""
    try:
        return list(recommender.recommend_batch([line.request for line in batch]))
    except (RequestError, ConfigError, CapacityError) as error:
        if len(batch) == 1:
            return [Failure(batch[0].number, batch[0].request.request_id, str(error))]
        return [answer for line in batch for answer in _recommend(recommender, [line])]


def _show(response: RecommendResponse, recommender: Recommender) -> None:
    """On stderr, since stdout may be where the answers go."""
    screen = console(stderr=True)
    screen.print(_items_table(response, recommender))
    screen.print(_steps_table(response))
    receipt = response.receipt
    facts = {
        "prompt": f"{receipt.num_tokens:,} tokens = {receipt.num_reused:,} reused + {receipt.num_fresh:,} fresh, "
        f"level {receipt.level}",
        "search": f"beam {receipt.beam}, rule {receipt.rule}, epoch {receipt.epoch} of the catalogue",
        "KV read": f"{receipt.kv_bytes_read / 1e6:,.1f} MB; once per beam: {receipt.kv_bytes_naive / 1e6:,.1f} MB",
        "stages, ms": ", ".join(f"{name} {ms:,.1f}" for name, ms in receipt.stage_ms.items()),
    }
    screen.print(facts_table("RankReceipt", facts | ({"notes": "\n".join(receipt.notes)} if receipt.notes else {})))


def _items_table(response: RecommendResponse, recommender: Recommender) -> Table:
    table = Table(title=f"Request {response.request_id}: {len(response.items)} items", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("log-probability", justify="right")
    table.add_column("item")
    table.add_column("title", max_width=60, no_wrap=True, overflow="ellipsis")
    for rank, (item_id, score) in enumerate(zip(response.items, response.scores, strict=True), 1):
        title = item_title(recommender.engine.prompter.catalogue, item_id)
        table.add_row(str(rank), f"{score:.4f}", Text(item_id), Text(title))
    return table


def _steps_table(response: RecommendResponse) -> Table:
    table = Table(title="Levels", title_justify="left")
    for name in ("level", "beams", "valid children", "not allowed", "left unsorted", "kept"):
        table.add_column(name, justify="right")
    for level, step in enumerate(response.receipt.steps, 1):
        counts = (step.num_parents, step.num_children, step.num_dead, step.num_skipped, step.num_kept)
        table.add_row(str(level), *(f"{count:,}" for count in counts))
    return table
