"""A pass in two parts is the pass in one; close, 1e-5, and what rows attend to may differ between the parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from rcllm.model.attend.segments import Group
from rcllm.model.decoder import Decoder, Keep, Pass
from tests.engine import tiny


@pytest.fixture(params=[tiny.NATIVE, tiny.TORCH])
def decoder(request: pytest.FixtureRequest, one_compute_thread: None) -> Decoder:
    return tiny.fresh(request.param).decoder


def sequence(num_tokens: int = 30) -> Pass:
    rows = torch.arange(num_tokens)
    tokens = torch.randint(0, tiny.VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(3))
    wanted = torch.tensor([7, num_tokens - 1])
    return Pass(tokens, rows, (Group.causal(num_tokens),), wanted, [Keep(2, 9, 2), Keep(20, 24, 20)])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_going_on_with_all_rows_is_one_pass(decoder: Decoder, num_layers: int) -> None:
    work = sequence()
    whole = decoder.forward(work)
    carried = decoder.advance(work, num_layers)
    assert [kept.shape[0] for kept in carried.kept] == [num_layers] * 2
    parts = decoder.forward(work, carried.of_rows(torch.arange(30)))
    torch.testing.assert_close(parts.hidden, whole.hidden, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(parts.kept, whole.kept, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_rows_that_nobody_sees_later_may_be_left_out(decoder: Decoder) -> None:
    """Branches after a shared prefix of the first layer: the second part drops one, and the other is as it was."""
    work = replace(sequence(), keep=(), wanted=torch.tensor([11]))
    head = Pass(work.token_ids[:12], work.positions[:12], (Group.causal(12),), work.wanted)
    carried = decoder.advance(work, 1).of_rows(torch.arange(12))
    torch.testing.assert_close(
        decoder.forward(head, carried).hidden, decoder.forward(head).hidden, atol=1e-5, rtol=1e-5
    )


def test_carried_rows_are_copies(decoder: Decoder) -> None:
    """The pass that goes on changes its rows in place, and the same rows can go on twice."""
    work = sequence()
    carried = decoder.advance(work, 1)
    runs = [decoder.forward(work, carried.of_rows(torch.arange(30))).hidden for _ in range(2)]
    assert torch.equal(*runs)


def test_an_observer_is_told_of_every_layer_once(decoder: Decoder) -> None:
    work = sequence()
    seen: list[int] = []
    shapes: set[tuple[int, ...]] = set()

    def observe(layer: int, qkv: torch.Tensor) -> None:
        seen.append(layer)
        shapes.add(tuple(qkv.shape))

    carried = decoder.advance(work, 1, observe)
    decoder.forward(work, carried, observe)
    assert seen == list(range(decoder.spec.num_layers))
    assert shapes == {(30, decoder.spec.q_size + 2 * decoder.spec.kv_size)}


def test_threads_that_share_a_decoder_get_what_each_gets_alone(decoder: Decoder) -> None:
    works = [replace(sequence(num_tokens), keep=(), wanted=torch.tensor([num_tokens - 1])) for num_tokens in (30, 45)]
    alone = [decoder.forward(work).hidden for work in works]

    def run(number: int) -> bool:
        with torch.no_grad():
            torch.set_num_threads(1)
            return all(torch.equal(decoder.forward(works[number]).hidden, alone[number]) for _ in range(60))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, [0, 1])) == [True, True]
