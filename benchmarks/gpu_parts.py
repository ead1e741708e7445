"""The measuring parts of `benchmarks.gpu`: times, and the share of the ceiling that each reaches.

Each part takes the scale, the ceilings and the options, and returns flat metrics. TTFT is the wall's, with all work of
the host in it; what is named `pass` or `step_device` is the device's own time.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_checks import Known, answering
from benchmarks.gpu_setup import (
    SHAPES,
    Scale,
    Size,
    Timer,
    beam_tasks,
    engine_of,
    random_weights,
    rankings,
    searched,
    spread,
    steps_of_search,
)
from benchmarks.harness import Options, show
from rcllm.codes.index import CodeTokens
from rcllm.core.ranking import Level
from rcllm.decode.beam import BeamSearch
from rcllm.decode.beam_device import OnDevice
from rcllm.decode.beam_task import BeamTask, Choosing
from rcllm.drafts.draft import EMPTY, DraftTree
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.sequences import next_pass
from rcllm.metrics import Trace
from rcllm.model.attend.on_triton import HostTables, Tilings, TritonAttend
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.attend.triton_tables import Tiling
from rcllm.model.decoder import Decoder, Pass
from rcllm.model.kv_int8 import kept
from rcllm.model.rope import Rope
from rcllm.model.spec import WEIGHT_GROUP, ModelSpec
from rcllm.reuse.assemble import assemble
from rcllm.reuse.plan import Planned, plan

LEVELS = ("full", "exact", "blocks")
Other = dict[str, int]  # fields of a tiling that are changed
_FOR_FEW: tuple[Other, ...] = (
    {"num_stages": 3},
    {"num_warps": 8},
    {"num_programs": 528},
    {"keys": 64, "num_stages": 3},
)
_FOR_MANY: tuple[Other, ...] = (
    {"queries": 64, "num_warps": 4},
    {"queries": 128, "num_warps": 8},
    {"num_programs": 264},
)
_SUFFIXES = {"full": "", "int8": "_int8"}  # by how weights are kept
_ITEM_BYTES = {"full": 0.0, "int8": 1 + 2 / WEIGHT_GROUP}  # of a weight; 0: as the rows have
_SHOWN = ("us", "floor_share", "best_us", "sdpa_us")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device reaches at most, measured now."""

    bytes_per_s: float  # read
    flops_per_s: float  # of products in the dtype of the rows

    def metrics(self) -> dict[str, float]:
        return {"read_gb_per_s": self.bytes_per_s / 1e9, "product_tflops": self.flops_per_s / 1e12}

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def of_pass(self, spec: ModelSpec, work: Pass, item_bytes: float) -> float:
        """Matrices of the layers, and KV, read once; the products of all rows, and of all pairs that see each other."""
        pairs = sum(int(group.row_mask().sum()) for group in work.groups if group.num_rows < 5000)
        pairs += sum(group.num_rows**2 // 2 for group in work.groups if group.num_rows >= 5000)  # nearly causal
        num_bytes = spec.linear_flops_per_token / 2 * item_bytes
        for group in work.groups:
            lengths = np.array([len(segment) for segment in group.segments], np.int64)
            pairs += int((group.segment_mask() @ lengths).sum())
            num_bytes += sum(segment.num_bytes for segment in group.segments)
        flops = len(work.token_ids) * spec.linear_flops_per_token + spec.attention_flops(pairs)
        return self.seconds(num_bytes, flops)


@torch.inference_mode()
def ceilings_of(scale: Scale) -> Ceilings:
    timer, on_gpu = Timer(scale.device), scale.device.type == "cuda"
    values = torch.ones((4 << 30 if on_gpu else 64 << 20) // 4, device=scale.device)
    read = values.nbytes / timer.device_seconds(values.sum, 5)
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=scale.device).to(scale.dtype) for _ in range(2))
    product = 2 * size**3 / timer.device_seconds(lambda: a @ b, 10)
    return Ceilings(read, product)


# ---- attention alone -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def attention(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """One layer's attention: few rows over cached segments in bf16 and int8, and a causal prefill; SDPA beside.

    Layers are timed one after another, so that no KV is found in a cache of the device.
    """
    found, rows = dict[str, float](), []
    keys, length = (2400, 80) if scale.device.type == "cuda" else (40, 20)
    for shape in scale.shapes:
        spec = dataclasses.replace(SHAPES[shape], num_layers=8 if scale.device.type == "cuda" else 2)
        for name, dtype in (("", scale.dtype), ("_int8", torch.int8)):
            for fresh, batch in ((1, 1), (1, 16), (100, 1), (100, 16)) if not chosen.dry_run else ((3, 2),):
                case = f"attention_{shape}{name}_r{fresh}_b{batch}"
                groups = [few_rows(spec, fresh, keys, length, dtype, scale) for _ in range(batch)]
                tried = _FOR_FEW if fresh == 1 else _FOR_MANY
                tries = shape == scale.shapes[-1] and not name and not chosen.dry_run
                metrics = _attention_case(case, spec, groups, scale, ceilings, tried if tries else ())
                if not name:
                    metrics |= _sdpa_case(case, spec, fresh, keys, batch, scale)
                found |= metrics
                rows.append([case, *(f"{metrics.get(f'{case}_{key}', float('nan')):.3g}" for key in _SHOWN)])
        count = 2500 if scale.device.type == "cuda" else 24
        case = f"attention_{shape}_causal_{count}"
        tried = _FOR_MANY if shape == scale.shapes[-1] and not chosen.dry_run else ()
        metrics = _attention_case(case, spec, [Group.causal(count)], scale, ceilings, tried)
        metrics |= _sdpa_causal(case, spec, count, scale)
        found |= metrics
        rows.append([case, *(f"{metrics.get(f'{case}_{key}', float('nan')):.3g}" for key in _SHOWN)])
    show("Attention of one layer", ["case", *_SHOWN], rows)
    return found


def few_rows(spec: ModelSpec, fresh: int, keys: int, length: int, dtype: torch.dtype, scale: Scale) -> Group:
    """`fresh` rows of one block that see `keys` cached tokens in segments of `length`."""
    count = keys // length
    shape = (spec.num_layers, 2, spec.num_kv_heads, length, spec.head_dim)
    blocks = [kept(torch.randn(shape, device=scale.device).to(scale.dtype), dtype, scale.device) for _ in range(count)]
    segments = tuple(Segment(kv, i * length, 0, length, i) for i, kv in enumerate(blocks))
    block = np.full(fresh, count, np.int32)
    return Group(segments, block, np.arange(fresh, dtype=np.int32), np.tri(count + 1, k=-1, dtype=bool))


def _attention_case(
    case: str, spec: ModelSpec, groups: Sequence[Group], scale: Scale, ceilings: Ceilings, others: Sequence[Other]
) -> dict[str, float]:
    """As the pass is cut by default, and the best of it and `others`, which are numbered from 1. Each is compiled."""
    timer, rope = Timer(scale.device), Rope.of(spec, 4096, scale.device)
    num_rows = sum(group.num_rows for group in groups)
    qkv = torch.randn(num_rows, spec.q_size + 2 * spec.kv_size, device=scale.device).to(scale.dtype)
    is_laid = HostTables(spec, groups, scale.dtype, scale.device).laid is not None
    usual = Tilings.of(spec, groups, scale.dtype, scale.device)
    way = "laid" if is_laid else "in_place"
    num_bytes = qkv.nbytes + num_rows * spec.q_size * qkv.itemsize
    num_bytes += sum(segment.num_bytes for group in groups for segment in group.segments) // spec.num_layers
    pairs = sum(int(g.row_mask().sum()) + g.num_rows * sum(map(len, g.segments)) for g in groups)
    floor = ceilings.seconds(num_bytes, spec.attention_flops(pairs) / spec.num_layers)
    times = []
    for other in [{}, *others]:
        changed: Tiling = dataclasses.replace(getattr(usual, way), **other)
        attend = TritonAttend.of(spec, rope, groups, scale.dtype, dataclasses.replace(usual, **{way: changed}))
        run = partial(_all_layers, attend, spec.num_layers, qkv)
        times.append(timer.replayed_seconds(run, 10) / spec.num_layers)
    best = int(np.argmin(times))
    found = {f"{case}_us": times[0] * 1e6, f"{case}_floor_share": floor / times[0]}
    return found | {f"{case}_best_us": times[best] * 1e6, f"{case}_best_tiling": best}


def _all_layers(attend: TritonAttend, num_layers: int, qkv: torch.Tensor) -> torch.Tensor:
    for layer in range(num_layers):
        found = attend(layer, qkv)
    return found.output


def _sdpa_case(case: str, spec: ModelSpec, fresh: int, keys: int, batch: int, scale: Scale) -> dict[str, float]:
    """torch's own attention, over keys that lie together already."""
    q, k, v = (
        torch.randn(batch, heads, count, spec.head_dim, device=scale.device).to(scale.dtype)
        for heads, count in ((spec.num_heads, fresh), (spec.num_kv_heads, keys), (spec.num_kv_heads, keys))
    )
    run = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    return {f"{case}_sdpa_us": Timer(scale.device).replayed_seconds(run, 20) * 1e6}


def _sdpa_causal(case: str, spec: ModelSpec, count: int, scale: Scale) -> dict[str, float]:
    q, k, v = (
        torch.randn(1, heads, count, spec.head_dim, device=scale.device).to(scale.dtype)
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    return {f"{case}_sdpa_us": Timer(scale.device).replayed_seconds(run, 20) * 1e6}


# ---- rankings --------------------------------------------------------------------------------------------------------


def ttft(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """One ranking at a time, by size: items warm, every user new. Of the main size also with weights in int8."""
    found, rows = dict[str, float](), []
    for shape, form, sizes in _variants(scale, scale.sizes):
        decoder = decoder_of(shape, scale, form)
        for size in sizes:
            engine, timer = _warm_engine(decoder, size, scale), Timer(scale.device)
            name = f"ttft_{shape}{_SUFFIXES[form]}_{size}"
            for level in LEVELS:
                repeats = scale.repeats if level != "full" else max(2, scale.repeats // 4)
                asked = rankings(size, scale.warming + repeats, level, chosen.seed)
                times = [timer.wall(partial(engine.rank, request)) for request in asked][scale.warming :]
                found |= spread(f"{name}_{level}", times)
            tokens, passed, launched, floor = _pass_of_blocks(engine, size, scale, ceilings, _ITEM_BYTES[form])
            p50 = {level: found[f"{name}_{level}_p50_ms"] for level in LEVELS}
            found |= {
                f"{name}_prompt_tokens": tokens,
                f"{name}_blocks_pass_ms": passed * 1e3,
                f"{name}_blocks_pass_floor_share": floor / passed,
                f"{name}_blocks_launched_pass_ms": launched * 1e3,
                f"{name}_blocks_vs_exact": p50["exact"] / p50["blocks"],
                f"{name}_blocks_vs_full": p50["full"] / p50["blocks"],
            }
            rows.append([shape, form, str(size), *(f"{value:.2f}" for value in p50.values())])
            rows[-1] += [f"{p50['exact'] / p50['blocks']:.2f}×", f"{passed * 1e3:.2f}", f"{launched * 1e3:.2f}"]
            rows[-1] += [f"{floor / passed:.2f}"]
            clean(engine)
    told = ["over prefix cache", "pass ms", "launched", "floor share"]
    show("TTFT, P50 ms", ["shape", "weights", "size", *LEVELS, *told], rows)
    return found


def _variants(scale: Scale, sizes: Sequence[Size]) -> Iterator[tuple[str, str, Sequence[Size]]]:
    """Shapes, how their weights are kept, and sizes: of int8 the main one alone."""
    for shape in scale.shapes:
        yield shape, "full", sizes
        yield shape, "int8", (scale.main,)


def _pass_of_blocks(
    engine: Engine, size: Size, scale: Scale, ceilings: Ceilings, item_bytes: float
) -> tuple[int, float, float, float]:
    """Tokens of a prompt, and of its pass at level `blocks` the seconds, replayed and launched, and the floor."""
    decoder, timer = engine.decoder, Timer(scale.device)
    prompt = engine.prompter.build(rankings(size, 1, "blocks")[0])
    planned = Planned(prompt, plan(prompt, Level("blocks"), ()))
    with engine.pool.hold() as held:
        missing = held.fetch(planned.plan.read)
        assert not missing, "items and events are warm"
        work = assemble([planned], held.blocks, scale.device).work
        decoder.forward(work)  # a shape is captured when it comes again
        replayed = timer.device_seconds(partial(decoder.forward, work), scale.repeats)
        static, decoder.static = decoder.static, None
        launched = timer.device_seconds(partial(decoder.forward, work), scale.repeats)
        decoder.static = static
    return (
        prompt.num_tokens,
        replayed,
        launched,
        ceilings.of_pass(decoder.spec, work, item_bytes or scale.dtype.itemsize),
    )


def batch(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """Rankings that are asked together; requests/s, and TTFT of each."""
    found, rows = dict[str, float](), []
    for shape, form, _ in _variants(scale, ()):
        engine, timer = _warm_engine(decoder_of(shape, scale, form), scale.main, scale), Timer(scale.device)
        for count in scale.batches if form == "full" else scale.batches[:: max(1, len(scale.batches) - 1)]:
            case = f"batch_{shape}{_SUFFIXES[form]}_b{count}"
            for level in LEVELS[1:]:
                repeats = max(2, scale.repeats // (6 if level == "exact" else 2))
                asked = rankings(scale.main, count * (repeats + 2), level, chosen.seed + count)
                groups = [asked[i : i + count] for i in range(0, len(asked), count)]
                times = [timer.wall(partial(engine.rank_batch, group)) for group in groups][2:]
                found |= spread(f"{case}_{level}", times)
                found[f"{case}_{level}_per_s"] = count / statistics.median(times)
            found[f"{case}_blocks_vs_exact"] = found[f"{case}_blocks_per_s"] / found[f"{case}_exact_per_s"]
            rates = [f"{found[f'{case}_{level}_per_s']:.1f}" for level in LEVELS[1:]]
            rows.append([shape, form, str(count), *rates, f"{found[f'{case}_blocks_vs_exact']:.2f}×"])
        clean(engine)
    columns = ["shape", "weights", "batch", *LEVELS[1:], "blocks / exact"]
    show(f"Rankings/s of {scale.main} by batch", columns, rows)
    return found


def saturation(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """All rankings at once, again and again: the loop chooses its batches. At `blocks` also one pass after the other.

    `overlap_share`: of the host's work on passes, by its trace, what was done while another pass was under way.
    """
    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        engine, timer = _warm_engine(decoder_of(shape, scale), scale.main, scale), Timer(scale.device)
        rates, most = {}, min(scale.saturation, 24)
        for count in [count for count in range(1, most + 1) for _ in range(3)]:  # passes of all lengths are captured
            engine.rank_batch(rankings(scale.main, count, "blocks", 1000 + count))
        for name, level, count, repeats in (
            ("exact", "exact", max(2, scale.saturation // 4), 1),
            ("blocks", "blocks", scale.saturation, 5),
            ("one_by_one", "blocks", scale.saturation, 5),
        ):
            engine.loop._flies = name != "one_by_one" and scale.device.type == "cuda"
            engine.rank_batch(rankings(scale.main, count if level == "blocks" else 2, level, 99))
            trace = engine.loop._trace = Trace()
            asked = [rankings(scale.main, count, level, 101 + number) for number in range(repeats)]
            rates[name] = count / statistics.median(timer.wall(partial(engine.rank_batch, each)) for each in asked)
            found[f"saturation_{shape}_{name}_per_s"] = rates[name]
            found[f"saturation_{shape}_{name}_overlap_share"] = _overlap(trace)
        found[f"saturation_{shape}_blocks_vs_exact"] = rates["blocks"] / rates["exact"]
        found[f"saturation_{shape}_blocks_vs_one_by_one"] = rates["blocks"] / rates["one_by_one"]
        rows.append([shape, *(f"{rate:.1f}" for rate in rates.values())])
        rows[-1].append(f"{found[f'saturation_{shape}_blocks_overlap_share']:.2f}")
        clean(engine)
    columns = ["shape", "exact", "blocks", "blocks, one pass after the other", "overlapped share"]
    show(f"Rankings/s of {scale.main}, all at once", columns, rows)
    return found


def _overlap(trace: Trace) -> float:
    """Of the time of stages before a pass is launched, and of launching it: what lies in the flight of another."""
    launched = {span.batch: span.end_s for span in trace.spans if span.stage == "forward"}
    read = {span.batch: span.end_s for span in trace.spans if span.stage == "readout"}
    flights = [(batch, launched[batch], read[batch]) for batch in launched if batch in read]
    host = [span for span in trace.spans if span.stage != "readout"]
    inside = sum(
        max(0.0, min(span.end_s, end) - max(span.start_s, start))
        for span in host
        for batch, start, end in flights
        if batch != span.batch
    )
    return inside / max(1e-9, sum(span.end_s - span.start_s for span in host))


# ---- decoding --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def beam(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """Whole searches that nothing waits in: the wall's time over the steps of full width, and over the floor.

    Beside it the device's time of a pass of full width, and of choosing the beams of a level.
    """
    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        decoder, timer = decoder_of(shape, scale), Timer(scale.device)
        for tokens in scale.beam_prompts:
            for width in scale.beams:
                tasks, codes = beam_tasks(decoder, width, 1, tokens, scale.codes, chosen.seed)
                choosing = OnDevice(codes, scale.device)
                search = BeamSearch(decoder, choosing, width)
                for _ in range(4):  # its passes are captured
                    searched(search, decoder, tasks)
                passes, floors = list[float](), list[float]()
                for work in steps_of_search(search, decoder, tasks):
                    floors.append(ceilings.of_pass(decoder.spec, work, scale.dtype.itemsize))
                    if len(work.token_ids) == width:
                        passes.append(timer.device_seconds(partial(decoder.forward, work), 2))
                times = [timer.wall(partial(searched, search, decoder, tasks)) for _ in range(scale.repeats)]
                step, floor = statistics.median(times) / len(passes), sum(floors) / len(passes)
                choose = timer.device_seconds(partial(_choose, choosing, tasks, codes), scale.repeats) / len(codes.ids)
                name, passed = f"beam_{shape}_t{tokens}_w{width}", statistics.median(passes)
                found |= {f"{name}_step_ms": step * 1e3, f"{name}_step_device_ms": passed * 1e3}
                found |= {f"{name}_step_over_floor": step / floor, f"{name}_choose_ms": choose * 1e3}
                found |= {f"{name}_floor_share": floors[-1] / passed}
                rows.append([name, *(f"{value * 1e3:.2f}" for value in (step, floor, passed, choose))])
        clean(decoder)
    show("A step of a search, ms", ["search", "wall", "floor", "pass alone", "choice alone"], rows)
    return found


def _choose(choosing: Choosing, tasks: Sequence[BeamTask], codes: CodeTokens) -> None:
    """All levels of a search whose logits cost nothing."""
    choice = choosing.begin(tasks)
    for ids, column in zip(codes.ids, choosing.columns, strict=True):
        choice.expand()
        choice.choose(torch.zeros(sum(choice.num_rows), len(ids), device=column.device), None)


@torch.inference_mode()
def speculation(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """Tokens/s of plain decoding, and with drafts that are right but for one branch: the most that drafts can gain.

    Beside it what a pass over a tree takes, over that of one row, which says how many accepted tokens pay for it.
    """
    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        decoder, timer = decoder_of(shape, scale), Timer(scale.device)
        spec, count = decoder.spec, scale.new_tokens
        answers = answering(decoder, scale.main, count, chosen)
        [plain] = answers([None])
        seconds = []
        for drafters in ([None] * 6, [Known(plain, spec.vocab_size) for _ in range(6)]):
            walls = [timer.wall(partial(answers, [each])) for each in drafters]
            seconds.append(statistics.median(walls[3:]))  # what is captured is captured by then
        found |= {f"speculation_{shape}_plain_per_s": count / seconds[0]}
        found |= {f"speculation_{shape}_known_per_s": count / seconds[1]}
        tokens = scale.beam_prompts[0]
        kv = torch.randn(spec.num_layers, 2, spec.num_kv_heads, tokens, spec.head_dim).to(scale.device, scale.dtype)
        times = {}
        for nodes in (0, *scale.trees):
            tree = EMPTY if not nodes else _chain(nodes)
            work = next_pass([Segment(kv, 0, 0, tokens, 0)], [1], [tokens], [tree])
            times[nodes] = timer.device_seconds(partial(decoder.forward, work), scale.repeats)
            found[f"speculation_{shape}_tree{nodes}_pass_ms"] = times[nodes] * 1e3
        rows.append([shape, *(f"{count / each:.1f}" for each in seconds)])
        rows[-1] += [f"{times[nodes] / times[0]:.2f}" for nodes in scale.trees]
        clean(decoder)
    columns = ["shape", "plain tokens/s", "known tokens/s", *(f"pass of {n + 1} rows / 1" for n in scale.trees)]
    show("Decoding one answer", columns, rows)
    return found


def _chain(nodes: int) -> DraftTree:
    return DraftTree(
        np.arange(nodes, dtype=np.int32), np.arange(nodes, dtype=np.int32), np.linspace(1, 0.5, nodes, dtype=np.float32)
    )


# ---- others ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def peers(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """The same lengths through transformers with torch's attention, same shape, random weights, nothing cached."""
    from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: PLC0415 (peers, not dependencies)

    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        spec, timer = SHAPES[shape], Timer(scale.device)
        config = Qwen3Config(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.ffn_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.max_positions,
            tie_word_embeddings=spec.tied_embeddings,
        )
        with scale.device:
            model = AutoModelForCausalLM.from_config(config, dtype=scale.dtype, attn_implementation="sdpa").eval()
        for tokens in sorted({size.tokens for size in scale.sizes}):
            ids = torch.randint(0, spec.vocab_size, (1, tokens), device=scale.device)
            run = partial(model, ids, logits_to_keep=1, use_cache=True)
            run()
            times = [timer.wall(run) for _ in range(max(2, scale.repeats // 4))]
            found |= spread(f"peers_{shape}_transformers_t{tokens}", times)
            rows.append([shape, str(tokens), f"{statistics.median(times) * 1e3:.2f}"])
        clean(model)
    show("transformers, prefill", ["shape", "tokens", "P50 ms"], rows)
    return found


def decoder_of(shape: str, scale: Scale, kept: str = "full") -> Decoder:
    weights = random_weights(SHAPES[shape], scale.dtype, scale.device)
    return Decoder(SHAPES[shape], weights, "triton" if scale.device.type == "cuda" else "auto", kept=kept)


def _warm_engine(decoder: Decoder, size: Size, scale: Scale) -> Engine:
    engine = engine_of(decoder, size, scale.kv_dtype, scale.pool_bytes)
    engine.warm(list(engine.catalogue))
    return engine


def clean(*_: object) -> None:
    """Called last with what was large: torch gives back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
