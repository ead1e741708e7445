"""Matrices in 8 and 4 bits: exact where they come from such a file; products are those of the widened matrix.

Or, of rows that are rounded to levels as well, those of the rounded rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rcllm.errors import ModelError
from rcllm.model.attend.native import Kernels, kernels
from rcllm.model.ops import torch_linear
from rcllm.model.packed import Bf16Matrix, Fp32Matrix, QuantisedMatrix
from rcllm.model.quantised import GROUP, Quantised, quantise, round_rows
from tests.reference import quantised as reference

KINDS = ("Q8_0", "Q4_0", "Q4_1")


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def as_stored(kind: str, size: int = 100, inner: int = 96) -> torch.Tensor:
    """What a GGUF file of that kind stands for, in fp32."""
    gguf = pytest.importorskip("gguf")
    values = (np.random.default_rng(7).standard_normal((size, inner)) * 0.05).astype(np.float32)
    stored = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values, stored), stored).copy())


def made(bits: int, size: int = 100, inner: int = 96) -> Quantised:
    weight = torch.randn(size, inner) * 0.05
    return quantise(weight) if bits == 8 else quantise(reference.to_four_bits(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_a_gguf_file_keeps_its_every_value(kind: str) -> None:
    weight = as_stored(kind)
    found = quantise(weight)
    assert found.is_exact
    assert found.bits == int(kind[1])
    assert torch.equal(found.widen(), weight)
    assert torch.equal(reference.widened(found), weight)


def test_any_other_matrix_is_half_a_step_off_at_most() -> None:
    weight = torch.randn(50, 128) * torch.logspace(-6, 3, 50)[:, None]
    found = quantise(weight)
    assert not found.is_exact
    largest = weight.unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True)
    error = (found.widen() - weight).abs().unflatten(1, (-1, GROUP)) / largest
    print(f"largest error {error.max():.5f} of the largest value of a group, mean {error.mean():.5f}")
    assert (error[largest[:, 0, 0] > 1e-3] <= 1 / 254 + 127 / 2**12).all()  # half a step, and the scale's rounding
    assert torch.equal(reference.widened(found), found.widen())


def test_groups_of_zeros_and_rows_by_number() -> None:
    weight = torch.randn(7, 64)
    weight[2] = 0
    weight[:, 32:] = 0
    weight = weight[:, :50]
    for bits in (8, 4):
        found = quantise(weight if bits == 8 else reference.to_four_bits(weight))
        assert found.bits == bits
        assert not found.widen()[2].any()
        rows = torch.tensor([2, 0, 0, 6])
        assert torch.equal(found[rows], found.widen()[rows])
        assert found[rows].is_contiguous()


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ModelError, match="too large for int8"):
        quantise(torch.full((4, 32), 1e8) * torch.rand(4, 32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "inner"), [(5, 32), (48, 96), (100, 75), (200, 576)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_that_of_the_widened_matrix(
    compiled: Kernels, bits: int, products: str, size: int, inner: int, with_bias: bool
) -> None:
    """Exact: bit for bit, for few rows, which read the levels, and for many, which read a widened tile."""
    levels, bias = made(bits, size, inner), torch.randn(size) if with_bias else None
    product = QuantisedMatrix(compiled, levels, bias, products)
    twin = (Bf16Matrix if products == "bf16" else Fp32Matrix)(compiled, levels.widen(), bias)
    for rows in (1, 2, 7, 8, 9, 31, 33, 64, 193, 400):
        x = torch.randn(rows, inner)
        assert torch.equal(product(x), twin(x)), rows
    torch.testing.assert_close(
        product(x), reference.product(levels, x, bias, products), atol=1e-5, rtol=1e-5 if products == "fp32" else 1e-4
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("size", "inner"), [(5, 32), (48, 96), (100, 75), (200, 576)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_of_levels_is_that_of_rounded_rows(
    compiled: Kernels, bits: int, size: int, inner: int, with_bias: bool
) -> None:
    """Close: sums inside a group are exact; on torch alone as well."""
    levels, bias, x = made(bits, size, inner), torch.randn(size) if with_bias else None, torch.randn(30, inner)
    x[3], x[4, :32] = 0, 0
    x[5:8] *= torch.tensor([1e-30, 1e-4, 1e30])[:, None]
    expected = reference.product(levels, x, bias, "int8")
    largest = (x.abs() @ levels.widen().abs().T).amax(1, keepdim=True)
    for product in (QuantisedMatrix(compiled, levels, bias, "int8"), torch_linear(levels.widen(), bias, "int8")):
        assert ((product(x) - expected).abs() <= 1e-6 * largest + 1e-6).all()


def test_rows_are_rounded_to_the_nearest_level(compiled: Kernels) -> None:
    """Exact: by the kernels, by torch and value by value; seen through a matrix that is one."""
    inner = 96
    one = Quantised(inner, torch.eye(inner).char(), torch.ones(inner, 3).half(), None, is_exact=True)
    ties = torch.arange(-47.5, 48.5)
    ties[[0, 40, 80]] = 127
    x = torch.cat([ties[None], torch.randn(400, inner) * torch.logspace(-38, 37, 400)[:, None]])
    x[7], x[8] = 0, -0.0
    expected = reference.rounded_rows(x)
    assert torch.equal(round_rows(x), expected)
    assert torch.equal(QuantisedMatrix(compiled, one, None, "int8")(x), expected)
    assert expected[0, 1:4].tolist() == [-46, -46, -44]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(compiled: Kernels, bits: int, value: float) -> None:
    levels, x = made(bits, 100, 75), torch.randn(9, 75)
    clean = x.clone()
    x[2, 40] = x[6, 74] = value
    for product in (QuantisedMatrix(compiled, levels, None, "int8"), torch_linear(levels.widen(), None, "int8")):
        got = product(x)
        assert got[[2, 6]].isnan().all()
        others = [0, 1, 3, 4, 5, 7, 8]
        torch.testing.assert_close(got[others], product(clean)[others])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("products", ["fp32", "bf16", "int8"])
def test_a_row_does_not_depend_on_the_others(compiled: Kernels, bits: int, products: str) -> None:
    for inner in (75, 576):
        product = QuantisedMatrix(compiled, made(bits, 100, inner), None, products)
        x = torch.randn(500, inner)
        together = product(x)
        for first, stop in (
            (0, 1),
            (4, 6),
            (3, 6),
            (3, 8),
            (2, 10),
            (0, 9),
            (7, 37),
            (100, 133),
            (190, 207),
            (300, 500),
        ):
            assert torch.equal(product(x[first:stop]), together[first:stop])


def test_bytes(compiled: Kernels) -> None:
    """8.5 and 5 bits a weight, as the files have it."""
    assert QuantisedMatrix(compiled, made(8, 480, 576), None).num_bytes == 480 * 576 * 34 // 32
    assert QuantisedMatrix(compiled, made(4, 480, 576), None).num_bytes == 480 * 576 * 20 // 32
