"""Trains a decoder of semantic IDs: batches, loss, schedule, validation, checkpoints.

Knows nothing of files other than its own folder. Invariant: a run that was killed and started again with the same
settings ends with the same weights as one that was not, unless the clock (`minutes`) ends it. A checkpoint holds
weights, optimiser and counters; dropout is drawn by the number of the step; files are written whole or not at all. A
checkpoint or model is written only while loss, gradients and weights are finite.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from blake3 import blake3

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import IntArray
from rcllm.errors import ConfigError, DataError
from rcllm.model.checkpoint import Checkpoint
from rcllm.model.training_folder import check_folder, not_numbers
from rcllm.plain_json import as_json
from rcllm.sid.collaborative import code_vectors, collaborative_vectors
from rcllm.sid.config import TrainConfig
from rcllm.sid.held_out import cases_of
from rcllm.sid.model_folder import KNN, RECORD, TEXTS, WEIGHTS, save_model
from rcllm.sid.network import CodeNetwork
from rcllm.sid.sequences import Sequences
from rcllm.sid.validate import TopOfList
from rcllm.sid.vocabulary import Vocabulary

_LOWEST_RATE = 0.02  # of the learning rate, at the end
_MAX_POSITIONS = 2048
_CODE_STD = 0.03  # of the embeddings of codes, at the beginning
_SAVE_SECONDS = 60.0  # of training between two checkpoints, at most


@dataclass(frozen=True, slots=True)
class CodeEvaluation:
    """One point of the curve; losses are nats per item, summed over its codes."""

    epoch: int
    minutes: float
    train_loss: float
    validation_loss: float  # of the last item of each validation user
    validation_ndcg10: float = 0.0  # of the same, among the whole catalogue


@dataclass(frozen=True, slots=True)
class TrainProgress:
    epoch: int
    share: float  # of the whole training, 0 to 1
    loss: float  # running mean
    tokens_per_s: float
    last: CodeEvaluation | None


@dataclass(slots=True)
class _State:
    epoch: int = 0
    batch: int = 0  # within the epoch
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    curve: list[CodeEvaluation] = field(default_factory=list)


class CodeTrainer:
    """One training in one folder, which holds the weights with the highest NDCG@10 on validation users so far."""

    def __init__(
        self,
        code_index: CodeIndex,
        train: Sequence[Sequence[int]],
        validation: Sequence[Sequence[int]],
        config: TrainConfig,
        folder: Path,
    ) -> None:
        """`train` and `validation`: histories as item numbers of the catalogue. Raises ConfigError, DataError."""
        config.check()
        self.code_index, self.config, self.folder = code_index, config, folder
        self.histories = [list(history) for history in train if len(history) > 1]
        checked = [history for history in validation if len(history) > 1]
        if not self.histories or not checked:
            raise DataError(
                f"expected training and validation users with two items or more, got {len(self.histories)} and "
                f"{len(checked)}: more users are needed"
            )
        vocabulary = Vocabulary(code_index.sizes)
        self.sequences = Sequences.of(vocabulary, code_index.codes)
        self.hf_config = config.network.hf_config(len(vocabulary), _MAX_POSITIONS)
        if (longest := 2 + config.sequences.max_items * (1 + vocabulary.num_levels)) > _MAX_POSITIONS:
            raise ConfigError(
                f"max_items makes prompts of {longest} tokens, the decoder takes {_MAX_POSITIONS}: lower it"
            )
        self.network = CodeNetwork(config.network, self.hf_config)
        self.network.reset(config.seed)
        self._place_codes()
        self.optimiser = self._optimiser()
        self._checkpoint = Checkpoint(
            folder, self.network, self.optimiser, self._identity(), "settings, codes or users"
        )
        self.state = _State()
        self._validation = self.sequences.last(checked, config.sequences)
        self._top = TopOfList(code_index, self.sequences, cases_of(checked)[0], config.sequences.max_items)
        self._batches: list[IntArray] = []
        self._saved_s = 0.0  # training time at the last checkpoint

    @torch.no_grad()
    def _place_codes(self) -> None:
        """Embeddings of codes begin where who touched what puts their items, not at random."""
        code_index, config, size = self.code_index, self.config, self.config.network.hidden_size
        vectors = collaborative_vectors(self.histories, code_index.num_items, size, config.window, config.seed)
        levels = code_vectors(vectors, code_index.codes, code_index.sizes)
        for ids, means in zip(self.sequences.vocabulary.code_tokens.ids, levels, strict=True):
            if (spread := float(means.std())) > 0:
                placed = torch.from_numpy(means * np.float32(_CODE_STD / spread))
                self.network.embed_tokens.weight[torch.from_numpy(ids).long(), : means.shape[1]] = placed

    def _optimiser(self) -> torch.optim.Optimizer:
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.98))

    def run(
        self, on_progress: Callable[[TrainProgress], None] | None = None, max_steps: int | None = None
    ) -> list[CodeEvaluation]:
        """Trains to the end, or for `max_steps` more steps; goes on from a checkpoint where there is one.

        Returns the curve. Raises ConfigError where the checkpoint has other settings, ModelError where training fails.
        """
        check_out(self.folder)
        self._restore()
        self._draw()
        last = math.inf if max_steps is None else self.state.steps + max_steps
        while not self._done() and self.state.steps < last:
            start = time.perf_counter()
            self._step()
            self.state.seconds += time.perf_counter() - start
            if self.state.batch == len(self._batches) or self._share() >= 1.0:
                self._end_epoch()
            elif self.state.seconds - self._saved_s > _SAVE_SECONDS:
                self.save()
            if on_progress:
                on_progress(self._progress())
        return self.state.curve

    def _draw(self) -> None:
        config, state = self.config, self.state
        self._batches = self.sequences.epoch(self.histories, config.sequences, config.seed, state.epoch)

    def _step(self) -> None:
        state, config = self.state, self.config
        rate = config.learning_rate * self._schedule()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self._batches[state.batch]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed * 1_000_003 + state.steps)  # dropout; no state that a restart would lose
            loss = self._loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        if not torch.isfinite(loss + norm):
            raise not_numbers(f"loss or its gradient (after {state.steps:,} steps)", self.folder)
        self.optimiser.step()
        state.batch += 1
        state.steps += 1
        state.tokens += batch.size
        state.recent.append(loss.item())

    def _loss(self, batch: IntArray) -> torch.Tensor:
        """Mean over the items of the batch of -log p of their codes."""
        tokens = torch.from_numpy(batch).long()
        hidden, targets = self.network(tokens[:, :-1]), tokens[:, 1:]
        codes = targets >= self.sequences.vocabulary.first_code
        total = F.cross_entropy(self.network.logits(hidden[codes]), targets[codes], reduction="sum")
        return total / (int(codes.sum()) // self.sequences.vocabulary.num_levels)

    # ---- schedule ----

    def _share(self) -> float:
        epochs = self.state.epoch + self.state.batch / max(len(self._batches), 1)
        return max(epochs / self.config.epochs, self.state.seconds / 60 / self.config.minutes)

    def _schedule(self) -> float:
        """The share of the learning rate now: a linear warm-up, then a falling cosine."""
        warm = min(1.0, (self.state.steps + 1) / max(self.config.warm_up_steps, 1))
        return warm * max(_LOWEST_RATE, 0.5 * (1 + math.cos(math.pi * min(1.0, self._share()))))

    def _done(self) -> bool:
        curve = self.state.curve
        stalled = bool(curve) and len(curve) - 1 - curve.index(best_of(curve)) >= self.config.patience
        return stalled or self._share() >= 1.0

    # ---- validation and checkpoints ----

    def _end_epoch(self) -> None:
        state = self.state
        loss = self.validation_loss()
        if not math.isfinite(loss):
            raise not_numbers(f"validation loss (of epoch {state.epoch + 1})", self.folder)
        ndcg, trained = self._top.ndcg(self.network), float(np.mean(state.recent))
        point = CodeEvaluation(state.epoch + 1, state.seconds / 60, trained, loss, ndcg)
        state.curve.append(point)
        if best_of(state.curve) is point:
            save_model(self.folder, self.network.state_dict(), self.hf_config, self.code_index, self.record())
        state.epoch, state.batch, state.recent = state.epoch + 1, 0, []
        self.save()
        self._draw()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """-log p of the codes of each validation user's last item, after the items before it; mean over users."""
        self.network.eval()
        total, count = 0.0, 0
        vocabulary = self.sequences.vocabulary
        for batch in self._validation:
            tokens = torch.from_numpy(batch).long()
            ends = (tokens != vocabulary.pad).sum(dim=1)
            at = ends[:, None] - torch.arange(vocabulary.num_levels, 0, -1)  # places of the last item's codes
            rows = torch.arange(len(tokens))[:, None]
            logits = self.network.logits(self.network(tokens)[rows, at - 1])
            total += F.cross_entropy(logits.flatten(0, 1), tokens[rows, at].flatten(), reduction="sum").item()
            count += len(tokens)
        self.network.train()
        return total / count

    def record(self) -> dict[str, Any]:
        """Says how the model was made; it stands beside the model as training.json."""
        return {
            "template": "sid",
            "settings": as_json(self.config),
            "items": self.code_index.num_items,
            "training_users": len(self.histories),
            "curve": [asdict(point) for point in self.state.curve],
        }

    def save(self) -> None:
        """Writes a checkpoint, from which a killed run goes on. Raises DataError, ModelError."""
        self._checkpoint.save(asdict(self.state))
        self._saved_s = self.state.seconds

    def _restore(self) -> None:
        if state := self._checkpoint.restore():
            self.state = _State(**state | {"curve": [CodeEvaluation(**point) for point in state["curve"]]})
            self._saved_s = self.state.seconds

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        code_index = self.code_index
        items = [list(code_index.item_ids), code_index.codes.tolist(), list(code_index.sizes)]
        if not code_index.enabled.all():  # else as in older checkpoints
            items.append(code_index.enabled.tolist())
        data = blake3(json.dumps([self.histories, items]).encode())
        return as_json(self.config) | {"data": data.hexdigest()}

    def _progress(self) -> TrainProgress:
        state = self.state
        loss = float(np.mean(state.recent)) if state.recent else state.curve[-1].train_loss
        speed = state.tokens / max(state.seconds, 1e-9)
        return TrainProgress(
            state.epoch + 1, min(self._share(), 1.0), loss, speed, state.curve[-1] if state.curve else None
        )


def best_of(curve: Sequence[CodeEvaluation]) -> CodeEvaluation:
    """The highest NDCG@10, of equal ones the lowest loss, of equal ones the first."""
    return max(curve, key=lambda point: (point.validation_ndcg10, -point.validation_loss))


def check_out(folder: Path) -> None:
    """Whether a training may write into `folder`. Raises ConfigError, DataError."""
    check_folder(folder, (WEIGHTS, KNN, *TEXTS), RECORD)
