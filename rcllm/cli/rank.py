"""`rcllm rank` and `rcllm explain`. Knows nothing of file formats or of how answers come about."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice

from rcllm.cli.answering import LOADED, Work, check_out, loaded_settings, settings_of, write_answers
from rcllm.cli.calibrated import FILE, admission_from, check_level
from rcllm.cli.inputs import Inputs, load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, RankingOptions, StoreOptions
from rcllm.cli.screen import console, interruptible, say, warm_with_progress
from rcllm.cli.tables import blocks_table, receipt_table, scores_table
from rcllm.core.ranking import RankOptions, RankRequest, RankResponse
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.errors import UncalibratedError
from rcllm.wire.answer_file import check_same_job, opened_answers
from rcllm.wire.lines import one_line, opened_requests, response_to_json
from rcllm.wire.requests import parse_request

_LIKE = 1000  # requests whose shape the sampled canonical contexts take
_REUSES_NOTHING = ("full", "exact")  # levels that read no canonical blocks


def rank_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    requests: str,
    out: str,
    batch: int,
    warm: bool,
    receipts: bool,
    strict: bool,
    restart: bool,
) -> None:
    """Ranks a file of requests, and goes on where an earlier run ended."""
    config = make_config(engine_options, ranking, store)
    check_out(out, requests, config, engine_options, item_options, fidelity, store)
    with opened_requests(requests, partial(parse_request, defaults=config.rank)) as asked:
        total = asked.count(strict=strict)
        inputs = load_inputs(item_options)
        settings = settings_of(
            "rank",
            config,
            asked,
            items=inputs.catalogue,
            receipts=receipts,
            fidelity=fidelity.fidelity or FILE,
            allow_uncalibrated=fidelity.allow_uncalibrated,
        )
        if not restart:
            check_same_job(out, settings, LOADED)
        engine = make_engine(
            config, inputs, [line.request for line in islice(asked.good, _LIKE)], admission_from(fidelity)
        )
        check_level(engine)
        with (
            engine,
            opened_answers(out, settings | loaded_settings(engine), restart=restart) as answers,
            interruptible(answers),
        ):
            if warm:
                _warm(engine, (line.request for line in asked.good if line.number not in answers.answered))
            to_json = partial(response_to_json, receipts=receipts)
            write_answers(Work("ranking", asked, total, engine.rank_batch, to_json, batch, strict), answers)


def explain_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    request: str,
    warm: bool,
    top: int,
) -> None:
    """Shows one answer, block by block."""
    config = make_config(engine_options, ranking, store)
    asked = one_line(request, config.rank)
    inputs = load_inputs(item_options)
    with make_engine(config, inputs, [asked], admission_from(fidelity)) as engine:
        check_level(engine)
        if warm:
            _warm(engine, [asked])
        _explain(engine.rank(asked), asked, inputs, top)
        say(f"rates: {engine.pool.rates.told()}")


def _explain(response: RankResponse, asked: RankRequest, inputs: Inputs, top: int) -> None:
    screen = console()
    screen.print(f"Request {asked.request_id}: {len(asked.candidates)} candidates, {len(asked.history)} events\n")
    screen.print(blocks_table(response, inputs.catalogue))
    screen.print(receipt_table(response.receipt))
    screen.print(scores_table(response, asked, inputs.catalogue, top))


def _warm(engine: Engine, requests: Iterable[RankRequest]) -> None:
    """Computes the instruction, and what the requests name as far as the catalogue has it and their levels read it."""
    reusing = (each for each in requests if _reads_blocks(engine, each.options or engine.config.rank))
    known = [item_id for item_id in named_items(reusing) if item_id in engine.prompter.catalogue]
    if warm_with_progress(engine, known).full:
        say("the cache is full: what did not fit is computed with its requests. Raise --memory-mb to hold more")


def _reads_blocks(engine: Engine, options: RankOptions) -> bool:
    """Whether there is something to warm; a request that will be refused needs nothing."""
    try:
        return engine.admission.admit(options).options.level.name not in _REUSES_NOTHING
    except UncalibratedError:
        return False
