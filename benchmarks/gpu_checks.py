"""Does the GPU compute what the CPU does? The correctness parts of `benchmarks.gpu`.

The twin of each is the same engine on the CPU in fp32; of `logits`, it is transformers. In fp32 scores are close, and
beams and answers equal; what bf16 shifts is told beside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.gpu_setup import (
    SHAPES,
    Scale,
    Size,
    beam_tasks,
    engine_of,
    moved,
    qwen3,
    random_weights,
    rankings,
    searched,
    steps_of_search,
)
from benchmarks.harness import ROOT, Options, console, show, transformers_model
from rcllm.core.decoding import GenerateOptions, Speculation
from rcllm.core.texts import TextRequest
from rcllm.decode.beam import BeamSearch
from rcllm.decode.beam_device import OnDevice
from rcllm.decode.beam_host import OnHost
from rcllm.decode.beam_task import BeamTask, Choosing
from rcllm.drafts.draft import DraftTree, NoDrafter
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import answered
from rcllm.fetch import cache_dir
from rcllm.model.decoder import Decoder
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import Weights, load_model
from rcllm.schedule.draft_budget import DraftBudget, PassCosts
from rcllm.store.codec import DTYPES

CPU = torch.device("cpu")
LEVELS = ("full", "exact", "corrected(0.3,0.3)", "linked(4)", "tail(0.3)", "blocks")
LARGER = qwen3(4, 256, 8, 2, 512, head_dim=64)  # small enough for a CPU, and several tiles of everything


def logits(scale: Scale, chosen: Options) -> dict[str, float]:
    """A trained model against transformers in fp32: SmolLM2 where it is here, else the decoder of this tree."""
    smollm2 = cache_dir() / "models" / "smollm2-135m-instruct"
    is_small = chosen.dry_run or not (smollm2 / "config.json").is_file()
    folder = ROOT / "decoders" / "movielens" if is_small else smollm2
    spec, weights = load_model(folder)
    count = 12 if chosen.dry_run else 400
    ids = torch.randint(0, spec.vocab_size, (count,), generator=torch.Generator().manual_seed(chosen.seed))
    peer = transformers_model(folder)
    with torch.inference_mode():
        expected = peer(ids[None]).logits[0]
    found = {"logits_is_smollm2": float(not is_small)}
    for dtype in ("fp32", "bf16"):
        decoder = Decoder(spec, moved(weights, DTYPES[dtype], scale.device), "triton")
        error = (decoder.full_logits(ids.tolist()).cpu() - expected).abs()
        found |= {f"logits_{dtype}_max_error": float(error.max()), f"logits_{dtype}_mean_error": float(error.mean())}
    show(
        f"Logits of {folder.name} against transformers in fp32",
        ["dtype", "max", "mean"],
        [
            [d, f"{found[f'logits_{d}_max_error']:.1e}", f"{found[f'logits_{d}_mean_error']:.1e}"]
            for d in ("fp32", "bf16")
        ],
    )
    return found


def levels(scale: Scale, chosen: Options) -> dict[str, float]:
    """Scores of every level against the CPU's, in fp32 and in bf16 beside KV in bf16 and int8."""
    spec, weights, size = _twins(chosen)
    variants = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "bf16_int8": ("bf16", "int8")}
    asked = {level: rankings(size, 1 if chosen.dry_run else 8, level, chosen.seed) for level in LEVELS}
    twin = engine_of(Decoder(spec, weights), size, "fp32", 1 << 30)
    expected = {level: [twin.rank(request).scores for request in some] for level, some in asked.items()}
    found, rows = dict[str, float](), []
    for name, (dtype, kv_dtype) in list(variants.items())[: 1 if chosen.dry_run else None]:
        decoder = Decoder(spec, moved(weights, DTYPES[dtype], scale.device), "triton")
        engine = engine_of(decoder, size, kv_dtype, 1 << 30)
        errors = {
            level: max(
                float(np.abs(np.array(engine.rank(request).scores) - np.array(wanted)).max())
                for request, wanted in zip(some, expected[level], strict=True)
            )
            for level, some in asked.items()
        }
        found |= {f"levels_{name}_max_error_{_flat(level)}": error for level, error in errors.items()}
        rows.append([name, *(f"{error:.1e}" for error in errors.values())])
    show("Largest difference of a score to the CPU's in fp32", ["rows and KV", *LEVELS], rows)
    return found


def beams(scale: Scale, chosen: Options) -> dict[str, float]:
    """Searches in fp32: the share of leaves that equal the CPU's, in order, and the largest difference of a score.

    Beams are chosen in numpy on the CPU, and on the GPU by itself.
    """
    spec, weights, _ = _twins(chosen)
    beam, codes = (6, 8) if chosen.dry_run else (128, 64)
    decoders = [
        Decoder(spec, moved(weights, torch.float32, device), name)
        for device, name in ((CPU, "auto"), (scale.device, "triton"))
    ]
    tasks, tokens = zip(*(beam_tasks(each, beam, 2, 60, codes, chosen.seed) for each in decoders), strict=True)
    choosing: list[Choosing] = [OnHost(tokens[0]), OnDevice(tokens[1], scale.device)]
    searches = [BeamSearch(decoder, chooses, 2 * beam) for decoder, chooses in zip(decoders, choosing, strict=True)]
    pairs = list(zip(*(searched(*each) for each in zip(searches, decoders, tasks, strict=True)), strict=True))
    return {
        "beams_equal_share": min(float((ours.leaves == theirs.leaves).mean()) for theirs, ours in pairs),
        "beams_max_error": max(float(np.abs(ours.scores - theirs.scores).max()) for theirs, ours in pairs),
        "beams_without_waits": float(_waits_for_nothing(searches[1], decoders[1], tasks[1])),
    }


def _waits_for_nothing(search: BeamSearch, decoder: Decoder, tasks: Sequence[BeamTask]) -> bool:
    """Whether torch sees no wait for the device before a search is read. Earlier ones capture its passes."""
    if decoder.device.type != "cuda":
        return True
    for _ in range(3):
        searched(search, decoder, tasks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        deque(steps_of_search(search, decoder, tasks), maxlen=0)
    except RuntimeError as error:
        console.print(f"[red]a search waited: {error}")
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def drafts(scale: Scale, chosen: Options) -> dict[str, float]:
    """Greedy answers in fp32, plain and drafted: the share of tokens that equal the CPU's plain answer."""
    spec, weights, size = _twins(chosen)
    count = scale.new_tokens
    twin = answering(Decoder(spec, weights), size, count, chosen)([None, None])
    decoder = Decoder(spec, moved(weights, torch.float32, scale.device), "triton")
    plain = answering(decoder, size, count, chosen)([None, None])
    drafted = answering(decoder, size, count, chosen)([Known(each, spec.vocab_size) for each in twin])
    return {"drafts_plain_equal_share": _equal(twin, plain), "drafts_strict_equal_share": _equal(twin, drafted)}


class Known(NoDrafter):
    """Drafts what an answer is known to be, after a wrong branch, so that trees are both accepted and refused."""

    def __init__(self, answer: Sequence[int], vocab_size: int, num_nodes: int = 8) -> None:
        self._answer, self._vocab_size, self._num_nodes = list(answer), vocab_size, num_nodes
        self._done = 1  # tokens of the answer that are decided; the prompt gives the first

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        tokens = self._answer[self._done :][: min(max_nodes, self._num_nodes) - 1]
        if not tokens:
            return DraftTree(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
        wrong = (tokens[0] + 1) % self._vocab_size
        ids = np.array([wrong, *tokens], np.int32)
        parents = np.array([0, 0, *range(2, len(tokens) + 1)], np.int32)
        return DraftTree(ids, parents, np.linspace(1.0, 0.9, len(ids), dtype=np.float32))

    def observe(self, token_ids: Sequence[int]) -> None:
        self._done = min(self._done + len(token_ids), len(self._answer))


Answers = Callable[[Sequence[Known | None]], list[tuple[int, ...]]]  # tokens, by what is drafted for each prompt


def answering(decoder: Decoder, size: Size, count: int, chosen: Options) -> Answers:
    """`count` tokens after a prompt of each own, together. Whatever is drafted is verified: passes cost the same."""
    engine = engine_of(decoder, size, "fp32" if decoder.dtype == torch.float32 else "bf16", 256 << 20)
    budget = DraftBudget(PassCosts({1: 1.0, 64: 1.0}))
    options = GenerateOptions(max_tokens=count, speculation=Speculation("strict"))
    length = 10 if chosen.dry_run else 100

    def answers(known: Sequence[Known | None]) -> list[tuple[int, ...]]:
        by_name = {str(number): drafter for number, drafter in enumerate(known)}
        generator = Generator(engine, lambda request, prompt: by_name[request.request_id], budget=budget)
        random = torch.Generator().manual_seed(chosen.seed)
        prompts = torch.randint(5, 250, (len(known), length), generator=random).tolist()
        asked = [TextRequest(str(n), options=options, parts=(tuple(prompt),)) for n, prompt in enumerate(prompts)]
        return [answered([each])[0].token_ids for each in engine.run(generator, asked)]

    return answers


def _equal(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    pairs = [(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _twins(chosen: Options) -> tuple[ModelSpec, Weights, Size]:
    spec = SHAPES["mini"] if chosen.dry_run else LARGER
    return (
        spec,
        random_weights(spec, torch.float32, CPU, chosen.seed),
        Size(110, 2) if chosen.dry_run else Size(900, 12),
    )


def _flat(level: str) -> str:
    return level.partition("(")[0]
