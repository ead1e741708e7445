"""A ranker that is there already teaches another one: its scores in place of labels.

They are computed by the engine that would serve it, once, and kept in a file, so that a killed training asks nothing
twice. Knows nothing of networks. Invariant: a score is that of the teacher's own prompt, in its own template, and is
found again only for the same teacher, prompt and request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import Catalogue
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError
from rcllm.fidelity.evaluate import evaluate
from rcllm.fidelity.records import RecordFile
from rcllm.model.adapter import adapter_record
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.template import Template

SCORES = "teacher.jsonl"  # in the training's folder
_POOL_MB = 1024


@dataclass(frozen=True, slots=True)
class Teacher:
    """Scores requests as the teacher does."""

    engine: Engine
    options: RankOptions
    kept: RecordFile

    @classmethod
    def of(cls, adapter: Path, model: ModelConfig, catalogue: Catalogue, folder: Path, template: str = "") -> Teacher:
        """`template`: see `template_of`. Scores are kept in `folder` while `kept` is open.

        Raises what `template_of` and `Engine.build` raise.
        """
        learnt = _learnt(adapter)
        prompt = PromptConfig(_name_of(adapter, template), context=learnt.context or "instruction")
        config = Config(replace(model, adapter=str(adapter), mask="auto"), prompt, CacheConfig(pool_mb=_POOL_MB))
        engine = Engine.build(catalogue, config)
        level = Level("blocks" if engine.config.model.mask == "blocks" else "exact")  # both are exact for their mask
        options = RankOptions(level, learnt.readout or "pointwise")  # type: ignore[arg-type]
        return cls(engine, options, RecordFile(folder / SCORES))

    @property
    def identity(self) -> str:
        """Changes with the teacher's weights, prompts and read-out."""
        identity = self.engine.identity
        return f"{self.engine.model_id} {identity.template} {self.options.readout}"

    def scores(self, requests: Sequence[RankRequest]) -> list[tuple[float, ...]]:
        """One tuple per request: a score for each candidate, in the order asked."""
        records = evaluate(self.engine, requests, [self.options], self.kept)[self.options]
        scores = [record.scores for record in records]
        if any(not math.isfinite(score) for each in scores for score in each):
            raise ConfigError(f"the teacher gives scores that are not numbers ({self.identity}): use another one")
        return scores


def template_of(adapter: Path, template: str = "") -> Template:
    """The teacher's template; "" takes that of its record. Raises ConfigError where neither names one."""
    return Template.load(_name_of(adapter, template))


def _name_of(adapter: Path, template: str) -> str:
    if name := template or _learnt(adapter).template:
        return name
    raise ConfigError(f"{adapter} does not say which template it was tuned with: give --teacher-template")


def _learnt(adapter: Path) -> Learnt:
    return Learnt.of(adapter_record(adapter), str(adapter))
