"""What a simulation came to: one record per answer, and their summary. Knows nothing of how it ran.

Invariant: every request is in `answers` once, or counted in `num_unanswered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request and what became of it. Times in seconds since the simulation began."""

    number: int
    arrival_s: float
    answered_s: float
    queue_s: float  # from its arrival at the node that answered to the start of its pass
    node: int
    num_items: int
    num_hits: int  # items that its node held when it came
    num_reachable: int  # on the node that held most of them
    num_fetched: int
    num_tokens: int
    num_fresh: int
    num_built: int  # tokens of missing blocks
    retries: int

    @property
    def ttft_s(self) -> float:
        return self.answered_s - self.arrival_s


@dataclass(slots=True)
class Outcome:
    """Grows while the simulation runs."""

    answers: list[Answered] = field(default_factory=list)
    num_unanswered: int = 0  # no node was left that could answer
    end_s: float = 0.0
    num_events: int = 0
    evictions: int = 0
    num_updates: int = 0
    busy_s: Sequence[float] = ()  # by node

    def ttft(self, after_s: float = 0.0) -> FloatArray:
        """[answers] seconds, of requests that arrived from that time on, in the order of their answers."""
        return np.array([each.ttft_s for each in self.answers if each.arrival_s >= after_s])


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Times in milliseconds."""

    num_requests: int
    num_unanswered: int
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    queue_mean_ms: float
    hit_rate: float  # share of the candidates that the answering node held
    reachable: float  # share on the node that held most of them
    fetched: float  # share that came from another node
    computed_share: float  # computed tokens, missing blocks among them, of all tokens of the prompts
    utilisation: float  # mean over nodes
    busiest: float  # of the node that computed most
    evictions: int
    retries: int
    answers_per_s: float  # of simulated time

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(outcome: Outcome, after_s: float = 0.0) -> Summary:
    """Of the requests that arrived from `after_s` on, when caches are warm; use of nodes is that of the whole run."""
    answers = [each for each in outcome.answers if each.arrival_s >= after_s]
    assert answers or outcome.num_unanswered, "nothing was simulated"
    ttft = np.array([each.ttft_s for each in answers]) * 1e3
    items = sum(each.num_items for each in answers) or 1
    tokens = sum(each.num_tokens for each in answers) or 1
    p50, p90, p99 = np.percentile(ttft, (50, 90, 99)).tolist() if len(answers) else (float("nan"),) * 3
    end = outcome.end_s or 1.0
    return Summary(
        num_requests=len(answers),
        num_unanswered=outcome.num_unanswered,
        ttft_mean_ms=float(ttft.mean()) if len(answers) else float("nan"),
        ttft_p50_ms=p50,
        ttft_p90_ms=p90,
        ttft_p99_ms=p99,
        queue_mean_ms=sum(each.queue_s for each in answers) / max(1, len(answers)) * 1e3,
        hit_rate=sum(each.num_hits for each in answers) / items,
        reachable=sum(each.num_reachable for each in answers) / items,
        fetched=sum(each.num_fetched for each in answers) / items,
        computed_share=sum(each.num_fresh + each.num_built for each in answers) / tokens,
        utilisation=sum(outcome.busy_s) / end / max(1, len(outcome.busy_s)),
        busiest=max(outcome.busy_s, default=0.0) / end,
        evictions=outcome.evictions,
        retries=sum(each.retries for each in answers),
        answers_per_s=len(outcome.answers) / end,
    )
