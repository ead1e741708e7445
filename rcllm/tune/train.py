"""The training loop: batches, loss, schedule, validation, checkpoints.

Knows nothing of files other than its own folder. Invariant: a run that was killed and started again makes the same
steps as one that was not, and goes on with the same settings, model, template and data alone. A checkpoint holds
adapter, optimiser and counters. It is written whole or not at all, and only while all of them are finite.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from rcllm.core.ranking import Prompt, RankOptions, RankRequest, order
from rcllm.data.catalogue import field_shares
from rcllm.data.scores import FIELDS
from rcllm.errors import ConfigError, ModelError
from rcllm.fidelity.measures import agreement, chance_ndcg, ndcg
from rcllm.model.adapter import load_adapter, save_adapter
from rcllm.model.checkpoint import Checkpoint
from rcllm.model.training_folder import check_folder, not_numbers
from rcllm.plain_json import as_json
from rcllm.prompt.blocks import Prompter
from rcllm.tune.config import TuneConfig, check_config
from rcllm.tune.examples import Source, batch_of
from rcllm.tune.loss import distillation_loss, listwise_loss, readout_scores
from rcllm.tune.network import Network
from rcllm.tune.pack import Packed, pack
from rcllm.tune.teacher import Teacher

_BEST = "best"
_VALIDATION_BATCH = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a validation found: one point of the learning curve."""

    losses: int  # prompts learnt from so far
    minutes: float
    train_loss: float | None  # mean since the last evaluation; None at the beginning
    validation_loss: float
    validation_ndcg10: float
    tau: float | None = None  # mean Kendall τ with the teacher's scores; None without a teacher


@dataclass(frozen=True, slots=True)
class TuneProgress:
    losses: int
    share: float  # of the whole training, 0 to 1
    loss: float  # running mean
    losses_per_s: float
    eta_s: float
    rows_per_loss: float
    last: Evaluation | None


@dataclass(slots=True)
class _State:
    batches: int = 0
    losses: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    curve: list[Evaluation] = field(default_factory=list)
    rows: int = 0


class Trainer:
    """One training in one folder: `folder/best` is the best adapter on validation users so far.

    That is the highest NDCG@10, or with a teacher the highest agreement with it.
    """

    def __init__(
        self,
        network: Network,
        prompter: Prompter,
        sources: Sequence[Source],
        config: TuneConfig,
        folder: Path,
        base: str,
        started_from: str = "",
        fingerprint: str = "",
        teacher: Teacher | None = None,
    ) -> None:
        """`base` and `started_from`: names of the model and of the adapter that `network` begins at, for the record.

        `fingerprint`: of both their weights. A run goes on from a checkpoint of the same ones only.
        """
        check_config(config)
        self.network, self.prompter, self.sources, self.config = network, prompter, sources, config
        self.folder, self.base, self.started_from = folder, base, started_from
        self.options, self.teacher = RankOptions(readout=config.readout), teacher
        self.state = _State()
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.0)
        settings = {
            "template": prompter.template.fingerprint.hex()[:12],
            "datasets": list(dict.fromkeys(source.dataset.name for source in sources)),
            "model": fingerprint or base,
            "data": self._data_digest(),
        } | ({"teacher": teacher.identity} if teacher else {})
        self._checkpoint = Checkpoint(folder, network, self.optimiser, as_json(config) | settings)
        share = -(-config.validation_requests // len(sources))
        asked = [(source, request) for source in sources for request in source.validation(share)]
        self._validation = [request for _, request in asked]
        self.baselines = _baselines(asked)  # NDCG@10 of what must be beaten, on the same requests

    @property
    def notes(self) -> list[str]:
        """What a person should know of what is left out."""
        return [f"{source.dataset.name}: {note}" for source in self.sources for note in source.notes]

    @property
    def num_validated(self) -> int:
        """Requests of validation users that decide what is best."""
        return len(self._validation)

    def run(self, on_progress: Callable[[TuneProgress], None] | None = None) -> list[Evaluation]:
        """Trains to the end, going on from a checkpoint where there is one; returns the curve."""
        check_out(self.folder)
        with self.teacher.kept if self.teacher else contextlib.nullcontext():
            return self._run(on_progress)

    def _run(self, on_progress: Callable[[TuneProgress], None] | None) -> list[Evaluation]:
        self._restore()
        if self.teacher is not None:
            self.baselines["teacher"] = self._ndcg_of(self.teacher)
        if not self.state.curve:
            self._evaluate()
        while self._share() < 1.0 and not self._stalled():
            start = time.perf_counter()
            self._step()
            self.state.seconds += time.perf_counter() - start
            if self.state.losses >= self.state.curve[-1].losses + self.config.evaluate_every or self._share() >= 1.0:
                self._evaluate()
                self._checkpoint.save(asdict(self.state))
            if on_progress:
                on_progress(self._progress())
        return self.state.curve

    def _step(self) -> None:
        requests = batch_of(self.sources, self.state.batches, self.config.seed)
        rate = self.config.learning_rate * self._schedule()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        packed, losses = self._losses(requests)
        loss = torch.stack(losses).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not torch.isfinite(loss + norm):
            raise not_numbers(f"loss or its gradient (after {self.state.losses:,} prompts)", self.folder)
        self.optimiser.step()
        self.state.batches += 1
        self.state.losses += len(losses)
        self.state.rows += packed.num_rows
        self.state.recent.append(loss.item())

    def _losses(self, requests: Sequence[RankRequest]) -> tuple[Packed, list[torch.Tensor]]:
        packed, scores = self.score(requests)
        return packed, self._loss_of(requests, scores)

    def _loss_of(self, requests: Sequence[RankRequest], scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What each request is learnt by: its teacher, its label, or a share of both."""
        if self.teacher is None:
            return [listwise_loss(ours, _relevant(each, None)) for each, ours in zip(requests, scores, strict=True)]
        share, found = self.config.labels, list[torch.Tensor]()
        for request, ours, theirs in zip(requests, scores, self.teacher.scores(requests), strict=True):
            taught = distillation_loss(ours, ours.new_tensor(theirs), self.config.temperature)
            if share and request.positive is not None:
                taught = (1 - share) * taught + share * listwise_loss(ours, _relevant(request, None))
            found.append(taught)
        return found

    def score(self, requests: Sequence[RankRequest]) -> tuple[Packed, list[torch.Tensor]]:
        """Scores all requests in one pass, so that a loss can be differentiated."""
        prompts = [self._prompt(request) for request in requests]
        packed = pack(prompts, self.config.mask, self.prompter.contexts[self.options.layout])
        hidden = self.network(packed, np.concatenate(packed.read_rows))
        parts = hidden.split([len(rows) for rows in packed.read_rows])
        return packed, [readout_scores(p, part, self.network.logits) for p, part in zip(prompts, parts, strict=True)]

    def _prompt(self, request: RankRequest) -> Prompt:
        return self.prompter.build(replace(request, options=self.options))

    # ---- schedule ----

    def _share(self) -> float:
        return max(self.state.losses / self.config.losses, self.state.seconds / 60 / self.config.minutes)

    def _schedule(self) -> float:
        share, warm_up = self._share(), self.config.warm_up
        return (
            max(share, 0.1 * warm_up) / warm_up if share < warm_up else 1.0 - 0.95 * (share - warm_up) / (1 - warm_up)
        )

    def _stalled(self) -> bool:
        curve = self.state.curve
        return len(curve) - 1 - curve.index(best_of(curve)) >= self.config.patience

    # ---- validation ----

    @torch.no_grad()
    def _evaluate(self) -> None:
        losses, gains, taus = list[float](), list[float](), list[float]()
        for start in range(0, len(self._validation), _VALIDATION_BATCH):
            requests = self._validation[start : start + _VALIDATION_BATCH]
            found = self.score(requests)[1]
            losses += [loss.item() for loss in self._loss_of(requests, found)]
            taught = self.teacher.scores(requests) if self.teacher else [None] * len(requests)
            for request, scores, theirs in zip(requests, found, taught, strict=True):
                ours = scores.tolist()
                gains.append(ndcg(order(ours), _relevant(request, theirs), 10))
                taus += [] if theirs is None else [agreement(theirs, ours).tau]
        state = self.state
        if not np.isfinite(losses).all() and not state.losses:
            raise ModelError(f"{self.base} gives scores that are not numbers before it learnt anything: fetch it again")
        if not np.isfinite(losses).all():
            raise not_numbers(f"validation loss (after {state.losses:,} prompts)", self.folder)
        train = float(np.mean(state.recent)) if state.recent else None
        point = Evaluation(
            state.losses, state.seconds / 60, train, float(np.mean(losses)), float(np.mean(gains)), _mean(taus)
        )
        state.curve.append(point)
        state.recent = []
        if best_of(state.curve) is point:
            save_adapter(self.folder / _BEST, self.network.adapter(), self.base, self.record())

    def _ndcg_of(self, teacher: Teacher) -> float:
        """NDCG@10 on the validation requests."""
        found = zip(self._validation, teacher.scores(self._validation), strict=True)
        return float(np.mean([ndcg(order(scores), _relevant(request, scores), 10) for request, scores in found]))

    def record(self) -> dict[str, Any]:
        """How the adapter was made; what `Learnt` reads of it is held against what the ranker is asked later."""
        template = self.prompter.template
        return {
            "mask": self.config.mask,
            "template": template.name,
            "template_fingerprint": template.text_fingerprint.hex(),
            "limits": dict(template.limits),
            "fields": {source.dataset.name: _field_shares(source, template.shown) for source in self.sources},
            "chat": self.prompter.chat.fingerprint,
            "context": self.prompter.context_name,
            "readout": self.config.readout,
            "layout": self.options.layout,
            "label_place": self.options.label_place,
            "started_from": self.started_from,
            "datasets": list(dict.fromkeys(source.dataset.name for source in self.sources)),
            "settings": as_json(self.config),
            "rows_per_loss": round(self.state.rows / max(self.state.losses, 1), 1),
            "baselines": {name: round(value, 4) for name, value in self.baselines.items()},
            "teacher": self.teacher.identity if self.teacher else "",
            "fresh": sorted(FIELDS) if any(source.scores for source in self.sources) else [],
            "scores": {s.dataset.name: list(s.scores.words.edges) for s in self.sources if s.scores},
            "curve": [asdict(point) for point in self.state.curve],
        }

    def _data_digest(self) -> str:
        """16 hex digits that change with any text of an item and with who chose what."""
        state = blake3()
        for source in self.sources:
            state.update(json.dumps(source.identity()).encode())
        return state.hexdigest()[:16]

    def _restore(self) -> None:
        if state := self._checkpoint.restore():
            self.state = _State(**state | {"curve": [Evaluation(**point) for point in state["curve"]]})

    def _progress(self) -> TuneProgress:
        state, share = self.state, self._share()
        return TuneProgress(
            state.losses,
            min(share, 1.0),
            float(np.mean(state.recent)) if state.recent else state.curve[-1].train_loss or math.nan,
            state.losses / max(state.seconds, 1e-9),
            state.seconds * (1 - share) / max(share, 1e-9),
            state.rows / max(state.losses, 1),
            state.curve[-1] if state.curve else None,
        )


def best_of(curve: Sequence[Evaluation]) -> Evaluation:
    """The highest τ with the teacher, or NDCG@10 without one; of equal ones the lowest loss, then the first."""
    return max(
        curve,
        key=lambda point: (point.validation_ndcg10 if point.tau is None else point.tau, -point.validation_loss),
    )


def _field_shares(source: Source, names: Sequence[str]) -> dict[str, float]:
    """Of the items, how many have each field, to three digits: what the ranker came to expect."""
    return {name: round(share, 3) for name, share in field_shares(source.dataset.catalogue, names).items()}


def _relevant(request: RankRequest, taught: Sequence[float] | None) -> int:
    """The candidate that the user chose, or where that is not known the teacher's first."""
    if request.positive is not None:
        return request.candidates.index(request.positive)
    assert taught is not None, "where there is no teacher, a source leaves out requests without a choice"
    return order(taught)[0]


def _mean(taus: Sequence[float]) -> float | None:
    """None without a teacher; 0 where no list of it had an order."""
    ranked = [tau for tau in taus if not math.isnan(tau)]
    return None if not taus else float(np.mean(ranked)) if ranked else 0.0


def _baselines(asked: Sequence[tuple[Source, RankRequest]]) -> dict[str, float]:
    """NDCG@10 of chance, popularity and item-kNN on validation requests."""
    gains: dict[str, list[float]] = {}
    for source, request in asked:
        if request.positive is None:
            continue
        positive = request.candidates.index(request.positive)
        gains.setdefault("chance", []).append(chance_ndcg(len(request.candidates), 10))
        for name, scores in source.baselines(request).items():
            gains.setdefault(name, []).append(ndcg(order(scores), positive, 10))
    return {name: float(np.mean(values)) for name, values in gains.items()}


def check_out(folder: Path) -> None:
    """Whether a training may write into `folder`. Raises ConfigError, DataError."""
    check_folder(folder, (_BEST,), f"{_BEST}/rcllm.json")


def warm_start(network: Network, folder: Path) -> None:
    """Begins at an adapter that exists, instead of at the model. Raises ModelError, ConfigError."""
    adapter = load_adapter(folder, network.spec)
    found = {(low_rank.down.shape[0], low_rank.scale) for low_rank in adapter.layers.values()}
    if found != {(network.rank, network.alpha / network.rank)}:
        several = ", or scales of another kind" if len(found) > 1 or adapter.rank == network.rank else ""
        raise ConfigError(
            f"{folder} has rank {adapter.rank} and alpha {adapter.alpha:g}{several}, expected {network.rank} and "
            f"{network.alpha:g}: give the same to start from it"
        )
    network.load_adapter(adapter)
