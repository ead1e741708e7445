"""rcllm: serve language models that recommend, with KV reuse beyond the prefix.

    from rcllm import Catalogue, Config, Engine, Event, RankRequest

    catalogue, report = Catalogue.read("items.jsonl")
    engine = Engine.build(catalogue, Config())
    engine.warm()
    response = engine.rank(RankRequest("r1", candidates=(...), history=(Event("…"),)))

Importing this package imports no torch; the first use of `Engine` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rcllm.version import __version__ as __version__

if TYPE_CHECKING:
    from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
    from rcllm.core.decoding import Generated, GenerateOptions, GenerateRequest, RecommendRequest, RecommendResponse
    from rcllm.core.ranking import Event, Item, Level, RankOptions, RankRequest, RankResponse, Selection
    from rcllm.core.receipts import Receipt
    from rcllm.data import Catalogue, build_requests, load_dataset
    from rcllm.engine.engine import Engine
    from rcllm.engine.jobs.generate import Generator
    from rcllm.engine.jobs.recommend import Recommender
    from rcllm.errors import RcllmError
    from rcllm.fidelity.calibration import Calibrated, Calibration
    from rcllm.fidelity.guard import Guard
    from rcllm.fidelity.monitor import GuardPolicy
    from rcllm.fidelity.target import Target

_HOMES = {
    "rcllm.config": ("CacheConfig", "Config", "ModelConfig", "PromptConfig"),
    "rcllm.core.ranking": (
        "Event",
        "Item",
        "Level",
        "RankOptions",
        "RankRequest",
        "RankResponse",
        "Selection",
    ),
    "rcllm.core.receipts": ("Receipt",),
    "rcllm.data": ("Catalogue", "build_requests", "load_dataset"),
    "rcllm.core.decoding": ("GenerateOptions", "GenerateRequest", "Generated", "RecommendRequest", "RecommendResponse"),
    "rcllm.engine.engine": ("Engine",),
    "rcllm.engine.jobs.generate": ("Generator",),
    "rcllm.engine.jobs.recommend": ("Recommender",),
    "rcllm.errors": ("RcllmError",),
    "rcllm.fidelity.calibration": ("Calibrated", "Calibration"),
    "rcllm.fidelity.target": ("Target",),
    "rcllm.fidelity.guard": ("Guard",),
    "rcllm.fidelity.monitor": ("GuardPolicy",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CacheConfig",
    "Calibrated",
    "Calibration",
    "Catalogue",
    "Config",
    "Engine",
    "Event",
    "GenerateOptions",
    "GenerateRequest",
    "Generated",
    "Generator",
    "Guard",
    "GuardPolicy",
    "Item",
    "Level",
    "ModelConfig",
    "PromptConfig",
    "RankOptions",
    "RankRequest",
    "RankResponse",
    "RcllmError",
    "Receipt",
    "RecommendRequest",
    "RecommendResponse",
    "Recommender",
    "Selection",
    "Target",
    "build_requests",
    "load_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rcllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
