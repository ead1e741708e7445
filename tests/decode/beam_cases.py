"""Random catalogues, prompts and tiny models for beam searches, shared by their tests."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.core.ranking import ItemId
from rcllm.core.receipts import BeamRule
from rcllm.decode.beam import BeamSearch, Found, choosing_of
from rcllm.decode.beam_task import BeamPrompt, BeamTask
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.decoder import Decoder, Keep, Pass
from rcllm.model.quantised import quantise
from rcllm.model.weights import load_model
from tests.tiny_models import tiny_model

VOCAB = 160
FAMILIES = ("qwen3", "qwen3, int8", "llama")  # the compiled kernels, also with weights in int8, and plain torch
SAFE = 2e-5  # scores that differ by less may come in either order: fp32 adds up in another order


@functools.cache
def models(family: str) -> tuple[Decoder, Any]:
    """A tiny random model, ours and theirs; in int8 theirs holds the values that ours rounds to."""
    shape, _, kept = family.partition(", ")
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model(shape, Path(folder), vocab_size=VOCAB)
        decoder = Decoder(*load_model(path, torch.float32, "cpu"), kept=kept or "full")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for weight in model.parameters() if kept else ():
        if weight.dim() == 2:
            weight.data = quantise(weight.data).widen()
    model.generation_config.eos_token_id = None
    return decoder, model.eval()


@dataclass(frozen=True)
class Case:
    code_index: CodeIndex
    tokens: CodeTokens
    prompt: list[int]
    beam: int

    @property
    def valid(self) -> list[tuple[int, ...]]:
        return sorted(set(map(tuple, self.code_index.codes.tolist())))

    def codes(self, found: Found) -> list[tuple[int, ...]]:
        """What the leaves stand for."""
        rows = [self.code_index.codes[self.code_index.items_of(leaf)[0]] for leaf in found.leaves.tolist()]
        return [tuple(row.tolist()) for row in rows]


def make_case(seed: int, beam: int | None = None, num_items: int | None = None) -> Case:
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(2, 24, size=rng.integers(2, 5)).tolist())
    count = num_items or int(rng.integers(1, 150))
    codes = np.stack([rng.integers(0, size, count) for size in sizes], axis=1).astype(np.int32)
    ids = tuple(ItemId(f"i{i}") for i in range(count))
    vocabulary = rng.permutation(VOCAB)[: sum(sizes)].astype(np.int32)
    tokens = CodeTokens(tuple(np.split(vocabulary, np.cumsum(sizes)[:-1])))
    prompt = rng.integers(0, VOCAB, rng.integers(2, 60)).tolist()
    return Case(CodeIndex.build(codes, ids, sizes), tokens, prompt, beam or int(2 ** rng.integers(0, 8)))


def make_prompt(decoder: Decoder, token_ids: list[int], num_pieces: int = 3) -> BeamPrompt:
    """Computed in one pass, and kept as several blocks with position-free keys."""
    cuts = [0, *sorted({len(token_ids) * i // num_pieces for i in range(1, num_pieces)} - {0}), len(token_ids)]
    runs = [Keep(start, stop, start) for start, stop in itertools.pairwise(cuts)]
    count = len(token_ids)
    work = Pass(
        torch.tensor(token_ids), torch.arange(count), [Group.causal(count)], torch.tensor([count - 1]), keep=runs
    )
    passed = decoder.forward(work)
    segments = tuple(
        Segment(kv.contiguous(), run.base, 0, run.stop - run.start, number)
        for number, (run, kv) in enumerate(zip(runs, passed.kept, strict=True))
    )
    return BeamPrompt(segments, count, passed.hidden[0])


def make_task(decoder: Decoder, case: Case, rule: BeamRule = "mask") -> BeamTask:
    return BeamTask(make_prompt(decoder, case.prompt), case.code_index, None, case.beam, rule)


def untimed(_: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def find(decoder: Decoder, case: Case, *tasks: BeamTask) -> list[Found]:
    return run(BeamSearch(decoder, choosing_of(case.tokens, decoder.device), 8), decoder, tasks)


def run(search: BeamSearch, decoder: Decoder, tasks: Sequence[BeamTask]) -> list[Found]:
    search.begin(tasks, untimed)
    while not search.ended:
        search.take(decoder.forward(search.next_pass()), untimed)
    return search.found()
