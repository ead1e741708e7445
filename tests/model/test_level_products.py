"""Products with matrices in levels on a GPU, in Triton's interpreter: those with the widened matrix, however it is cut.

The interpreter rounds to fp16 as a GPU does, and to bf16 towards zero; so values in bf16 are a step off at most.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rcllm.model.attend.segments import Group
from rcllm.model.decoder import Decoder, Pass
from rcllm.model.level_products import FEW, LevelProduct, ProductTiling, Scratch
from rcllm.model.quantised import GROUP, Quantised, quantise
from rcllm.model.static_passes import StaticPasses
from rcllm.model.weights import LayerWeights, Weights, load_model
from tests.model.test_quantised import made
from tests.reference import quantised as reference
from tests.tiny_models import tiny_model

pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of a value, relative to it
SIZES = [(5, 32, True), (100, 75, False), (140, 300, True)]  # out, in, and whether there is a bias


def product_of(matrix: Quantised, bias: torch.Tensor | None = None) -> LevelProduct:
    return LevelProduct(matrix, bias, Scratch(torch.device("cpu")))


def every_level(bits: int) -> Quantised:
    """Each level in each place of a word, with scales of every size that is not lost in fp16."""
    least, count = (-127, 255) if bits == 8 else (0, 16)
    levels = (torch.arange(count * 64).view(count, 64) * 7 + torch.arange(count)[:, None]) % count + least
    scales = (2.0 ** torch.linspace(-20, 0, 2 * count)).half().view(count, 2)
    if bits == 8:
        return Quantised(64, levels.to(torch.int8), scales, None, False)
    pairs = levels.to(torch.uint8).unflatten(1, (-1, 2))
    offsets = torch.randn(count, 2).half() * scales * 20
    return Quantised(64, pairs[..., 0] | pairs[..., 1] << 4, scales, offsets, False)


def close_to_twin(got: torch.Tensor, matrix: Quantised, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Close: operands are exact in their dtype but for bf16 (see above), sums in fp32, the result rounded once."""
    weight = matrix.widen().to(x.dtype).double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    off = x.double().abs() @ weight.abs().T * (2**-8 if x.dtype == torch.bfloat16 else 2**-20) + 1e-6
    assert got.dtype == x.dtype
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= off + expected.abs() * STEP[x.dtype]).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", list(STEP))
def test_every_level_is_widened_to_its_value(bits: int, dtype: torch.dtype) -> None:
    """Exact, by either kernel: the first through rows that choose one input each."""
    matrix = every_level(bits)
    expected = matrix.widen().to(dtype)
    chosen = product_of(matrix)(torch.eye(64, dtype=dtype)).T
    widened = product_of(matrix)._widened(0, len(expected), dtype)
    assert torch.equal(chosen, widened)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(widened, expected, atol=0, rtol=STEP[dtype])
    else:
        assert torch.equal(widened, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize(("size", "inner", "with_bias"), SIZES)
def test_a_product_is_that_of_the_widened_matrix(
    bits: int, dtype: torch.dtype, size: int, inner: int, with_bias: bool
) -> None:
    """For few rows, which read the levels, and for more than FEW, which read a widened copy."""
    matrix, bias = made(bits, size, inner), torch.randn(size).to(dtype) if with_bias else None
    product = product_of(matrix, bias)
    for rows in (1, 17, 200, FEW + 1):
        x = torch.randn(rows, inner).to(dtype)
        close_to_twin(product(x), matrix, x, bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_slow_twin_agrees(bits: int) -> None:
    """Value by value as the format is defined."""
    matrix, bias, x = made(bits, 100, 75), torch.randn(100), torch.randn(7, 75)
    got = product_of(matrix, bias)(x)
    torch.testing.assert_close(got, reference.product(matrix, x, bias, "fp32"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", [ProductTiling(16, 32, 32, 1000), ProductTiling(32, 64, 64, 2), None])
def test_however_inputs_are_divided(tiling: ProductTiling | None) -> None:
    """Parts are summed in one order: the same bits again and again."""
    matrix, bias, x = made(8, 40, 600), torch.randn(40), torch.randn(18, 600)
    product = product_of(matrix, bias)
    tiling = tiling or ProductTiling.on_gpu(18, torch.bfloat16)
    got = product.of_levels(x, tiling)
    close_to_twin(got, matrix, x, bias)
    assert torch.equal(product.of_levels(x, tiling), got)


@pytest.mark.parametrize(("rows", "size", "inner"), [(1, 4096, 12_288), (100, 1024, 3072), (200, 151_936, 4096)])
def test_every_input_is_in_one_split(rows: int, size: int, inner: int) -> None:
    tiling = ProductTiling.on_gpu(rows, torch.bfloat16)
    splits, steps = tiling.splits(rows, size, inner, cores=132)
    whole = -(-inner // tiling.inputs)
    assert splits * steps >= whole > (splits - 1) * steps
    programs = splits * -(-rows // tiling.rows) * -(-size // tiling.outputs)
    assert programs <= tiling.programs * 132 or splits == 1


def test_a_matrix_larger_than_the_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of which not even a tile of rows fits is widened in tiles."""
    matrix, bias, x = made(4, 100, 96), torch.randn(100), torch.randn(FEW + 44, 96)
    expected = product_of(matrix, bias)(x)
    for num_bytes in (32 * 96 * 4, 48 * 96 * 4 + 5):
        monkeypatch.setattr(Scratch, "NUM_BYTES", num_bytes)
        torch.testing.assert_close(product_of(matrix, bias)(x), expected, atol=1e-6, rtol=1e-6)


def test_rows_that_lie_apart_and_none_at_all() -> None:
    matrix, x = made(8, 48, 96), torch.randn(9, 200)
    product = product_of(matrix)
    assert torch.equal(product(x[:, 100:196]), product(x[:, 100:196].contiguous()))
    assert product(x[:0, :96]).shape == (0, 48)


@pytest.mark.parametrize(("family", "dtype"), [("llama-tied", torch.float32), ("qwen2", torch.float16)])
def test_a_decoder_in_levels_is_that_of_the_widened_matrices(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Close: the same operands, whose sums are cut otherwise. Also for chosen columns, and in passes of fixed shape.

    The one model has one table for embedding and head, the other has biases.
    """
    spec, weights = load_model(tiny_model(family, tmp_path))
    levels = Decoder(spec, weights, "triton", kept="int8", dtype=dtype)
    twin = Decoder(spec, as_kept(weights, dtype), "triton")
    work = Pass(torch.arange(6), torch.arange(6), (Group.causal(6),), torch.arange(6))
    columns = torch.tensor([5, 0, 77])
    expected = twin.forward(work).hidden
    static = StaticPasses(levels, lambda run: run)
    assert static.forward(work) is None, "the first of a shape runs as it is"
    close = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    for passed in (levels.forward(work), static.forward(work)):
        assert passed is not None
        assert passed.hidden.dtype == dtype
        torch.testing.assert_close(passed.hidden, expected, **close)
    torch.testing.assert_close(levels.logits(expected), twin.logits(expected), **close)
    torch.testing.assert_close(levels.logits(expected, columns), twin.logits(expected, columns), **close)


def as_kept(weights: Weights, dtype: torch.dtype) -> Weights:
    """Those in levels, widened and rounded; all others rounded alone."""

    def kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.dim() == 1:
            return None if tensor is None else tensor.to(dtype)
        return quantise(tensor).widen().to(dtype)

    names = [field.name for field in dataclasses.fields(LayerWeights)]
    layers = [LayerWeights(**{name: kept(getattr(layer, name)) for name in names}) for layer in weights.layers]  # type: ignore[arg-type]
    embed, head, norm = kept(weights.embed), kept(weights.lm_head), kept(weights.final_norm)
    assert embed is not None
    assert head is not None
    assert norm is not None
    return Weights(embed, layers, norm, embed if weights.lm_head is weights.embed else head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_are_made_of_16_bits_as_of_the_same_values_in_32(dtype: torch.dtype) -> None:
    weight = (torch.randn(70, 90) * 0.1).to(dtype)
    for found, expected in zip(quantise(weight).parts, quantise(weight.float()).parts, strict=True):
        assert torch.equal(found, expected)


def test_a_large_matrix_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact; where 4 bits hold the first part alone, 8 hold all."""
    eight, four = torch.randn(40, GROUP), reference.to_four_bits(torch.randn(40, GROUP))
    whole = [quantise(weight) for weight in (eight, four, torch.cat([four, eight]))]
    assert [matrix.bits for matrix in whole] == [8, 4, 8]
    monkeypatch.setattr("rcllm.model.quantised._AT_ONCE", {"cpu": 3 * GROUP})
    for weight, expected in zip((eight, four, torch.cat([four, eight])), whole, strict=True):
        found = quantise(weight)
        assert found.is_exact == expected.is_exact
        assert all(torch.equal(a, b) for a, b in zip(found.parts, expected.parts, strict=True))
