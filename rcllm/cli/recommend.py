"""`rcllm recommend`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from rcllm.cli.answering import (
    Restart,
    Work,
    check_out,
    loaded_settings,
    one_each,
    settings_of,
    write_answers,
)
from rcllm.cli.inputs import Inputs, load_inputs, make_config
from rcllm.cli.options import EngineOptions, ItemOptions, spread
from rcllm.cli.screen import busy, console, interruptible, say
from rcllm.cli.tables import facts_table, item_title
from rcllm.codes.sid_files import STYLE, read_codes
from rcllm.config import Config, PromptConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId
from rcllm.data.files import Fields
from rcllm.engine.recommend import Recommender
from rcllm.errors import ConfigError, RcllmError
from rcllm.sid.load import load_recommender
from rcllm.wire.answer_file import check_same_job, opened_answers
from rcllm.wire.lines import STDIO, opened_requests, read_item_ids, recommendation_to_json, without_history
from rcllm.wire.requests import parse_recommend_request

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
    restart: Restart = False,
) -> None:
    """Recommend items of the whole catalogue, with a model that generates semantic IDs.

    A request: `{"request_id": "r1", "history": ["a", "b"]}`; it may bring its own `n`, `beam`, `rule`, `allow` and
    `deny` (which adds to --deny). An answer holds only items that exist and are allowed; fewer than n where fewer are.
    A request that fails becomes a line with its error, and the others go on.

    Answers are written as they come. After an interruption, a kill or a full disk, the same command goes on after what
    --out holds, and tries again what failed; OUT.job.json beside it tells whether it is the same command.

    Ends with 0 when all requests were answered, 1 when one failed, 2 when an option is wrong, 130 when interrupted.

    --model is a folder that `rcllm sid train` made; its catalogue is inside. Example:

    `rcllm recommend --model decoder --in requests.jsonl --out answers.jsonl --n 10 --beam 128 --unseen
    --deny sold-out.txt`
    """
    config = _config(engine_options, codes)
    check_out(out, requests, config, engine_options, item_options, codes, allow, deny)
    defaults = RecommendRequest(
        "",
        n=n,
        beam=beam,
        rule=rule,
        allow=read_item_ids(allow) if allow else None,
        deny=read_item_ids(deny) if deny else (),
    )
    with opened_requests(requests, partial(_parse, defaults=defaults, unseen=unseen)) as asked:
        total = asked.count(strict=strict)
        inputs = load_inputs(item_options) if item_options.items or item_options.dataset else None
        given = {"n": n, "beam": beam, "rule": rule, "allow": allow, "deny": deny, "unseen": unseen, "explain": explain}
        items = inputs.catalogue if inputs else None
        settings = settings_of("recommend", config, asked, items=items, codes=codes, style=style, **given)
        if not restart:
            check_same_job(out, settings)
        recommender = _recommender(config, inputs, codes, style)
        answerer = _Answerer(recommender, defaults, explain=explain)
        settings |= loaded_settings(recommender.engine)
        with opened_answers(out, settings, restart=restart) as answers, interruptible(answers):
            to_json = partial(recommendation_to_json, receipts=explain)
            work = Work("recommending", asked, total, answerer.answer, to_json, batch, strict)
            write_answers(work, answers, answerer.conclude)


def _parse(fields: Fields, defaults: RecommendRequest, unseen: bool) -> RecommendRequest:
    request = parse_recommend_request(fields, defaults)
    return without_history(request) if unseen else request


class _Answerer:
    """Answers batches, with a note where a list names items that the catalogue lacks; shows the first answer if asked.

    Ids that no item has are passed over, since items come and go, so that a mistake in a list must be told of.
    """

    def __init__(self, recommender: Recommender, defaults: RecommendRequest, *, explain: bool) -> None:
        self._recommender, self._defaults, self._explain = recommender, defaults, explain
        self._ids = recommender.catalogue.epoch().item_ids
        self._allow, self._deny = self._lacking("--allow", defaults.allow), self._lacking("--deny", defaults.deny)
        self._num_lacking = 0  # requests whose own lists name such items
        for note in (*self._allow, *self._deny):
            say(f"warning: {note}")

    def answer(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse | RcllmError]:
        found = one_each(self._recommender.recommend_batch, requests)
        return [
            answer if isinstance(answer, RcllmError) else self._told(request, answer)
            for request, answer in zip(requests, found, strict=True)
        ]

    def conclude(self) -> None:
        if self._num_lacking:
            say(
                "warning: allow or deny names items that are not in the catalogue in "
                f"{self._num_lacking:,} of the requests; the notes of their answers say how many"
            )

    def _told(self, request: RecommendRequest, response: RecommendResponse) -> RecommendResponse:
        replaced = request.allow is not self._defaults.allow
        allow = self._lacking("allow", request.allow) if replaced else []
        deny = self._lacking("deny", request.deny[len(self._defaults.deny) :])
        self._num_lacking += bool(allow or deny)
        notes = (*response.receipt.notes, *(allow if replaced else self._allow), *self._deny, *deny)
        response = replace(response, receipt=replace(response.receipt, notes=notes))
        if self._explain:
            _show(response, self._recommender)
            self._explain = False
        return response

    def _lacking(self, name: str, item_ids: Sequence[ItemId] | None) -> list[str]:
        """One note where some of these are no items, or none."""
        item_ids = item_ids or ()
        lacking = [each for each, number in zip(item_ids, self._ids.find(item_ids), strict=True) if number is None]
        if not lacking:
            return []
        count = (
            f"{len(lacking):,} of {len(item_ids):,} ids"
            if len(lacking) < len(item_ids)
            else f"all {len(lacking):,} ids"
        )
        return [f"{name}: {count} are not in the catalogue, such as {lacking[0]!r}"]


def _recommender(config: Config, inputs: Inputs | None, codes: Path | None, style: str) -> Recommender:
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
    screen.print(facts_table("Receipt", facts | ({"notes": "\n".join(receipt.notes)} if receipt.notes else {})))


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
