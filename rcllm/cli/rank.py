"""`rcllm rank` and `rcllm explain`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from rcllm.cli.answering import raise_first, write_answers
from rcllm.cli.calibrated import admission_from, check_level
from rcllm.cli.inputs import Inputs, load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, RankingOptions
from rcllm.cli.screen import console, say, warm_with_progress
from rcllm.cli.tables import blocks_table, receipt_table, scores_table
from rcllm.core.ranking import RankOptions, RankRequest, RankResponse
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.errors import CapacityError, ConfigError, RequestError, UncalibratedError
from rcllm.wire.lines import (
    Failure,
    RequestLine,
    one_line,
    read_lines,
    response_to_json,
)

_REUSES_NOTHING = ("full", "exact")  # levels that read no canonical blocks


def rank_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    requests: str,
    out: str,
    batch: int,
    warm: bool,
    receipts: bool,
    strict: bool,
) -> None:
    """Ranks a file of requests."""
    config = make_config(engine_options, ranking)
    lines = read_lines(requests, config.rank)
    if strict:
        raise_first(lines, requests)
    inputs = load_inputs(item_options)
    good = [line.request for line in lines if isinstance(line, RequestLine)]
    engine = make_engine(config, inputs, good, admission_from(fidelity))
    check_level(engine)
    if warm:
        _warm(engine, good)
    write_answers(
        _answers(engine, lines, batch),
        len(lines),
        partial(response_to_json, receipts=receipts),
        doing="ranking",
        source=requests,
        out=out,
        strict=strict,
    )


def explain_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    request: str,
    warm: bool,
    top: int,
) -> None:
    """Shows one answer, block by block."""
    config = make_config(engine_options, ranking)
    asked = one_line(request, config.rank)
    inputs = load_inputs(item_options)
    engine = make_engine(config, inputs, [asked], admission_from(fidelity))
    check_level(engine)
    if warm:
        _warm(engine, [asked])
    response = engine.rank(asked)
    _explain(response, asked, inputs, top)


def _explain(response: RankResponse, asked: RankRequest, inputs: Inputs, top: int) -> None:
    screen = console()
    screen.print(f"Request {asked.request_id}: {len(asked.candidates)} candidates, {len(asked.history)} events\n")
    screen.print(blocks_table(response, inputs.catalogue))
    screen.print(receipt_table(response.receipt))
    screen.print(scores_table(response, asked, inputs.catalogue, top))


def _answers(engine: Engine, lines: Sequence[RequestLine | Failure], size: int) -> Iterator[RankResponse | Failure]:
    """One answer per line, in order; good lines that follow each other are ranked in batches."""
    batch: list[RequestLine] = []
    for line in lines:
        if isinstance(line, RequestLine):
            batch.append(line)
        if batch and (isinstance(line, Failure) or len(batch) == size):
            yield from _rank(engine, batch)
            batch = []
        if isinstance(line, Failure):
            yield line
    if batch:
        yield from _rank(engine, batch)


def _rank(engine: Engine, batch: Sequence[RequestLine]) -> list[RankResponse | Failure]:
    """Ranks a batch; where it is refused for one request, that one fails and the others are ranked alone."""
    try:
        return list(engine.rank_batch([line.request for line in batch]))
    except (RequestError, ConfigError, CapacityError) as error:
        if len(batch) == 1:
            line = batch[0]
            return [Failure(line.number, line.request.request_id, str(error))]
        return [answer for line in batch for answer in _rank(engine, [line])]


def _warm(engine: Engine, requests: Sequence[RankRequest]) -> None:
    """Computes the instruction, and what the requests name as far as the catalogue has it and their levels read it."""
    options = [request.options or engine.config.rank for request in requests]
    reusing = [r for r, o in zip(requests, options, strict=True) if _reads_blocks(engine, o)]
    known = [item_id for item_id in named_items(reusing) if item_id in engine.prompter.catalogue]
    if warm_with_progress(engine, known).full:
        say("the cache is full: what did not fit is computed with its requests. Raise --memory-mb to hold more")


def _reads_blocks(engine: Engine, options: RankOptions) -> bool:
    """Whether there is something to warm; a request that will be refused needs nothing."""
    try:
        return engine.admission.admit(options).options.level.name not in _REUSES_NOTHING
    except UncalibratedError:
        return False
