"""Other engines on the same model and cores, in processes of their own: how long they take to answer a prompt's ids.

OpenVINO GenAI: by the interpreter that `RCLLM_OPENVINO_PYTHON` names, which has `openvino-genai`. llama.cpp: the
program that `RCLLM_LLAMA_SERVER` names. Each reads a GGUF of SmolLM2, `RCLLM_OPENVINO_MODEL` and `RCLLM_LLAMA_MODEL`,
and computes in its own choice of precisions. What is not named is left out. The half that runs in OpenVINO's
interpreter imports nothing but the standard library and OpenVINO.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

LLAMA_DRAFTS: tuple[str, ...] = ("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "6")
LLAMA_DRAFTS += ("--spec-ngram-mod-n-min", "3", "--spec-ngram-mod-n-max", "16")  # its defaults suit answers of 1,000s
LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}
START_S = 60.0


class Took(NamedTuple):
    """Of one answer, without its first token, which the prompt's pass gives."""

    seconds: float
    tokens: int


Peer = Callable[[Sequence[int], int], Took]  # token ids of a prompt, and tokens of the answer


@contextlib.contextmanager
def openvino(eos_ids: Sequence[int], *, lookup: bool) -> Iterator[Peer | None]:
    """`lookup`: with drafts from the prompt, the only ones that it has without a second model."""
    python, model = (os.environ.get(f"RCLLM_OPENVINO_{name}", "") for name in ("PYTHON", "MODEL"))
    if not (python and model):
        yield None
        return
    command = [python, __file__, model, "lookup" if lookup else "plain", json.dumps(eos_ids)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        to, back = process.stdin, process.stdout
        assert to is not None
        assert back is not None

        def answer(prompt: Sequence[int], num_tokens: int) -> Took:
            print(json.dumps([list(prompt), num_tokens]), file=to, flush=True)
            return Took(*json.loads(back.readline()))

        try:
            if back.readline() != "ready\n":
                raise RuntimeError(f"{python} did not load {model} into OpenVINO GenAI")
            yield answer
        finally:
            process.kill()


@contextlib.contextmanager
def llama(*, learned: Sequence[Sequence[int]] | None) -> Iterator[Peer | None]:
    """`learned`: token ids of earlier prompts with their answers, which its drafts are taken from; None: plain."""
    program, model = (os.environ.get(f"RCLLM_LLAMA_{name}", "") for name in ("SERVER", "MODEL"))
    if not (program and model):
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "-m", model, "-t", "2", "-c", "4096", "-np", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += LLAMA_DRAFTS if learned is not None else ()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process)
            for ids in learned or ():
                _completion(port, ids, 1)
            yield lambda prompt, num_tokens: _took(_completion(port, prompt, num_tokens))
        finally:
            process.kill()


def _took(found: dict[str, Any]) -> Took:
    timings = found["timings"]  # predicted_ms counts from when the first token was there
    return Took(timings["predicted_ms"] / 1e3, timings["predicted_n"] - 1)


def _completion(port: int, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    asked = {"prompt": list(prompt), "n_predict": num_tokens, "temperature": 0.0}
    body = json.dumps({**asked, "cache_prompt": False}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        found: dict[str, Any] = json.load(response)
    return found


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} did not start within {START_S:.0f} s")


def _main() -> None:
    genai, tensors, numpy = map(importlib.import_module, ("openvino_genai", "openvino", "numpy"))
    lookup = sys.argv[2] == "lookup"
    pipeline = genai.LLMPipeline(sys.argv[1], "CPU", **({"prompt_lookup": True} if lookup else {}))
    config = genai.GenerationConfig(do_sample=False, **(LOOKUP if lookup else {}))
    config.stop_token_ids = set(json.loads(sys.argv[3]))  # it finds none in a GGUF
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, config.max_new_tokens = json.loads(line)
        metrics = pipeline.generate(tensors.Tensor(numpy.array([prompt])), config).perf_metrics
        seconds = (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1e3
        print(json.dumps([seconds, metrics.get_num_generated_tokens() - 1]), flush=True)


if __name__ == "__main__":
    _main()
