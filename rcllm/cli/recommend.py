"""`rcllm recommend`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rcllm.cli.answering import LOADED, Work, check_out, loaded_settings, settings_of, write_answers
from rcllm.cli.commands.recommend import SearchOptions
from rcllm.cli.inputs import Inputs, load_inputs_given, make_config
from rcllm.cli.options import EngineOptions, ItemOptions, StoreOptions
from rcllm.cli.screen import busy, console, interruptible, say
from rcllm.cli.tables import facts_table, item_title
from rcllm.codes.sid_files import read_codes
from rcllm.config import Config, PromptConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId
from rcllm.data.raw import Fields
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import ConfigError, RcllmError
from rcllm.sid.load import load_recommender
from rcllm.wire.answer_file import check_same_job, opened_answers
from rcllm.wire.lines import opened_requests, read_item_ids, recommendation_to_json, without_history
from rcllm.wire.requests import parse_recommend_request


def recommend_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    store: StoreOptions,
    requests: str,
    search: SearchOptions,
    out: str,
    allow: Path | None,
    deny: Path | None,
    unseen: bool,
    codes: Path | None,
    style: str,
    batch: int,
    explain: bool,
    strict: bool,
    restart: bool,
) -> None:
    """Answers a file of requests, and goes on where an earlier run ended."""
    config = _config(engine_options, store, codes)
    check_out(out, requests, config, engine_options, item_options, store, codes, allow, deny)
    defaults = RecommendRequest(
        "",
        n=search.n,
        beam=search.beam,
        rule=search.rule,
        knn=search.knn,
        allow=read_item_ids(allow) if allow else None,
        deny=read_item_ids(deny) if deny else (),
    )
    with opened_requests(requests, partial(_parse, defaults=defaults, unseen=unseen)) as asked:
        total = asked.count(strict=strict)
        inputs = load_inputs_given(item_options)
        given = {**asdict(search), "allow": allow, "deny": deny, "unseen": unseen, "explain": explain}
        items = inputs.catalogue if inputs else None
        settings = settings_of("recommend", config, asked, items=items, codes=codes, style=style, **given)
        if not restart:
            check_same_job(out, settings, LOADED)
        recommender = _recommender(config, inputs, codes, style)
        answerer = _Answerer(recommender, defaults, explain=explain)
        settings |= loaded_settings(recommender.engine)
        with (
            recommender.engine,
            opened_answers(out, settings, restart=restart) as answers,
            interruptible(answers),
        ):
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
        self._ids = recommender.codes.epoch().item_ids
        self._allow, self._deny = self._lacking("--allow", defaults.allow), self._lacking("--deny", defaults.deny)
        self._num_lacking = 0  # requests whose own lists name such items
        for note in (*self._allow, *self._deny):
            say(f"warning: {note}")

    def answer(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse | RcllmError]:
        found = self._recommender.recommend_batch(requests)
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


def _config(options: EngineOptions, store: StoreOptions, codes: Path | None) -> Config:
    config = make_config(options, store=store)
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
        "item-kNN": f"{receipt.knn:.0%} of the scores; {receipt.num_by_knn} items that no beam found",
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
