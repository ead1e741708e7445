"""An engine whose weights are kept in int8: that of the same model with rounded weights, bit for bit."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rcllm.config import CacheConfig, Config, Hardware, ModelConfig, resolve
from rcllm.engine.build import load_decoder
from rcllm.errors import ConfigError, ModelWarning, answered
from rcllm.model.attend.choose import check_kept
from rcllm.model.decoder import Decoder
from rcllm.model.quantised import quantise
from rcllm.model.weights import load_model, streamed_model
from tests.engine import tiny
from tests.engine.test_batches import mixed
from tests.reference import quantised as reference
from tests.tiny_models import reference_logits

TOKENS = [5, 9, 2, 11, 7, 3, 60, 61, 4, 4, 8, 90]
LEVELS = ("full", "exact", "corrected(0.3,0.3)", "linked(4)", "blocks")


def rounded_model(folder: Path, family: str, bits: int = 8) -> Path:
    """A copy of the tiny model whose matrices have only the values that so many bits hold."""
    copy = shutil.copytree(tiny.model_folder(family), folder / f"{family}-{bits}")
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = quantise(tensor).widen().contiguous() if bits == 8 else reference.to_four_bits(tensor)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def decoder_of(folder: Path, weights: str, dtype: str = "fp32", adapter: str = "") -> Decoder:
    model = ModelConfig(path=str(folder), device="cpu", dtype=dtype, weights=weights, adapter=adapter)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelWarning)  # some processors imitate narrow products
        return load_decoder(Config(model), folder)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("family", "dtype"), [(tiny.NATIVE, "fp32"), (tiny.NATIVE, "bf16"), (tiny.TORCH, "fp32")])
def test_logits_are_those_of_the_model_with_rounded_weights(family: str, bits: int, dtype: str, tmp_path: Path) -> None:
    folder = rounded_model(tmp_path, family, bits)
    kept = decoder_of(folder, "int8", dtype)
    assert kept.num_rounded == 0
    logits, full = kept.full_logits(TOKENS), decoder_of(folder, "full", dtype).full_logits(TOKENS)
    if dtype == "bf16":  # full rounds the rows of the embedding as well
        assert 0 < (logits - full).abs().mean() < 0.02
    else:
        assert torch.equal(logits, full)
        torch.testing.assert_close(logits, reference_logits(folder, TOKENS), atol=1e-4, rtol=0)


def test_a_model_that_is_in_no_such_levels_is_rounded_and_says_so() -> None:
    folder = tiny.model_folder()
    kept, full = decoder_of(folder, "int8"), decoder_of(folder, "full")
    assert kept.num_rounded == 4 * kept.spec.num_layers + (1 if kept.spec.tied_embeddings else 2)
    assert kept.matrix_bytes < full.matrix_bytes / 2
    shift = (kept.full_logits(TOKENS) - full.full_logits(TOKENS)).abs()
    print(f"logits shift by {shift.mean():.1e}, at most {shift.max():.1e}")
    assert 0 < shift.mean() < 0.05


@pytest.mark.parametrize("level", LEVELS)
def test_scores_at_every_level_are_those_of_rounded_weights(level: str, tmp_path: Path) -> None:
    folder = rounded_model(tmp_path, tiny.NATIVE)
    asked = tiny.request(6, (30, 31, 32), level=level)
    scores = []
    for weights in ("full", "int8"):
        config = tiny.config(weights=weights)
        engine = tiny.Engine.build(tiny.catalogue(), replace(config, model=replace(config.model, path=str(folder))))
        scores.append([engine.rank(asked).scores for _ in range(2)])
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)  # a few columns of the head are read through torch


def test_a_batch_changes_nothing() -> None:
    requests = mixed(14)
    alone = [tiny.fresh(weights="int8").rank(request) for request in requests]
    together = answered(tiny.fresh(weights="int8").rank_batch(requests))
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-5)


def test_what_is_made_by_other_weights_is_never_read_or_believed() -> None:
    kept, full = tiny.fresh(weights="int8"), tiny.fresh()
    assert kept.prompter.namespace != full.prompter.namespace
    assert kept.identity.differences(full.identity) == ("weights int8 instead of full",)


def test_where_int8_saves_nothing_it_is_refused() -> None:
    model, hardware = ModelConfig(device="cpu", dtype="fp16", weights="int8"), Hardware(True, 1 << 33)
    with pytest.raises(ConfigError, match="fp32, bf16 or int8, got fp16; use weights = 'full'"):
        resolve(Config(model, cache=CacheConfig()), hardware)
    assert resolve(Config(replace(model, device="cuda")), hardware).model.dtype == "fp16"
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"needs the kernels in Triton, but model.attention is gather here"):
        check_kept("int8", "gather", gpu)
    for kept, backend, device in (("int8", "triton", gpu), ("int8", "auto", cpu), ("full", "gather", gpu)):
        check_kept(kept, backend, device)


def test_scores_on_the_kernels_for_gpus(one_compute_thread: None) -> None:
    """In Triton's interpreter, against the compiled kernels on the same levels."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
    asked = tiny.request((0, 7), (30,), level="full")
    engines = [tiny.build(attention=name, weights="int8") for name in ("auto", "triton")]
    scores = [engine.rank(asked).scores for engine in engines]
    assert engines[1].decoder.matrix_bytes == engines[0].decoder.matrix_bytes
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_levels_are_made_of_what_the_files_hold(stored: torch.dtype, tmp_path: Path) -> None:
    """Read in 16 bits, which takes half the memory, they are those of the same values in 32."""
    wide, narrow = (shutil.copytree(tiny.model_folder(), tmp_path / name) for name in ("wide", "narrow"))
    tensors = {name: each.to(stored) for name, each in load_file(wide / "model.safetensors").items()}
    save_file(tensors, narrow / "model.safetensors", {"format": "pt"})
    save_file({name: each.float() for name, each in tensors.items()}, wide / "model.safetensors", {"format": "pt"})
    with streamed_model(narrow, None, "cpu") as (_, weights):
        assert weights.embed.dtype == stored
    with streamed_model(wide, None, "cpu") as (_, weights):
        assert weights.embed.dtype == torch.float32
    decoders = [decoder_of(folder, "int8") for folder in (narrow, wide)]
    assert torch.equal(*(decoder.full_logits(TOKENS) for decoder in decoders))
    assert {decoder.dtype for decoder in decoders} == {torch.float32}


def test_layers_can_be_read_one_by_one() -> None:
    """As `load_model` gives them, all at once."""
    folder = tiny.model_folder()
    _, whole = load_model(folder)
    with streamed_model(folder, torch.float32, "cpu") as (spec, weights):
        assert len(weights.layers) == spec.num_layers
        assert weights.layers[0] is not weights.layers[0]
        for mine, other in zip(weights.layers, whole.layers, strict=True):
            assert torch.equal(mine.qkv, other.qkv)
            assert torch.equal(mine.down, other.down)
        assert len(weights.layers[:1]) == 1
