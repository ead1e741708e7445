"""The clients that people have, unchanged, against a real server on a loopback port that computes with a tiny model.

What comes over HTTP equals what the Python API gives, to the bit.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import openai
import pytest
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_openai import ChatOpenAI

from rcllm.core.decoding import Generated, GenerateOptions
from rcllm.core.ranking import Event, ItemId, RankOptions, RankRequest
from rcllm.core.texts import TextRequest
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from tests.engine import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)


@pytest.fixture
def reference(one_compute_thread: None) -> Engine:
    """Another engine of the same model, that is asked in Python."""
    return tiny.fresh(items=tiny.catalogue())


@pytest.fixture
def chatting(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address: str, path: str, **body: Any) -> Any:
    reply = httpx.post(f"{address}{path}", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()


# ---- equal to Python, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["label", "pointwise", "likelihood"])
@pytest.mark.parametrize("level", ["exact", "blocks"])
def test_rankings_equal_those_of_python(address: str, reference: Engine, readout: str, level: str) -> None:
    body = {
        "candidates": [f"i{n}" for n in range(6)],
        "history": ["i30", "i31", {"text": "my own words"}],
        "user_id": "u1",
        "options": {"readout": readout, "level": level},
    }
    told = post(address, "/v1/rank", **body)
    wanted = reference.rank(tiny.request(6, (30, 31, "my own words"), readout=readout, level=level))
    assert told["scores"] == {wanted.candidates[i]: wanted.scores[i] for i in wanted.order}
    assert told["ranking"] == list(wanted.ranking)


def test_texts_equal_those_of_python(address: str, chatting: openai.OpenAI, reference: Engine) -> None:
    ids = reference.prompter.tokenizer.encode_opening("The old lamp")
    options = GenerateOptions(max_tokens=12, temperature=0.8, seed=7)
    (wanted,) = Generator(reference).generate([TextRequest("t", options=options, parts=(ids,))])
    assert isinstance(wanted, Generated)
    for prompt in ("The old lamp", list(ids)):
        told = chatting.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0.8, seed=7)
        assert told.choices[0].text == wanted.text
        assert told.usage is not None
        assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (len(ids), len(wanted.token_ids))


# ---- openai ---------------------------------------------------------------------------------------------------------


def test_openai_streams_what_it_answers_whole(chatting: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "blue kettle", "max_tokens": 16, "seed": 1, "n": 2}
    whole = chatting.completions.create(**asked)
    texts = ["", ""]
    for piece in chatting.completions.create(**asked, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_openai_chats(chatting: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A red lamp?"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    first = chatting.chat.completions.create(**asked)
    again = chatting.chat.completions.create(**asked)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].finish_reason in ("stop", "length")
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 0, "the system message is shared"
    pieces = list(chatting.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == first.choices[0].message.content
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == again.usage.completion_tokens


def test_openai_is_told_of_errors_as_by_openai(chatting: openai.OpenAI) -> None:
    assert [model.id for model in chatting.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as unknown:
        chatting.completions.create(model="gpt-4o", prompt="x")
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        chatting.completions.create(model="tiny", prompt=[5] * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logprobs is not served"):
        chatting.completions.create(model="tiny", prompt="x", logprobs=1)


def test_drafts_from_a_named_pool_change_no_text(address: str) -> None:
    asked: dict[str, Any] = {"prompt": "old lamp", "max_tokens": 24, "temperature": 0}
    plain = post(address, "/v1/completions", **asked)["choices"][0]["text"]
    for _ in range(3):
        drafted = post(address, "/v1/completions", **asked, pool="lamps", user="u1")
        assert drafted["choices"][0]["text"] == plain
    receipt = httpx.get(f"{address}/v1/receipts/{drafted['id'].removeprefix('cmpl-')}").json()["receipt"]
    assert receipt["accepted"] > 0, "earlier answers of the pool were drafted from"


# ---- cohere, langchain ----------------------------------------------------------------------------------------------

DOCUMENTS = ["a red lamp", "blue kettle", "old chair", "a red lamp"]


def reranked(reference: Engine) -> list[float]:
    """Relevances by Python, through the read-out that a model that was not tuned reranks with."""
    texts = {ItemId(text): {"title": text} for text in DOCUMENTS}
    options = RankOptions(readout="pointwise")
    answer = reference.rank(RankRequest("r", tuple(texts), (Event(text="red"),), texts=texts, options=options))
    scores = dict(zip(answer.candidates, answer.scores, strict=True))
    return [1 / (1 + 2.718281828459045 ** -scores[ItemId(text)]) for text in DOCUMENTS]


def test_cohere_reranks(address: str, reference: Engine) -> None:
    with httpx.Client() as http:
        client = cohere.ClientV2(api_key="none", base_url=address, httpx_client=http)
        told = client.rerank(model="tiny", query="red", documents=DOCUMENTS, top_n=3)
    wanted = reranked(reference)
    best = sorted(range(4), key=lambda i: -wanted[i])[:3]
    assert [result.index for result in told.results] == best
    assert [result.relevance_score for result in told.results] == pytest.approx([wanted[i] for i in best])


def test_cohere_first_version_reranks_objects(address: str) -> None:
    documents: Any = [{"text": "a red lamp"}, {"title": "kettle", "brand": "blue"}]
    with httpx.Client() as http:
        client = cohere.Client(api_key="none", base_url=address, httpx_client=http)
        told = client.rerank(model="tiny", query="red", documents=documents, return_documents=True)
    assert {result.index for result in told.results} == {0, 1}


def test_cohere_is_told_of_errors(address: str) -> None:
    with httpx.Client() as http:
        client = cohere.ClientV2(api_key="none", base_url=address, httpx_client=http)
        with pytest.raises(cohere.NotFoundError):
            client.rerank(model="rerank-v3.5", query="red", documents=["a"])


def test_langchain_reranks(address: str, reference: Engine) -> None:
    compressor = CohereRerank(model="tiny", base_url=address, cohere_api_key="none", top_n=2)  # type: ignore[arg-type]
    found = compressor.compress_documents([Document(page_content=text) for text in DOCUMENTS], "red")
    compressor.client._client_wrapper.httpx_client.httpx_client.close()
    wanted = reranked(reference)
    best = sorted(range(4), key=lambda i: -wanted[i])[:2]
    assert [document.page_content for document in found] == [DOCUMENTS[i] for i in best]
    assert found[0].metadata["relevance_score"] == pytest.approx(wanted[best[0]])


def test_langchain_chats(address: str, chatting: openai.OpenAI) -> None:
    with httpx.Client() as http:
        told, pieces = _chat_by_langchain(address, http)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A red lamp?"}]
    plain = chatting.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=8, temperature=0)
    assert told.content == plain.choices[0].message.content
    assert "".join(str(piece.content) for piece in pieces) == told.content


def _chat_by_langchain(address: str, http: httpx.Client) -> tuple[Any, list[Any]]:
    model = ChatOpenAI(
        model="tiny",
        base_url=f"{address}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,  # type: ignore[call-arg]
        max_retries=0,
        http_client=http,
    )
    turns = [("system", "Be brief."), ("human", "A red lamp?")]
    return model.invoke(turns), list(model.stream(turns))


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_sglang_scores(address: str, reference: Engine) -> None:
    """The probabilities of the label tokens as the very next token."""
    yes, no = (reference.prompter.tokenizer.encode(word)[0] for word in (" yes", " no"))
    body = {"query": "Is it red? ", "items": ["a red lamp", "a blue kettle"], "label_token_ids": [yes, no]}
    told = post(address, "/v1/score", **body, model="tiny")
    for item, row in zip(("a red lamp", "a blue kettle"), told["scores"], strict=True):
        encode = reference.prompter.tokenizer.encode_control
        ids = (*reference.prompter.tokenizer.encode_opening("Is it red? "), *encode(item))
        alone = post(address, "/v1/score", query=list(ids[:-1]), items=[[ids[-1]]], label_token_ids=[yes, no])
        assert row == pytest.approx(alone["scores"][0], rel=1e-4)
    among = post(address, "/v1/score", **body, apply_softmax=True)
    assert sum(among["scores"][0]) == pytest.approx(1.0)


def test_vllm_scores_are_relevances(address: str, reference: Engine) -> None:
    told = post(address, "/v1/score", model="tiny", text_1="red", text_2=DOCUMENTS)
    assert [each["score"] for each in told["data"]] == pytest.approx(reranked(reference))


# ---- a whole server -------------------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_is_not_computed_for(address: str, tiny_engine: Engine) -> None:
    begun = threading.Event()
    with (
        httpx.Client() as client,
        client.stream(
            "POST",
            f"{address}/v1/completions",
            json={"prompt": "red", "max_tokens": 1000, "stream": True, "temperature": 0},
        ) as reply,
    ):
        for _ in reply.iter_lines():
            begun.set()
            break
    assert begun.is_set()
    end = time.monotonic() + 10
    while tiny_engine.loop.tickets and time.monotonic() < end:
        time.sleep(0.01)
    assert not tiny_engine.loop.tickets


def test_a_replay_of_what_was_served_is_equal_to_the_bit(address: str) -> None:
    for path, body in (
        ("/v1/rank", {"candidates": ["i1", "i2", "i3"], "history": ["i4"], "options": {"level": "blocks"}}),
        ("/v1/completions", {"prompt": "old lamp", "max_tokens": 9}),
        ("/v1/score", {"query": "old", "items": ["lamp", "chair"], "label_token_ids": [9, 10]}),
    ):
        reply = httpx.post(f"{address}{path}", json=body, headers={"x-request-id": f"id{path.replace('/', '-')}"})
        told = post(address, f"/v1/replay/{reply.headers['x-request-id']}")
        assert told["same"] is True, told


def test_the_standard_library_is_enough(address: str) -> None:
    request = urllib.request.Request(
        f"{address}/v1/rank", json.dumps({"candidates": ["i1"]}).encode(), {"content-type": "text/plain"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert json.load(reply)["ranking"] == ["i1"]
