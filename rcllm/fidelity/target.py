"""What `rcllm calibrate` tries where nothing else is asked for, and how close to full recompute is close enough.

Knows nothing of engines or files, and imports nothing that takes time, because the command line shows these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from rcllm.annotated import Ge, Interval, Opt
from rcllm.fields import check

if TYPE_CHECKING:
    from rcllm.fidelity.summary import Summary

Cost = Literal["ttft", "flops"]
LEVELS = ("blocks", "linked(4)", "tail(0.1)", "linked(16)", "tail(0.3)", "corrected(0.1, 0.1)", "corrected(0.3, 0.3)")
CONTEXTS = ("none", "bos", "instruction", "typical", "mean(4)")
_PANEL = "What is close enough"


@dataclass(frozen=True, slots=True)
class Target:
    """How close to full recompute is close enough, and what cheap means."""

    ndcg10_delta: Annotated[
        float,
        Opt(
            "The 95 % interval of NDCG@10 minus full recompute's must lie above it.",
            metavar="NUMBER",
            name="--ndcg-delta",
            panel=_PANEL,
        ),
    ] = -0.01
    tau: Annotated[float, Interval(ge=-1, le=1), Opt("Least mean Kendall τ.", metavar="NUMBER", panel=_PANEL)] = 0.9
    # `flops` also where times were not measured
    cost: Annotated[Cost, Opt("What `auto` minimises.", panel=_PANEL)] = "ttft"
    min_requests: Annotated[int, Ge(1)] = 30  # of each interval; with fewer, it says little

    def __post_init__(self) -> None:
        check(self)

    def failures(self, summary: Summary) -> tuple[str, ...]:
        """Why a configuration does not pass; empty where it does. What is not known does not pass."""
        delta, tau = summary.deltas["ndcg10"], summary.measures["tau"]
        failed, fewer = list[str](), f"fewer than {self.min_requests}"
        if delta.count < self.min_requests:
            failed.append(f"NDCG@10 is known for {delta.count} requests (that name a positive), {fewer}")
        elif not delta.low > self.ndcg10_delta:
            failed.append(f"NDCG@10 {delta.low:+.4f} at worst, not above {self.ndcg10_delta:+}")
        if tau.count < self.min_requests:
            failed.append(f"Kendall τ is known for {tau.count} requests, {fewer}")
        elif not tau.mean >= self.tau:
            failed.append(f"Kendall τ {tau.mean:.3f}, below {self.tau}")
        return tuple(failed)
