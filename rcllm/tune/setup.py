"""Makes a trainer from names and folders. Knows nothing of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from blake3 import blake3

from rcllm.config import Config, Hardware, ModelConfig, PromptConfig, resolve
from rcllm.data import Dataset
from rcllm.engine.build import load_tokenizer
from rcllm.engine.space import chosen_chat
from rcllm.model.adapter import adapter_fingerprint
from rcllm.model.pull import pull
from rcllm.model.weights import fingerprint, load_model
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.template import Template, chat_format
from rcllm.tune.config import TuneConfig, check_config
from rcllm.tune.examples import joined_catalogue, training_sets
from rcllm.tune.network import Network
from rcllm.tune.teacher import Teacher
from rcllm.tune.train import Trainer, warm_start

_MAX_POSITIONS = 4096


def make_trainer(
    model: ModelConfig,
    prompt: PromptConfig,
    datasets: Sequence[Dataset],
    config: TuneConfig,
    folder: Path,
    start: Path | None = None,
    teacher: Path | None = None,
    teacher_template: str = "",
) -> Trainer:
    """`start`: an adapter to begin at; `teacher`: one whose scores are learnt, on prompts of its own template.

    Raises ConfigError, DataError, ModelError, FetchError."""
    check_config(config)
    resolved = resolve(Config(model, prompt), Hardware(torch.cuda.is_available(), 0)).model
    template = Template.of(prompt)
    sources = [
        source
        for dataset in datasets
        for source in training_sets(dataset, config.examples, template.shown, template.shown_fresh)
    ]
    files = pull(model.path)
    spec, weights = load_model(files, torch.float32, resolved.device)
    catalogue = joined_catalogue(sources)
    tokenizer = load_tokenizer(prompt, files, spec)
    chat = chosen_chat(prompt, files, tokenizer)
    positions = min(spec.max_positions, resolved.max_positions, _MAX_POSITIONS)
    prompter = Prompter(
        template,
        chat_format(chat),
        tokenizer,
        catalogue,
        b"tune",  # keys only tell blocks apart here; nothing is stored under them
        positions,
        prompt.max_candidates,
        prompt.context,
    )
    network = Network(spec, weights, positions, config.rank, config.alpha, config.seed)
    if start is not None:
        warm_start(network, start)
    weights_of = fingerprint(files) + (adapter_fingerprint(start) if start else b"")
    return Trainer(
        network,
        prompter,
        sources,
        config,
        folder,
        model.path,
        start.name if start else "",
        blake3(weights_of).hexdigest()[:16],
        Teacher.of(teacher, model, catalogue, folder, teacher_template) if teacher else None,
    )
