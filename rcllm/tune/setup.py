"""Makes a trainer from names and folders. Knows nothing of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from blake3 import blake3

from rcllm.config import Config, Hardware, ModelConfig, PromptConfig, resolve
from rcllm.core.ranking import RankRequest
from rcllm.data import Dataset
from rcllm.engine.build import load_tokenizer
from rcllm.engine.space import chosen_chat
from rcllm.errors import ConfigError
from rcllm.model.adapter import adapter_fingerprint
from rcllm.model.pull import pull
from rcllm.model.weights import fingerprint, load_model
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.template import Template, chat_format
from rcllm.tune.config import TuneConfig, check_config
from rcllm.tune.examples import Source, joined_catalogue, training_sets
from rcllm.tune.logged import LoggedSet
from rcllm.tune.network import Network
from rcllm.tune.teacher import Teacher, template_of
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
    requests: Sequence[RankRequest] = (),
) -> Trainer:
    """`start`: an adapter to begin at; `teacher`: one whose scores are learnt, on prompts of its own template.

    `requests`: a log over the items of the one data set, instead of lists that are made of its interactions.
    Raises ConfigError, DataError, ModelError, FetchError.
    """
    check_config(config)
    resolved = resolve(Config(model, prompt), Hardware(torch.cuda.is_available(), 0)).model
    template = Template.of(prompt)
    templates = [template, *([template_of(teacher, teacher_template)] if teacher else [])]
    sources = _sources(datasets, config, templates, requests, taught=teacher is not None)
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


def _sources(
    datasets: Sequence[Dataset],
    config: TuneConfig,
    templates: Sequence[Template],
    requests: Sequence[RankRequest],
    *,
    taught: bool,
) -> list[Source]:
    """`templates`: the student's, and the teacher's; fields that either shows are made."""
    shown = {name for template in templates for name in template.shown}
    fresh = {name for template in templates for name in template.shown_fresh}
    if not requests:
        return [source for each in datasets for source in training_sets(each, config.examples, shown, fresh)]
    if len(datasets) != 1:
        raise ConfigError(f"a log of requests is over the items of one data set, got {len(datasets)}: give one")
    return [LoggedSet(datasets[0], requests, config.examples, shown, fresh, taught=taught)]
