"""Remembered texts: counted in bytes, the oldest go first, and one long text is not kept at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rcllm.core.ranking import TokenIds
from rcllm.prompt.remembered import Remembered


class Counting:
    """Stands in for a tokenizer: one id per character, and every call is counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> TokenIds:
        self.asked.append(text)
        return tuple(range(1000, 1000 + len(text)))


def test_a_text_is_encoded_once() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 20)
    assert remembered("abc") == remembered("abc") == (1000, 1001, 1002)
    assert encode.asked == ["abc"]


def test_the_oldest_go_first_and_the_budget_holds() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 18)
    texts = [f"text number {i}" for i in range(1000)]
    for text in texts:
        remembered(text)
        remembered(texts[0])  # used again and again, so it stays
        assert remembered.num_bytes <= remembered.max_bytes
    assert 20 < len(remembered) < 1000
    encode.asked.clear()
    remembered(texts[0]), remembered(texts[-1])
    assert encode.asked == []
    remembered(texts[1])
    assert encode.asked == [texts[1]]


def test_a_long_text_is_not_kept_and_pushes_nothing_out() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 18)
    remembered("short")
    long = "x" * 20_000
    assert len(remembered(long)) == len(remembered(long)) == 20_000
    remembered("short")
    assert encode.asked == ["short", long, long]


def test_threads_may_ask_together() -> None:
    remembered = Remembered(Counting(), 1 << 18)
    texts = [f"text {i % 300}" for i in range(3000)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(remembered, texts)) == [Counting()(text) for text in texts]
    assert remembered.num_bytes <= remembered.max_bytes
