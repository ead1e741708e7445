"""`rcllm recommend`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rcllm.cli.answering import raise_first, write_answers
from rcllm.cli.commands.recommend import SearchOptions
from rcllm.cli.inputs import Inputs, load_inputs, make_config
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.screen import busy, console
from rcllm.cli.tables import facts_table, item_title
from rcllm.codes.sid_files import read_codes
from rcllm.config import Config, PromptConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.engine.recommend import Recommender
from rcllm.errors import CapacityError, ConfigError, RequestError
from rcllm.sid.load import load_recommender
from rcllm.wire.lines import (
    Failure,
    RecommendLine,
    read_item_ids,
    read_recommend_lines,
    recommendation_to_json,
    without_history,
)


def recommend_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
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
) -> None:
    """Answers a file of requests."""
    defaults = RecommendRequest(
        "",
        n=search.n,
        beam=search.beam,
        rule=search.rule,
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
