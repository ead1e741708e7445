"""The engine on one device: a model, a catalogue and a cache behind one loop.

Rank, recommend and generate are jobs (`engine/jobs/`), whose rows go through the layers together; the path of a request
stands in `engine/loop.py`. Invariant: an answer does not depend on what is in the cache, beyond the tolerance of the
kernels (docs/numerics.md); the cache decides how fast it comes. Threads may ask at any time; whoever waits for an
answer runs the loop.
"""

from __future__ import annotations

import itertools
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from rcllm.cache.pool import Pool, PoolStats
from rcllm.config import Config, resolve
from rcllm.core.ranking import Item, ItemId, Mask, RankRequest, RankResponse, UserId, whose
from rcllm.data.catalogue import Catalogue
from rcllm.data.live import LiveCatalogue
from rcllm.engine.build import (
    identity,
    load_decoder,
    make_pool,
    make_prompter,
    open_prototypes,
    this_machine,
)
from rcllm.engine.fit import fit
from rcllm.engine.intake import Intake
from rcllm.engine.items import ItemChanges, compare, completed
from rcllm.engine.job import Job, Listener, Refused, Ticket
from rcllm.engine.jobs.rank import Rank
from rcllm.engine.loop import RequestLoop
from rcllm.engine.prefill import Prefill
from rcllm.engine.space import about, declared_mask, model_fingerprint, space_of
from rcllm.engine.tiers import Tiers, open_tiers
from rcllm.engine.warming import Warming, WarmProgress
from rcllm.errors import RcllmError, answered
from rcllm.metrics import Clock, PassClock, Trace
from rcllm.model.decoder import Decoder
from rcllm.model.pull import pull
from rcllm.prompt.blocks import Prompter
from rcllm.prototypes.pool import PrototypePool
from rcllm.reuse.missing import item_owner, user_owner
from rcllm.schedule.admission import Admission, AdmissionFactory, Identity, Open
from rcllm.schedule.cost import CostModel
from rcllm.schedule.work import DEFAULT_TERMS, NO_LIMITS, KindLimits, Queue, Terms
from rcllm.store.contract import Store

Request = TypeVar("Request")
Response = TypeVar("Response")


class Engine:
    """Make one with `Engine.build`."""

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        prompter: Prompter,
        pool: Pool,
        model_id: str,
        admission: Admission | None = None,
        prototypes: PrototypePool | None = None,
        *,
        tiers: Tiers | None = None,
        clock: Clock = time.perf_counter,
        node: str = "",
        trace: Trace | None = None,
    ) -> None:
        """admission: which reuse levels may be used; None for all. prototypes: for history "semantic".

        tiers: below the pool, which end with the engine.

        clock: seconds; node: what receipts call this machine, by default its name; trace: told of every stage.
        """
        self.config, self.decoder, self.prompter, self.pool, self.model_id = config, decoder, prompter, pool, model_id
        self.prototypes, self.node = prototypes, node or platform.node()
        self.clock, self.pass_clock, self.tiers = clock, PassClock(clock), tiers or Tiers()
        self._prefill = Prefill(decoder, prompter, pool, config.cache, _mask(config), prototypes, self.pass_clock)
        self.rank_job = Rank(
            config, decoder, prompter, self._prefill, admission or Open.of(self.identity, prompter.context_name)
        )
        names = {"node": self.node, "model": model_id}  # of receipts
        self.loop = RequestLoop(config, decoder, self._prefill, pool, self.catalogue, self.pass_clock, names, trace)
        self._updating = threading.Lock()  # of the catalogue; taken before a turn

    @classmethod
    def build(
        cls,
        catalogue: Mapping[ItemId, Item],
        config: Config | None = None,
        samples: Sequence[RankRequest] = (),
        admission: AdmissionFactory = Open.of,
        store: Store | None = None,
        *,
        peers: Store | None = None,
        node: str = "",
        share: float = 1.0,
        beside: Pool | None = None,
    ) -> Engine:
        """Loads the model and makes an empty pool, over the store that the configuration names, if it names one.

        `samples`: real requests for the canonical contexts `typical` and `mean(n)`. `admission`: told what the engine
        is, makes what decides which reuse levels may be used; by default, all. `store`: in place of the one that the
        configuration names; whoever opened it closes it. `peers`: what other machines have, a tier beside those that
        the configuration names; `node`: what receipts call this machine. `share`, `beside`: how a process divides its
        memory between two engines, see `make_pool`. Fetches the model when it is not there. Warns of a catalogue or
        configuration that template or adapter do not fit, and of tiers that cannot be used. Raises ConfigError,
        DataError, ModelError, FetchError.
        """
        config = declared_mask(resolve(config or Config(), this_machine()))
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        fitted = fit(catalogue, config)
        fitted.warn()
        folder = pull(config.model.path)
        model = model_fingerprint(config, folder)
        decoder = load_decoder(config, folder)
        prompter = make_prompter(config, folder, model, decoder, fitted, samples)
        model_id = model.hex()[:12]
        prototypes = open_prototypes(config, decoder, prompter)
        admitting = admission(identity(config, prompter, model_id, prototypes), prompter.context_name)
        space = space_of(prompter.namespace)
        if store is None:
            on_gpu = config.model.device == "cuda"
            tiers = open_tiers(config.store, space, about(config, model_id), peers, on_gpu=on_gpu)
        else:
            tiers = Tiers.heeding(store)
        below = tiers.store if store is None else store
        pool = make_pool(config, decoder, below, space, share=share, beside=beside)
        tiers.load_rates(pool.rates)
        return cls(config, decoder, prompter, pool, model_id, admitting, prototypes, tiers=tiers, node=node)

    @property
    def identity(self) -> Identity:
        """What a calibration of this engine holds for."""
        return identity(self.config, self.prompter, self.model_id, self.prototypes)

    @property
    def catalogue(self) -> LiveCatalogue:
        """The items as they read now."""
        assert isinstance(self.prompter.catalogue, LiveCatalogue), "make_prompter makes it one"
        return self.prompter.catalogue

    @property
    def admission(self) -> Admission:
        """Which reuse levels rankings may use."""
        return self.rank_job.admission

    @admission.setter
    def admission(self, admission: Admission) -> None:
        self.rank_job.admission = admission

    def ranking(self, admission: Admission, kind: str = "rank", limits: KindLimits = NO_LIMITS) -> Rank:
        """A job that ranks under another admission, such as a guard's shadows, or a replay of what was answered."""
        return Rank(self.config, self.decoder, self.prompter, self._prefill, admission, kind, limits)

    # ---- asking ----

    def rank(self, request: RankRequest) -> RankResponse:
        """Scores the candidates of one request. Raises RequestError, ConfigError or CapacityError."""
        return answered(self.rank_batch([request]))[0]

    def rank_batch(self, requests: Sequence[RankRequest]) -> list[RankResponse | RcllmError]:
        """Per request its response, or its error; misses and fresh tokens are computed together as memory allows."""
        return self.run(self.rank_job, requests)

    def run(self, job: Job[Request, Response], requests: Sequence[Request]) -> list[Response | RcllmError]:
        """Per request its response, or its error, in their order."""
        tickets = list[Ticket | Refused]()
        try:
            for request in requests:
                tickets.append(self.submit(job, request))
                self.loop.hasten()
            self.loop.run(until=lambda: all(ticket.done for ticket in tickets))
        finally:
            self.cancel(tickets)  # where an interrupt left some
        return [_result(ticket) for ticket in tickets]

    def stream(
        self, job: Job[Request, Response], requests: Iterable[Request], ahead: int
    ) -> Iterator[tuple[Request, Response | RcllmError]]:
        """Requests with what became of them, as they are done; takes more in while fewer than `ahead` are under way."""
        source, alive = iter(requests), list[Ticket | Refused]()
        try:
            while True:
                for request in itertools.islice(source, ahead - len(alive)):
                    alive.append(self.submit(job, request))
                if not alive:
                    return
                self.loop.run(until=partial(_any_done, alive))
                done, alive = [t for t in alive if t.done], [t for t in alive if not t.done]
                yield from ((ticket.request, _result(ticket)) for ticket in done)
        finally:
            self.cancel(alive)

    def submit(
        self,
        job: Job[Request, Response],
        request: Request,
        *,
        terms: Terms = DEFAULT_TERMS,
        listener: Listener | None = None,
    ) -> Ticket | Refused:
        """Takes a request in, in the caller's thread; one that is wrong, or has no time, is done at once.

        `terms`: by when it is wanted; what is given up for that stands in its receipt. `listener`: told of tokens and
        of the outcome as they come, for callers that do not run the loop themselves.
        """
        self.tiers.heed_erasures(self.pool)
        return self.loop.submit(job, request, terms, listener)

    def step(self) -> bool:
        """One pass over the rows of whoever's turn it is; False where nobody waits. One thread at a time."""
        return self.loop.step()

    def turn(self) -> bool:
        """`step` in this thread's turn, beside others that compute; for whoever runs the loop for everybody."""
        return self.loop.turn()

    def cancel(self, tickets: Iterable[Ticket | Refused]) -> None:
        """Ends requests that are not done; waits for the pass that runs."""
        self.loop.cancel(tickets)

    def withdraw(self, ticket: Ticket) -> None:
        """Ends a request before the next pass; returns at once."""
        self.loop.withdraw(ticket)

    def alone(self) -> AbstractContextManager[None]:
        """Nothing is computed inside, for changes of what jobs keep between passes."""
        return self.loop.alone()

    def queue(self, tenant: str = "") -> Queue:
        """What a ranking of a tenant would find, were it asked for now: for metrics, pages and routing."""
        return self.loop.queue(self.rank_job, tenant)

    @property
    def intake(self) -> Intake:
        """What is taken in, and what became of requests at the door."""
        return self.loop.intake

    @property
    def costs(self) -> CostModel:
        """What passes are estimated to take."""
        return self.loop.costs

    # ---- the cache ----

    def warm(
        self,
        item_ids: Iterable[ItemId] | None = None,
        *,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmProgress:
        """Computes items ahead of requests, as candidates and (history "shared") as events, for the default options.

        Blocks that exist are skipped, so it can be repeated and resumed. Stops when the pool is full: what is left is
        computed when it is asked for. Give the most requested items first. Requests are served in between.
        """
        warming = Warming(self._prefill, self.prompter, self.catalogue, self.pool, self.config, self.clock)
        for progress in warming.run(item_ids, self.loop.alone):
            if on_progress:
                on_progress(progress)
        return progress

    def upsert_items(self, items: Iterable[Item], gone: Collection[ItemId] = ()) -> ItemChanges:
        """Puts items into the catalogue, in place of those with their ids, and takes `gone` out of it.

        Once it returns, no answer reads an old text: it waits for requests that were submitted before, and cancels
        those that only fill idle time, for which there may be none. Items that read as before keep their cached blocks;
        those of the others are removed from every tier, and computed when they are asked for, or by
        `warm(changes.added + changes.changed)`. Raises DataError for an id that is given twice, and what the store
        raises.
        """
        given = completed(items, self.catalogue, self.prompter.template.shown)
        with self._updating:
            changes = compare(self.prompter.texts, self.catalogue, given, gone)
            self.catalogue.put(given, gone)
            before = self.loop.under_way() if changes.stale else []
            self.cancel(ticket for ticket in before if ticket.job.limits.idle)
            self.loop.run(until=lambda: all(ticket.done for ticket in before))
            for item_id in changes.stale:
                self.intake.last_scores.forget_item(item_id)
            return replace(changes, num_blocks=sum(self.retire_item(item_id) for item_id in changes.stale))

    def reload_items(self, items: Iterable[Item]) -> ItemChanges:
        """Makes `items` the whole catalogue, as `upsert_items` does: what others the engine had are taken out."""
        whole = Catalogue(items)
        return self.upsert_items(whole.values(), gone=[i for i in self.catalogue if i not in whole])

    def erase_user(self, user_id: UserId, tenant: str = "") -> int:
        """Removes every block derived from a user, from every tier; returns how many there were.

        Waits for the pass that is running, which may be about to publish some. The semantic pool is a read-only file
        that was made of users' texts: build it again without the user (`rcllm pool build --exclude-users`). Raises what
        the store raises: erasing is not best-effort.
        """
        try:
            return self._erase(user_owner(whose(user_id, tenant)) or "")
        finally:
            self.intake.forget_user(user_id, tenant)

    def retire_item(self, item_id: ItemId) -> int:
        """Removes the blocks of an item whose text changed or that is gone; returns how many there were.

        Not needed for correctness: new text has new keys. It frees the memory of the old ones at once.
        """
        return self._erase(item_owner(item_id) or "")

    def _erase(self, owner: str) -> int:
        with self.loop.alone():
            self._prefill.corrector.rankings.forget(owner)
            return self.pool.delete_owner(owner)

    def stats(self) -> PoolStats:
        return self.pool.stats()

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a cached block."""
        return self._prefill.kv_bytes_per_token

    def close(self) -> None:
        """Hands the store what it does not have yet, and ends it. An engine without a store need not be closed."""
        with self.loop.alone():
            self.pool.settle()
            self.tiers.close(self.pool.rates)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _any_done(tickets: Sequence[Ticket | Refused]) -> bool:
    return any(ticket.done for ticket in tickets)


def _result(ticket: Ticket | Refused) -> Any:
    """A response or one of our errors; raises what is neither, such as a mistake of ours."""
    if isinstance(ticket.outcome, BaseException) and not isinstance(ticket.outcome, RcllmError):
        raise ticket.outcome
    return ticket.outcome


def _mask(config: Config) -> Mask:
    assert config.model.mask != "auto", "mask is resolved by declared_mask"
    return config.model.mask
