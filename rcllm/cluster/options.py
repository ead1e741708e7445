"""What placements and made requests can be told: options of the command line, and the names of policies.

Imports nothing that computes, so that `--help` is quick. Invariant: the names are those of the tables of policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rcllm.annotated import Ge, Interval, Opt

Source = Literal["item_knn", "popularity", "uniform"]
Split = Literal["user", "time"]
_PANEL = "Requests made from --dataset"


PolicyName = Literal["learned", "spread", "halo", "metis", "hash", "random", "popularity"]


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """How requests are made."""

    source: Annotated[Source, Opt("Where candidates come from: it decides how local requests are.", panel=_PANEL)] = (
        "item_knn"
    )
    split: Annotated[Split, Opt("What is held out: a fifth of users, or the last fifth of time.", panel=_PANEL)] = (
        "user"
    )
    candidates: Annotated[int, Ge(1), Opt("Of a request.", panel=_PANEL)] = 20
    history: Annotated[int, Ge(1), Opt("Events of a user that candidates are found from.", panel=_PANEL)] = 10
    per_user: Annotated[
        int, Ge(1), Opt("Requests of each user in the past: before their last events.", panel=_PANEL)
    ] = 3
    time_share: Annotated[float, Interval(gt=0, lt=1), Opt("Share of time that is held out.", panel=_PANEL)] = 0.2
    seed: Annotated[int, Ge(0), Opt("Draws candidates, samples and parts.", panel=_PANEL)] = 0
