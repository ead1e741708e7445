"""What `benchmarks.gpu` runs on: models of random weights in real shapes, rankings of given sizes, and a clock.

Knows nothing of what is measured. Invariant: everything is a function of its arguments, so that two devices can be
given the same weights and the same requests.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from benchmarks.harness import percentile
from rcllm.cache.pool import Pool
from rcllm.cache.room import PAGE_BYTES
from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig, resolve
from rcllm.core.ranking import Event, Item, ItemId, Level, RankOptions, RankRequest, UserId
from rcllm.core.receipts import BeamRule
from rcllm.decode.beam import BeamSearch, Found
from rcllm.decode.beam_task import BeamPrompt, BeamTask
from rcllm.engine.build import make_prompter, this_machine
from rcllm.engine.engine import Engine
from rcllm.engine.fit import fit
from rcllm.engine.space import declared_mask
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Decoder, Pass
from rcllm.model.quantised import wide
from rcllm.model.spec import ModelSpec, RopeSpec
from rcllm.model.static_passes import Graphs
from rcllm.model.weights import LayerWeights, Weights
from rcllm.store.codec import DTYPES
from rcllm.store.contract import Store

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = tuple(f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu") for b in "bdfgklmnprst" for c in ("an", "el", "is", "or"))
TEMPLATE = """
name = "sizes"
version = 1
system = "You rank items for a shopper."
instruction = "Which of the offers fits what was bought?"
history_head = "\\nBought:"
event = ["\\n- {title}"]
event_text = "\\n- {text}"
items_head = "\\nOffers:"
item = ["{description}"]
volatile = []
label_before = ["\\n(", ") "]
label_after = [" (", ")\\n"]
question = "\\nWhich one?"
answer = "Answer: ("
pointwise_question = "\\nBuys:"
pointwise_answers = [" yes", " no"]
likelihood_head = "\\nNext:\\n- "
likelihood_item = ["{title}"]
max_item_tokens = 4096
max_event_tokens = 4096
"""
_EVENTS = 10
_HEAD = 80  # tokens of instruction, heads and question, about


def qwen3(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, head_dim: int = 128) -> ModelSpec:
    """A spec of the family; heads and embeddings as the sizes of Qwen3 have them."""
    return ModelSpec(
        family="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        vocab_size=151_936 if head_dim == 128 else 1024,
        rms_eps=1e-6,
        qkv_bias=False,
        o_bias=False,
        qk_norm=True,
        tied_embeddings=hidden < 4096,
        rope=RopeSpec(theta=1e6),
        max_positions=40_960 if head_dim == 128 else 2048,
        bos_id=None,
        eos_ids=(),
    )


SHAPES = {
    "qwen3_06b": qwen3(28, 1024, 16, 8, 3072),
    "qwen3_8b": qwen3(36, 4096, 32, 8, 12_288),
    "mini": qwen3(2, 64, 4, 2, 96, head_dim=32),
}


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Drawn on the device, so that another device draws others; scaled so that activations keep their size."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=dtype, device=device)
        return drawn.normal_(0.0, columns**-0.5, generator=generator)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    d, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
    layers = [
        LayerWeights(
            input_norm=ones(d),
            qkv=matrix(q + 2 * kv, d),
            qkv_bias=None,
            q_norm=ones(spec.head_dim),
            k_norm=ones(spec.head_dim),
            o=matrix(d, q),
            o_bias=None,
            post_norm=ones(d),
            gate_up=matrix(2 * spec.ffn_size, d),
            down=matrix(d, spec.ffn_size),
        )
        for _ in range(spec.num_layers)
    ]
    embed = matrix(spec.vocab_size, d)
    return Weights(embed, layers, ones(d), embed if spec.tied_embeddings else matrix(spec.vocab_size, d))


def moved(weights: Weights, dtype: torch.dtype, device: torch.device) -> Weights:
    """The same numbers, rounded to `dtype`, on another device."""

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, dtype)

    layers = []
    for layer in weights.layers:
        tensors = {field.name: move(getattr(layer, field.name)) for field in dataclasses.fields(LayerWeights)}
        layers.append(LayerWeights(**tensors))  # type: ignore[arg-type]  # those that are None may be
    embed = wide(weights.embed).to(device, dtype)
    head = embed if weights.lm_head is weights.embed else wide(weights.lm_head).to(device, dtype)
    return Weights(embed, layers, weights.final_norm.to(device, dtype), head)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a ranking."""

    tokens: int  # of the prompt, about
    candidates: int

    def __str__(self) -> str:
        return f"t{self.tokens}_c{self.candidates}"

    @property
    def item_tokens(self) -> int:
        """Items are three quarters of what is not the head, as in the papers' prompts."""
        return max(2, (self.tokens - _HEAD) * 3 // 4 // self.candidates - 6)

    @property
    def event_tokens(self) -> int:
        return max(2, (self.tokens - _HEAD) // 4 // _EVENTS - 2)


@cache
def folder() -> Path:
    """A model's folder without its weights: a config and a tokenizer, for whom each of WORDS is a token."""
    holder = tempfile.TemporaryDirectory(prefix="rcllm-gpu-")
    _HOLDERS.append(holder)
    path = Path(holder.name)
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
    )
    numbers = " ".join(f"({number})" for number in range(200))
    backend.train_from_iterator([" ".join(WORDS)] * 20 + [TEMPLATE] * 20 + [numbers] * 5, trainer)
    backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"}), encoding="utf-8")
    (path / "sizes.toml").write_text(TEMPLATE, encoding="utf-8")
    return path


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def text(length: int, number: int) -> str:
    """`length` words that start with those of a number, so that no two numbers have the same text."""
    start = [WORDS[number % len(WORDS)], WORDS[number // len(WORDS) % len(WORDS)]]
    return " " + " ".join(
        (start + [WORDS[(number * 7 + i * 13) % len(WORDS)] for i in range(length)])[: max(2, length)]
    )


def catalogue(size: Size, count: int) -> dict[ItemId, Item]:
    items = (
        Item(ItemId(f"i{i}"), {"title": text(size.event_tokens, i), "description": text(size.item_tokens, i)}, {})
        for i in range(count)
    )
    return {item.item_id: item for item in items}


def engine_of(decoder: Decoder, size: Size, kv_dtype: str, pool_bytes: int, store: Store | None = None) -> Engine:
    """An engine with an empty pool, perhaps over a store, for three requests' worth of items."""
    config = Config(
        ModelConfig(path=str(folder()), device="cuda" if decoder.device.type == "cuda" else "cpu", dtype="auto"),
        PromptConfig(template=str(folder() / "sizes.toml"), max_candidates=1000),
        CacheConfig(kv_dtype=kv_dtype, pool_mb=max(1, pool_bytes >> 20), pass_tokens=8192),  # type: ignore[arg-type]
    )
    config = declared_mask(resolve(config, this_machine()))
    pool = Pool(pool_bytes, DTYPES[kv_dtype], decoder.device, store, page_bytes=PAGE_BYTES)
    prompter = make_prompter(
        config, folder(), b"random", decoder, fit(catalogue(size, 3 * size.candidates), config), ()
    )
    return Engine(config, decoder, prompter, pool, "random")


def rankings(size: Size, count: int, level: str, seed: int = 0) -> list[RankRequest]:
    """Requests of new users, each with other candidates of the catalogue of this size."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for number in range(count):
        order = torch.randperm(3 * size.candidates, generator=generator).tolist()
        events = torch.randint(0, 3 * size.candidates, (_EVENTS,), generator=generator).tolist()
        requests.append(
            RankRequest(
                f"{level}/{number}",
                tuple(ItemId(f"i{i}") for i in order[: size.candidates]),
                tuple(Event(ItemId(f"i{i}")) for i in events),
                UserId(f"{level}/{seed}/{number}"),
                options=RankOptions(level=Level.parse(level)),
            )
        )
    return requests


class Timer:
    """Seconds of work on a device: the wall's with the device's end waited for, or the device's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wall(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def replayed_seconds(self, run: Callable[[], torch.Tensor], repeats: int) -> float:
        """As a graph that is replayed, on a device that has them: what launching takes is not in it."""
        if self.device.type != "cuda":
            return self.device_seconds(run, repeats)
        return self.device_seconds(Graphs()(run), repeats)

    def device_seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median of `repeats` runs after one that does not count, by the device's events where it has them."""
        run()
        if self.device.type != "cuda":
            return statistics.median(self.wall(run) for _ in range(repeats))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in marks:
            begin.record()
            run()
            end.record()
        self.wait()
        return float(statistics.median(begin.elapsed_time(end) for begin, end in marks)) / 1e3


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """P50 and P99 in milliseconds."""
    values = [value * 1e3 for value in seconds]
    return {f"{name}_p50_ms": statistics.median(values), f"{name}_p99_ms": percentile(values, 0.99)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: torch.device
    dtype: torch.dtype  # of weights and rows
    kv_dtype: str
    shapes: tuple[str, ...]
    sizes: tuple[Size, ...]  # of rankings
    main: Size  # the one that batches are made of
    batches: tuple[int, ...]
    warming: int  # rankings before those that count: kernels are compiled, and passes captured
    repeats: int
    saturation: int  # rankings at once
    beams: tuple[int, ...]
    beam_prompts: tuple[int, ...]  # tokens
    codes: int  # of each of three levels
    new_tokens: int  # of an answer
    trees: tuple[int, ...]  # nodes of drafts
    pool_bytes: int
    below: tuple[Size, ...]  # rankings whose blocks lie in host memory
    host_bytes: int


REAL = Scale(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    kv_dtype="bf16",
    shapes=("qwen3_06b", "qwen3_8b"),
    sizes=tuple(Size(*each) for each in ((500, 20), (1000, 20), (2500, 20), (2500, 50), (5000, 100), (8000, 200))),
    main=Size(2500, 20),
    batches=(1, 4, 8, 16, 32),
    warming=8,
    repeats=20,
    saturation=128,
    beams=(128, 512),
    beam_prompts=(1000, 5000),
    codes=256,
    new_tokens=64,
    trees=(15, 31, 63),
    pool_bytes=16 << 30,
    below=(Size(2500, 20), Size(5000, 100)),
    host_bytes=12 << 30,
)
MINI = Scale(
    device=torch.device("cpu"),
    dtype=torch.float32,
    kv_dtype="fp32",
    shapes=("mini",),
    sizes=(Size(160, 3),),
    main=Size(160, 3),
    batches=(1, 2),
    warming=1,
    repeats=2,
    saturation=3,
    beams=(4,),
    beam_prompts=(20,),
    codes=8,
    new_tokens=4,
    trees=(3,),
    pool_bytes=64 << 20,
    below=(Size(160, 3),),
    host_bytes=64 << 20,
)


@contextmanager
def unmeasured(stage: str) -> Iterator[None]:
    """A stage that nobody times."""
    yield


def beam_tasks(
    decoder: Decoder, beam: int, count: int, tokens: int, codes: int, seed: int, rule: BeamRule = "renormalise"
) -> tuple[list[BeamTask], CodeTokens]:
    """Searches after prompts of random KV, the same on every device, over a random catalogue of three levels.

    With 256 codes a level it has 262,144 items: nearly all pairs of the first two codes, and about four items of each.
    """
    spec, generator = decoder.spec, torch.Generator().manual_seed(seed)
    drawn = np.random.default_rng(seed).integers(0, codes, (4 * codes**2, 3)).astype(np.int32)
    code_index = CodeIndex.build(drawn, [ItemId(f"i{i}") for i in range(len(drawn))], (codes,) * 3)
    ids = tuple(np.arange(level * codes, (level + 1) * codes, dtype=np.int32) + 5 for level in range(3))
    tasks = []
    for _ in range(count):
        shape = (spec.num_layers, 2, spec.num_kv_heads, tokens, spec.head_dim)
        kv = torch.randn(shape, generator=generator).to(decoder.device, decoder.dtype)
        hidden = torch.randn(spec.hidden_size, generator=generator).to(decoder.device, decoder.dtype)
        prompt = BeamPrompt((Segment(kv, 0, 0, tokens, 0),), tokens, hidden)
        tasks.append(BeamTask(prompt, code_index, None, beam, rule))
    return tasks, CodeTokens(ids)


def steps_of_search(search: BeamSearch, decoder: Decoder, tasks: Sequence[BeamTask]) -> Iterator[Pass]:
    """The passes of a search, each before it is run; nothing is read of what it finds."""
    search.begin(tasks, unmeasured)
    while not search.ended:
        work = search.next_pass()
        yield work
        search.take(decoder.forward(work), unmeasured)


def searched(search: BeamSearch, decoder: Decoder, tasks: Sequence[BeamTask]) -> list[Found]:
    """A whole search, which the host waits for once."""
    deque(steps_of_search(search, decoder, tasks), maxlen=0)
    return search.found()
