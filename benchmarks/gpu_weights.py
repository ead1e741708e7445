"""What weights in int8 gain on a GPU: the part `weights` of `benchmarks.gpu`.

Passes of one row, of a ranking's fresh rows, and of a prefill, with matrices in the dtype of the rows and in levels of
8 bits; then products alone, by the number of rows, in each way that there is. Floor: what must be read over the
bandwidth, or FLOPs over the rate of a large product, whichever takes longer. Errors are those of logits beside a twin
whose matrices are the levels, widened and rounded, so that only the order of sums differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_parts import Ceilings, clean, few_rows
from benchmarks.gpu_setup import SHAPES, Scale, Timer, random_weights
from benchmarks.harness import Options, show
from rcllm.model.attend.segments import Group
from rcllm.model.decoder import Decoder, Pass
from rcllm.model.layers import Linear
from rcllm.model.level_products import FEW, LevelProduct, ProductTiling, Scratch
from rcllm.model.quantised import quantise
from rcllm.model.spec import WEIGHT_GROUP, ModelSpec
from rcllm.model.weights import Weights

_ITEM_BYTES = 1 + 2 / WEIGHT_GROUP  # of a weight in 8 bits, with its share of a scale
_BEYOND_CACHES = 192 << 20  # bytes of matrices that are multiplied with in turn
_MATRICES = ("qkv", "o", "gate_up", "down")
_OTHERS: tuple[Callable[[ProductTiling], dict[str, int]], ...] = (  # fields of a tiling that are changed
    lambda usual: {"programs": 2 * usual.programs},
    lambda usual: {"inputs": 2 * usual.inputs, "num_stages": usual.num_stages - 1},
    lambda usual: {"outputs": 192 - usual.outputs},
)


@torch.inference_mode()
def weights(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        name, spec = f"weights_{shape}", SHAPES[shape]
        given = random_weights(spec, scale.dtype, scale.device, chosen.seed)
        levels = _made(name, spec, given, scale, found)
        _round_to_levels(given)
        full = Decoder(spec, given, "triton")
        for count, work in _passes(spec, scale):
            took = {each: _pass_seconds(decoder, work, scale) for each, decoder in (("full", full), ("int8", levels))}
            case, item_bytes = f"{name}_r{count}", {"full": scale.dtype.itemsize, "int8": _ITEM_BYTES}
            found |= {f"{case}_{each}_pass_ms": seconds * 1e3 for each, seconds in took.items()}
            shares = {each: ceilings.of_pass(spec, work, item_bytes[each]) / took[each] for each in took}
            found |= {f"{case}_{each}_floor_share": share for each, share in shares.items()}
            found |= {f"{case}_gain": took["full"] / took["int8"], **_errors(case, full, levels, work)}
            rows.append([case, *(f"{took[each] * 1e3:.2f}" for each in took), f"{found[f'{case}_gain']:.2f}×"])
            rows[-1] += [f"{shares['int8']:.2f}", f"{found[f'{case}_logits_max_error']:.1e}"]
        clean(full, levels, given)
    columns = ["pass", "full ms", "int8 ms", "gain", "int8 floor share", "largest error of a logit"]
    show("Passes with weights in int8", columns, rows)
    return found | _products(scale.shapes[-1], scale, ceilings, chosen)


def _made(name: str, spec: ModelSpec, given: Weights, scale: Scale, found: dict[str, float]) -> Decoder:
    """A decoder in levels; how long they took to make, and what memory beside them."""
    timer, on_gpu, made = Timer(scale.device), scale.device.type == "cuda", list[Decoder]()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found[f"{name}_made_s"] = timer.wall(lambda: made.append(Decoder(spec, given, "triton", kept="int8")))
    [levels] = made
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    found[f"{name}_mb"] = levels.matrix_bytes / 1e6
    found[f"{name}_making_mb"] = max(0.0, (peak - before - levels.matrix_bytes) / 1e6)
    return levels


def _round_to_levels(given: Weights) -> None:
    """Each matrix becomes, in its place, what its levels stand for."""
    tables = [given.embed] if given.lm_head is given.embed else [given.embed, given.lm_head]
    for matrix in [*tables, *(getattr(layer, name) for layer in given.layers for name in _MATRICES)]:
        matrix.copy_(quantise(matrix).widen())


def _passes(spec: ModelSpec, scale: Scale) -> Iterator[tuple[int, Pass]]:
    """One row and some of a ranking over cached blocks, and a prefill; the hidden states of a few rows are wanted."""
    on_gpu = scale.device.type == "cuda"
    keys, length = (2400, 80) if on_gpu else (40, 20)
    for count, cached in ((1, keys), (100, keys), (2500, 0)) if on_gpu else ((1, keys), (5, keys), (24, 0)):
        group = few_rows(spec, count, keys, length, scale.dtype, scale) if cached else Group.causal(count)
        tokens = torch.arange(count, device=scale.device)
        yield count, Pass(tokens, tokens + cached, [group], tokens[-16:])


def _pass_seconds(decoder: Decoder, work: Pass, scale: Scale) -> float:
    decoder.forward(work)  # a shape is captured when it comes again
    return Timer(scale.device).device_seconds(partial(decoder.forward, work), scale.repeats)


def _errors(case: str, full: Decoder, levels: Decoder, work: Pass) -> dict[str, float]:
    """Of logits over the whole vocabulary, and how large those are."""
    expected, got = (each.logits(each.forward(work).hidden) for each in (full, levels))
    error = (got - expected).abs()
    told = {"max_error": error.max(), "mean_error": error.mean(), "mean": expected.abs().mean()}
    return {f"{case}_logits_{name}": float(value) for name, value in told.items()}


def _products(shape: str, scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """Two matrices of a layer by the number of rows: from levels as cut by default and otherwise, widened, and full."""
    found, rows, spec = dict[str, float](), [], SHAPES[shape]
    sizes = {"o": (spec.hidden_size, spec.q_size), "gate_up": (2 * spec.ffn_size, spec.hidden_size)}
    counts = (1, 16, 32, 64, 128, 256, 512) if scale.device.type == "cuda" else (3, 40)
    for name, (size, inner) in sizes.items():
        copies = min(8, -(-_BEYOND_CACHES // (size * inner))) if scale.device.type == "cuda" else 1
        full = [torch.randn(size, inner, device=scale.device).to(scale.dtype) * 0.02 for _ in range(copies)]
        scratch = Scratch(scale.device)
        levels = [LevelProduct(quantise(matrix), None, scratch) for matrix in full]
        for count in counts:
            x = torch.randn(count, inner, device=scale.device).to(scale.dtype)
            case = f"weights_{shape}_{name}_r{count}"
            metrics = _product_case(case, x, full, levels, scale)
            floor = ceilings.seconds(size * inner * _ITEM_BYTES, 2.0 * count * size * inner)
            metrics[f"{case}_floor_share"] = floor * 1e6 / metrics[f"{case}_us"]
            found |= metrics
            told = ("us", "floor_share", "best_us", "best_tiling", "widened_us", "full_us")
            rows.append([case, *(f"{metrics[f'{case}_{each}']:.3g}" for each in told)])
        clean(full, levels)
    columns = ["matrix and rows", "levels µs", "floor share", "best µs", "best tiling", "widened µs", "full µs"]
    show(f"Products with levels of 8 bits; more than {FEW} rows go through the widened matrix", columns, rows)
    return found


def _product_case(
    case: str, x: torch.Tensor, full: list[torch.Tensor], levels: list[LevelProduct], scale: Scale
) -> dict[str, float]:
    """Microseconds, over the matrices in turn. Other tilings are numbered from 1."""
    usual = ProductTiling.of(len(x), x.dtype, x.device)
    others = _OTHERS if scale.device.type == "cuda" else ()
    tilings = [usual, *(dataclasses.replace(usual, **other(usual)) for other in others)]
    timer = Timer(scale.device)

    def in_turn(products: Sequence[Linear]) -> float:
        run = partial(_each, products, x)
        return timer.replayed_seconds(run, max(2, scale.repeats // 2)) / len(products) * 1e6

    times = [in_turn([partial(each.of_levels, tiling=tiling) for each in levels]) for tiling in tilings]
    return {
        f"{case}_us": times[0],
        f"{case}_best_us": min(times),
        f"{case}_best_tiling": int(np.argmin(times)),
        f"{case}_widened_us": in_turn([each.of_widened for each in levels]),
        f"{case}_full_us": in_turn([partial(F.linear, weight=matrix) for matrix in full]),
    }


def _each(products: Sequence[Linear], x: torch.Tensor) -> torch.Tensor:
    for product in products:
        found = product(x)
    return found
