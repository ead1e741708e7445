"""Remembered texts: counted in bytes, the oldest go first, and one long text is not kept at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rcllm.prompt.remembered import Remembered, Written

LIMIT = 1 << 15  # of tokens


class Counting:
    """Stands in for a tokenizer: one id per character, and every call is counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str, max_tokens: int) -> Written:
        self.asked.append(text)
        return Written(tuple(range(1000, 1000 + min(len(text), max_tokens))), len(text) > max_tokens)


def test_a_text_is_encoded_once() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 20)
    assert remembered("abc", LIMIT) == remembered("abc", LIMIT) == Written((1000, 1001, 1002))
    assert encode.asked == ["abc"]
    assert remembered("abc", 2) == remembered("abc", 2) == Written((1000, 1001), cut=True)
    assert encode.asked == ["abc", "abc"], "once for each limit"


def test_the_oldest_go_first_and_the_budget_holds() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 19)
    texts = [f"text number {i}" for i in range(1000)]
    for text in texts:
        remembered(text, LIMIT)
        remembered(texts[0], LIMIT)  # used again and again, so it stays
        assert remembered.num_bytes <= remembered.max_bytes
    assert 20 < len(remembered) < 1000
    encode.asked.clear()
    remembered(texts[0], LIMIT), remembered(texts[-1], LIMIT)
    assert encode.asked == []
    remembered(texts[1], LIMIT)
    assert encode.asked == [texts[1]]


def test_a_long_text_is_not_kept_and_pushes_nothing_out() -> None:
    encode = Counting()
    remembered = Remembered(encode, 1 << 19)
    remembered("short", LIMIT)
    long = "x" * 20_000
    assert len(remembered(long, LIMIT).ids) == len(remembered(long, LIMIT).ids) == 20_000
    remembered("short", LIMIT)
    assert encode.asked == ["short", long, long]


def test_threads_may_ask_together() -> None:
    remembered = Remembered(Counting(), 1 << 19)
    texts = [f"text {i % 300}" for i in range(3000)]
    with ThreadPoolExecutor(4) as threads:
        written = list(threads.map(lambda text: remembered(text, LIMIT), texts))
    assert written == [Counting()(text, LIMIT) for text in texts]
    assert remembered.num_bytes <= remembered.max_bytes
