"""The decoder against transformers, through the production loader: every family, and what GGUF makes of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from rcllm import fetch
from rcllm.errors import ModelError, UnsupportedModelError
from rcllm.model import decoder as decoder_module
from rcllm.model.adapter import Adapter, LowRank, merge_layer
from rcllm.model.decoder import Decoder
from rcllm.model.gguf_file import convert_gguf
from rcllm.model.gguf_tensors import GGUF, INDEX, GgufTensors
from rcllm.model.pull import pull
from rcllm.model.quantised import quantise, wide
from rcllm.model.weights import load_model, load_spec, streamed_model
from rcllm.prompt.tokenizer import Tokenizer
from tests.reference import attend, bf16, quantised
from tests.tiny_models import FAMILIES, VOCAB, reference_logits, their_model, tiny_gguf, tiny_model

TOLERANCE = 1e-4  # close, fp32
REAL_TOLERANCE = 5e-4  # 30 layers, logits up to 36: transformers in fp32 is itself 1e-4 off transformers in fp64
NUM_TOKENS = 120  # beyond the original context of the llama3 and yarn models, within Mistral's window
DEFAULT_MODEL = "smollm2-135m-instruct"


def tokens() -> list[int]:
    return torch.randint(0, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(folder: Path) -> torch.Tensor:
    return Decoder(*load_model(folder)).full_logits(tokens())


def assert_close(ours: torch.Tensor, reference: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    error = (ours - reference).abs()
    print(f"{name}: max {error.max():.1e}, mean {error.mean():.1e}, logits up to {reference.abs().max():.1f}")
    assert error.max() <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path)
    assert_close(logits(folder), reference_logits(folder, tokens()), family)


@pytest.mark.parametrize("family", ["qwen3", "llama-tied", "llama-yarn", "qwen2"])
def test_logits_on_the_kernels_for_gpus_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    """In Triton's interpreter, all of a layer but its products."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
    folder = tiny_model(family, tmp_path)
    ours = Decoder(*load_model(folder), "triton").full_logits(tokens())
    assert_close(ours, reference_logits(folder, tokens()), family)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-biased", "llama-head-dim", "qwen2"])
def test_bf16_is_the_model_with_rounded_operands(family: str, tmp_path: Path) -> None:
    """Close to the twin: an operand at a tie may fall either way, but the difference is far below that to fp32."""
    spec, weights = load_model(tiny_model(family, tmp_path))
    narrow = Decoder(spec, weights, products="bf16")
    ours, ids = narrow.full_logits(tokens()[:40]).double(), tokens()[:40]
    twin, wide = bf16.full_logits(spec, weights, ids), Decoder(spec, weights).full_logits(ids).double()
    off, cost = (ours - twin).abs(), (twin - wide).abs()
    print(f"{family}: {off.mean():.1e}, max {off.max():.1e}, from the twin, which is {cost.mean():.1e} from fp32")
    assert 0 < cost.mean() < 0.02
    assert off.mean() < (0.05 if narrow.kernels else 1.0) * cost.mean()  # torch alone attends in fp32


@pytest.mark.parametrize("family", ["qwen3", "qwen3-biased", "llama-head-dim", "qwen2"])
@pytest.mark.parametrize("compiled", [True, False])
def test_int8_is_the_model_with_rounded_operands(
    family: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close to the twin, which attends as the kernels do, or as torch alone does.

    Up to an input at a tie between levels, which may fall either way, and moves all rows that attend to its own.
    """
    if not compiled:
        monkeypatch.setattr("rcllm.model.decoder.kernels", lambda: None)
    spec, weights = load_model(tiny_model(family, tmp_path))
    narrow = Decoder(spec, weights, products="int8", kept="int8")

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return quantised.product(quantise(weight), x.float(), bias, "int8").double()

    ids, attended = tokens()[:40], bf16.attend if narrow.kernels else attend.attend
    twin = bf16.full_logits(spec, weights, ids, linear, lambda table: quantise(table).widen().double(), attended)
    ours, wide = (each.full_logits(ids).double() for each in (narrow, Decoder(spec, weights, kept="int8")))
    off, cost = (ours - twin).abs(), (twin - wide).abs()
    print(f"{family}: {off.mean():.1e}, max {off.max():.1e}, from the twin, which is {cost.mean():.1e} from fp32")
    assert 0 < cost.mean() < 0.05
    assert off.amax(1).quantile(0.25) < 1e-5
    assert off.mean() < cost.mean()


def test_the_last_position_of_dynamic_rope_is_still_exact(tmp_path: Path) -> None:
    folder = tiny_model("llama-dynamic", tmp_path, max_position_embeddings=NUM_TOKENS)
    spec, weights = load_model(folder)
    assert spec.max_positions == NUM_TOKENS
    assert_close(Decoder(spec, weights).full_logits(tokens()), reference_logits(folder, tokens()), "dynamic, full")


def test_a_sliding_window_equals_full_attention_up_to_max_positions(tmp_path: Path) -> None:
    folder = tiny_model("mistral", tmp_path, sliding_window=NUM_TOKENS)
    spec, weights = load_model(folder)
    assert spec.max_positions == NUM_TOKENS
    assert_close(Decoder(spec, weights).full_logits(tokens()), reference_logits(folder, tokens()), "full window")


def test_a_sharded_model_computes_the_same(tmp_path: Path) -> None:
    whole = tiny_model("qwen3-biased", tmp_path / "whole")
    shards = tiny_model("qwen3-biased", tmp_path / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert torch.equal(logits(whole), logits(shards))


# ---- GGUF -----------------------------------------------------------------------------------------------------------

GGUF_LLAMA3 = {  # as in Llama 3.2; a converter writes the divisors of the frequencies, not these numbers
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "qwen3-biased", "llama3"])
def test_a_gguf_computes_what_it_was_made_from(family: str, tmp_path: Path) -> None:
    if family == "llama3":
        model = tiny_model("llama", tmp_path, vocab_size=264, head_dim=32, rope_parameters=GGUF_LLAMA3)
    else:
        model = tiny_model(family, tmp_path, vocab_size=264)
    folder = convert_gguf(tiny_gguf(model, tmp_path / "tiny.gguf"), tmp_path / "converted")
    assert_close(logits(folder), reference_logits(model, tokens()), family)


KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16")


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_a_gguf_are_kept_exactly(kind: str, tmp_path: Path) -> None:
    """Bit for bit those of the `gguf` package, rows in our order; levels where the file has some that we know."""
    model = tiny_model("llama", tmp_path, vocab_size=264)
    folder = convert_gguf(tiny_gguf(model, tmp_path / "tiny.gguf", quantised=kind), tmp_path / "converted")
    tensors, stored, num_quantised = GgufTensors(folder), gguf.GGMLQuantizationType[kind], 0
    for name, tensor in load_file(model / "model.safetensors").items():
        name, expected, levels = name.removeprefix("model."), tensor, None
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:  # blocks lie along rows, so their order does not matter
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), stored), stored))
            levels = tensors.levels(name)
            assert (levels is not None) == (kind in ("Q8_0", "Q4_0", "Q4_1"))
            num_quantised += 1
        assert torch.equal(tensors.values(name).float(), expected), name
        assert levels is None or torch.equal(levels.widen(), expected), name
        assert levels is None or levels.bits == int(kind[1])
    assert num_quantised > 10


def test_a_kind_that_the_package_cannot_read_is_named(tmp_path: Path) -> None:
    """It lists Q8_K, and has no way of making values of it."""
    folder = convert_gguf(tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "a.gguf"), tmp_path / "b")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["tensors"]["norm.weight"]["kind"] = "Q8_K"
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        UnsupportedModelError, match=r"norm\.weight is kept as Q8_K, which the gguf package cannot read"
    ):
        load_model(folder)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_levels_of_a_gguf_are_kept_as_they_are_read(
    kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the decoder computes what it computes from levels that are found again in the values."""
    model = tiny_model(family, tmp_path, vocab_size=264, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    source = tiny_gguf(model, tmp_path / "tiny.gguf", quantised=kind)
    folder, logits = convert_gguf(source, tmp_path / "converted"), []
    for dtype in (torch.float32, None):
        if dtype is None:
            monkeypatch.setattr(decoder_module, "quantise", lambda _: pytest.fail("the file has levels of it"))
        with streamed_model(folder, dtype, "cpu") as (spec, weights):
            decoder = Decoder(spec, weights, kept="int8", dtype=torch.float32)
        logits.append(decoder.full_logits(tokens()))
        assert decoder.num_rounded == 0
    assert torch.equal(*logits)


def test_a_level_that_kernels_have_no_place_for_is_widened(tmp_path: Path) -> None:
    """Q8_0 could hold -128, though what writes it does not."""
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf", quantised="Q8_0")
    folder, name = convert_gguf(source, tmp_path / "converted"), "layers.0.self_attn.o_proj.weight"
    tensors = GgufTensors(folder)
    levels, before = tensors.levels(name), tensors.values(name)
    assert levels is not None
    assert levels.levels.min() >= -127
    with (folder / GGUF).open("r+b") as file:
        file.seek(json.loads((folder / INDEX).read_text())["tensors"][name]["offset"] + 2)  # behind the scale
        file.write(b"\x80")
    tensors = GgufTensors(folder)
    assert tensors.levels(name) is None
    expected = before.clone()
    expected[0, 0] = -128 * levels.scales[0, 0].float()
    assert torch.equal(tensors.values(name), expected)
    load_model(folder)


def test_an_adapter_is_added_to_what_levels_stand_for(tmp_path: Path) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf", quantised="Q4_1")
    folder = convert_gguf(source, tmp_path / "converted")
    spec = load_spec(folder)
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, spec.hidden_size), (spec.q_size, 2)))
    adapter = Adapter(2, 2.0, {(1, "q"): LowRank(down, up, 1.0)})
    found = []
    for dtype in (torch.float32, None):
        with streamed_model(folder, dtype, "cpu", partial(merge_layer, adapter)) as (_, weights):
            found.append(wide(weights.layers[1].qkv))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF", "model.gguf has 4 bytes of [0-9,]+; pull the model again"),
        ("model.gguf", b"", "model.gguf"),
        ("model.gguf.json", b"{", "model.gguf.json"),
        ("model.gguf.json", b"{}", "model.gguf.json does not index model.gguf"),
        ("model.gguf.json", b'{"tensors": {"norm.weight": {"kind": "F32"}}}', "does not index model.gguf"),
        ("model.gguf.json", b'{"tensors": {}}', "the tensors do not fit config.json: missing"),
        ("model.gguf.json", None, "model.gguf.json is missing"),
    ],
)
def test_a_folder_whose_gguf_was_damaged_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf")
    folder = convert_gguf(source, tmp_path / "converted")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_transformers_reads_the_gguf_of_a_folder(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, vocab_size=264)
    folder = convert_gguf(tiny_gguf(model, tmp_path / "tiny.gguf", quantised="Q8_0"), tmp_path / "converted")
    assert (folder / GGUF).is_file()
    assert_close(logits(folder), reference_logits(folder, tokens()), "a GGUF in both")
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("hello 12<|im_end|>")
    assert tokenizer.decode(ids) == "hello 12<|im_end|>"
    assert ids[0] == tokenizer.encode_control("hell")[0]
    assert tokenizer.encode_control("<|im_end|>") == (2,)
    assert (tokenizer.chat_format, tokenizer.bos_ids, tokenizer.vocab_size) == ("chatml", (), 264)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "gemma3"}, "gemma3 is not supported; supported are llama, qwen2, qwen3"),
        ({"expert_count": 8}, "expert_count = 8"),
        ({"attention.sliding_window": 64}, "sliding_window = 64"),
        ({"rope.dimension_count": 8}, "rope.dimension_count = 8"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor = 1\.5 is not supported"),
        ({"attention.causal": 0}, "is an encoder"),
        ({"logit_scale": 8.0}, r"logit_scale = 8\.0"),
        ({"rope.scale_linear": 4.0}, "scale_linear"),
        ({"pre": "deepseek-llm"}, "deepseek-llm"),
        ({"tokenizer": "llama"}, "byte-level BPE"),
    ],
)
def test_a_gguf_variant_is_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf", **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        convert_gguf(source, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-0", "tiny.gguf"], "nothing may be left behind"


def test_a_truncated_gguf_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf")
    content = source.read_bytes()
    for length in (10, 5_000, len(content) // 2, len(content) - 100):
        source.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            convert_gguf(source, tmp_path / "converted")
        assert not (tmp_path / "converted").exists()


# ---- the real one ---------------------------------------------------------------------------------------------------


def assert_default_model_is_right(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    spec, weights = load_model(folder)
    assert spec.num_weights == 134_515_008
    ids = list(
        tokenizer.encode_control("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    )
    ours = Decoder(spec, weights).full_logits(ids)
    assert tokenizer.decode([int(ours[-1].argmax())]) == "The"
    assert_close(ours, reference_logits(folder, ids), DEFAULT_MODEL, REAL_TOLERANCE)


def test_the_default_model_where_it_is_at_hand() -> None:
    folder = fetch.cache_dir() / "models" / DEFAULT_MODEL
    if not folder.exists():
        pytest.skip("the default model has not been pulled on this machine")
    assert_default_model_is_right(folder)


@pytest.mark.slow
def test_pulling_the_default_model(tmp_path: Path) -> None:
    folder = pull(DEFAULT_MODEL, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no partial work may stay"
    assert_default_model_is_right(folder)
    assert their_model(folder).num_parameters() == 134_515_008
