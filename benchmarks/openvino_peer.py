"""OpenVINO GenAI on the same model and cores, in a process of its own: seconds a token of plain decoding, when asked.

Run by the interpreter that `RCLLM_OPENVINO_PYTHON` names, on the model that `RCLLM_OPENVINO_MODEL` names. OpenVINO
2026.4 reads the GGUF of SmolLM2 itself, and computes in its own choice of precisions. This imports nothing of rcllm.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def openvino(prompt: str, num_tokens: int) -> Iterator[Callable[[], float] | None]:
    """A call that decodes so many tokens after the prompt and gives seconds a token; None where OpenVINO is missing."""
    model = os.environ.get("RCLLM_OPENVINO_MODEL", "")
    command = [os.environ.get("RCLLM_OPENVINO_PYTHON", sys.executable), __file__, model, str(num_tokens)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        to, back = process.stdin, process.stdout
        assert to is not None
        assert back is not None

        def decode() -> float:
            print(json.dumps(prompt), file=to, flush=True)
            return float(json.loads(back.readline()))

        try:
            yield decode if back.readline() == "ready\n" else None
        finally:
            process.kill()


def _main() -> None:
    if not sys.argv[1]:
        return
    try:
        genai = importlib.import_module("openvino_genai")
    except ImportError:
        return
    pipeline = genai.LLMPipeline(sys.argv[1], "CPU")
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = int(sys.argv[2]), True, False
    print("ready", flush=True)
    for line in sys.stdin:
        answer = pipeline.generate([json.loads(line)], config)
        print(answer.perf_metrics.get_tpot().mean / 1e3, flush=True)


if __name__ == "__main__":
    _main()
