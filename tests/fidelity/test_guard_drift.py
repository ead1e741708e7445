"""Real drift on tiny engines: the guard trips within a stated number of shadowed requests, and never on clean ones.

Every served answer is shadowed at once, without a thread. α = 0.001, target τ ≥ 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.fidelity.guard import Guard
from rcllm.fidelity.monitor import GuardPolicy, rank_loss
from rcllm.fidelity.sequential import e_values
from rcllm.fidelity.shadow import GuardCore, Shadowing
from rcllm.store.owners import one_name
from tests.engine import tiny

CLEAN = 10_000
EXACT = 0.005  # mean loss where only rounding can exchange two candidates; one exchanged pair of eight loses 0.036
HOT = 7  # an item that every request asks for

# reuse is exact under the mask of isolated items before the user's own chain
ISOLATED = RankOptions(Level("blocks"), layout="items_first", parallel=True, history="chain")
# reuse of shared events is approximate: clean losses have a mean of about 0.03, over half the target
APPROXIMATE = RankOptions(Level("linked", 4), readout="likelihood", history="shared")


def requests(options: RankOptions, seed: int) -> Iterator[RankRequest]:
    """Random candidates, HOT among them, and random histories, for ever."""
    draw = np.random.default_rng(seed)
    while True:
        others = [int(i) for i in draw.permutation(58) if i != HOT]
        candidates = [*others[:7]]
        candidates.insert(int(draw.integers(8)), HOT)
        asked = tiny.request(tuple(candidates), tuple(others[10:14]), user=None)
        yield replace(asked, options=options)


@dataclass
class Served:
    """A guarded service without a thread, whose engine can be exchanged."""

    engine: Engine
    options: RankOptions
    seed: int = 0
    ladder: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        keywords: dict[str, Any] = {"idle": lambda: True, "clock": lambda: 0.0, "wall_clock": lambda: 0.0}
        keywords |= {"sleep": lambda seconds: None, "on_event": lambda event: None, "seed": self.seed}
        policy = GuardPolicy(self.ladder or (self.options.level, Level("exact")))
        shadowing = Shadowing(share=1.0, cpu_share=1.0)
        self.guard = GuardCore(self.rank, policy, shadowing, defaults=self.options, **keywords)
        self._requests = requests(self.options, self.seed)

    def rank(self, request: RankRequest) -> RankResponse:
        return self.engine.rank(request)

    def serve(self, most: int, num_steps: int = 1) -> int | None:
        """Serves until the guard has stepped so often; after how many requests, None if not within `most`."""
        for i in range(most):
            asked = next(self._requests)
            asked = replace(asked, options=replace(self.options, level=self.guard.level(self.options)))
            if shadow := self.guard.sample(asked, self.engine.rank(asked)):
                self.guard.run(shadow)
            if len(self.guard.events) >= num_steps:
                return i + 1
        return None

    def pass_clean_samples(self) -> None:
        """10,000 more losses as this engine's own 100 clean requests have shown them, in random order."""
        (monitor,) = self.guard._monitors.values()
        recorded = clean_losses(self.engine, self.options)
        for i in np.random.default_rng(self.seed).integers(len(recorded), size=CLEAN):
            assert monitor.observe(recorded[i], None, 0.0) is None


def clean_losses(engine: Engine, options: RankOptions, count: int = 100) -> list[float]:
    found = []
    for asked, _ in zip(requests(options, seed=99), range(count), strict=False):
        full = engine.rank(replace(asked, options=replace(options, level=Level("full"))))
        loss = rank_loss(full.scores, engine.rank(asked).scores)
        assert loss is not None
        found.append(loss)
    return found


def add_noise_to_values(engine: Engine, owner: str | None, deviations: float = 5.0) -> int:
    """Corrupts V in every layer of the published blocks of `owner` (None: the instruction); returns how many."""
    generator = torch.Generator().manual_seed(0)
    blocks = [block for block in engine.pool._blocks.values() if block.owner == one_name(owner)]
    for block in blocks:
        values = block.kv[:, 1]  # [layers, kv_heads, tokens, head_dim]
        values += torch.randn(values.shape, generator=generator) * values.std() * deviations
    return len(blocks)


def swap_template(path: Path) -> Engine:
    """The same model behind a template that writes events with all their fields, most of them reused."""
    short, long = (
        'event = ["\\n- {title}"]',
        'event = ["\\n- {title}", " | {brand}", " | {categories}", " | {description}"]',
    )
    changed = tiny.TEMPLATE.replace(short, long).replace("max_event_tokens = 24", "max_event_tokens = 60")
    assert long in changed
    path.write_text(changed, encoding="utf-8")
    return tiny.build(template=str(path))


@pytest.mark.parametrize("options", [ISOLATED, APPROXIMATE], ids=["isolated", "approximate"])
def test_no_false_alarm_in_ten_thousand_clean_samples(engine: Engine, options: RankOptions) -> None:
    recorded = clean_losses(engine, options)
    assert np.mean(recorded) < 0.04
    assert (options is ISOLATED) == (np.mean(recorded) < EXACT)
    policy = GuardPolicy((options.level,))
    streams = np.random.default_rng(0).choice(recorded, size=(50, CLEAN))
    assert e_values(streams, policy.target, "above").max() < 1 / policy.alpha


Inject = Callable[[Served, Path], None]


def corrupt_hot_item(served: Served, _: Path) -> None:
    assert add_noise_to_values(served.engine, f"item:{tiny.IDS[HOT]}") == 1


def corrupt_instruction(served: Served, _: Path) -> None:
    assert add_noise_to_values(served.engine, None) == 1


def exchange_template(served: Served, path: Path) -> None:
    served.engine = swap_template(path)


@pytest.mark.parametrize(
    ("options", "inject", "early", "late"),
    [
        pytest.param(ISOLATED, corrupt_hot_item, 20, 30, id="one-item-of-eight"),
        pytest.param(ISOLATED, corrupt_instruction, 15, 25, id="instruction"),
        pytest.param(APPROXIMATE, exchange_template, 80, 120, id="template"),
    ],
)
@pytest.mark.parametrize("after_clean", [False, True], ids=["early", "after-10000"])
@pytest.mark.parametrize("seed", range(2))
def test_drift_trips_within(
    engine: Engine,
    tmp_path: Path,
    options: RankOptions,
    inject: Inject,
    early: int,
    late: int,
    after_clean: bool,
    seed: int,
) -> None:
    """`early`: shadowed requests to the trip after 20 clean ones; `late`: after 10,020."""
    served = Served(engine, options, seed)
    assert served.serve(20) is None
    if after_clean:
        served.pass_clean_samples()
    inject(served, tmp_path / "other.toml")
    most = late if after_clean else early
    assert served.serve(most) is not None, f"no trip within {most} samples: {served.guard.stats()}"
    (event,) = served.guard.events
    assert (event.kind, event.to_level) == ("trip", "exact")
    assert event.recent_loss > max(0.05, event.mean_loss)  # of the clean ones before as well
    assert served.guard.level(options) == Level("exact")


def test_a_model_tuned_for_blocks_is_guarded_too(one_compute_thread: None) -> None:
    """Under the mask `blocks` the level `blocks` is exact, and full recompute reads no block that is cached."""
    served = Served(tiny.build(mask="blocks"), RankOptions(Level("blocks")))
    assert served.serve(100) is None
    assert add_noise_to_values(served.engine, f"item:{tiny.IDS[HOT]}") >= 1
    assert served.serve(30) is not None


def test_the_last_rung_is_full_where_the_prefix_itself_is_spoilt(engine: Engine) -> None:
    """`exact` reads the instruction's block too, so it trips in its turn."""
    served = Served(engine, ISOLATED, ladder=(Level("blocks"), Level("exact"), Level("full")))
    served.serve(20)
    corrupt_instruction(served, Path())
    for num_steps in (1, 2):
        assert served.serve(15, num_steps) is not None
    assert [event.to_level for event in served.guard.events] == ["exact", "full"]
    assert served.serve(100, 3) is None


def test_exact_serves_what_drift_spoilt(engine: Engine) -> None:
    """After the trip the answers are those of full recompute again: a corrupt item block is no longer read."""
    served = Served(engine, ISOLATED)
    served.serve(20)
    add_noise_to_values(engine, f"item:{tiny.IDS[HOT]}")
    assert served.serve(60) is not None
    after = replace(ISOLATED, level=served.guard.level(ISOLATED))
    assert np.mean(clean_losses(engine, after, 20)) < EXACT


def test_the_thread_trips_on_a_real_engine(engine: Engine) -> None:
    """Serving and shadowing at the same time, from two threads, until the guard steps."""
    asked = requests(ISOLATED, seed=4)
    engine.rank(next(asked))
    with Guard(engine.rank, GuardPolicy((Level("blocks"), Level("exact"))), Shadowing(1.0, 1.0)) as guard:
        add_noise_to_values(engine, None)
        while not guard.events:
            request = next(asked)
            options = replace(ISOLATED, level=guard.level(ISOLATED))
            request = replace(request, options=options)
            guard.observe(request, engine.rank(request))
    assert guard.events[0].kind == "trip"
    assert guard.events[0].num_samples <= 15
