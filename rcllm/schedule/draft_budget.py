"""How many drafted tokens a pass verifies: as many as raise the expected tokens per second, often none.

Knows nothing of models or of how drafts are made, and never imports torch. It has two running estimates: what a pass
costs at each number of rows, and how often a drafted token comes true where its drafter claims a probability.
Invariant: nothing is drafted that is not expected to pay, and looking for drafts that do not pay is limited to a small
share of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import IntArray
from rcllm.drafts.draft import DraftTree

FloatArray = npt.NDArray[np.float64]


class PassCosts:
    """Milliseconds of a pass by its number of rows: measured at some, interpolated between them.

    Passes that run anyway correct it, since contexts grow and machines get busy. A busy machine slows every pass, so
    that its load is kept apart from the shape, which alone decides what a draft costs.
    """

    def __init__(self, measured_ms: Mapping[int, float], shape_rate: float = 0.02, load_rate: float = 0.2) -> None:
        """shape_rate, load_rate: how far one pass moves the estimates."""
        assert len(measured_ms) >= 2
        self._load = 1.0
        self._rows = np.array(sorted(measured_ms), dtype=np.float64)
        self._ms = np.array([measured_ms[rows] for rows in sorted(measured_ms)], dtype=np.float64)
        self._shape_rate, self._load_rate = shape_rate, load_rate

    def ms(self, rows: npt.ArrayLike) -> FloatArray:
        """Of passes with so many rows. Beyond the last measured number: at its slope.

        Never falls with the number: more rows that are quicker show that the fewer ones were disturbed.
        """
        rising = np.minimum.accumulate(self._ms[::-1])[::-1]
        wanted = np.asarray(rows, dtype=np.float64)
        slope = (rising[-1] - rising[-2]) / (self._rows[-1] - self._rows[-2])
        beyond = np.maximum(wanted - self._rows[-1], 0.0) * slope
        return np.asarray((np.interp(wanted, self._rows, rising) + beyond) * self._load)

    def observe(self, rows: int, ms: float) -> None:
        """A pass of `rows` rows took `ms`. One that took far longer than expected says little of its row count."""
        ratio = min(max(ms / float(self.ms(rows)), 0.5), 2.0)
        self._load *= ratio**self._load_rate
        ratio = ratio ** (1.0 - self._load_rate)
        right = int(np.clip(np.searchsorted(self._rows, rows), 1, len(self._rows) - 1))
        low, high = self._rows[right - 1], self._rows[right]
        share = float(np.clip((rows - low) / (high - low), 0.0, 1.0))
        for place, weight in ((right - 1, 1.0 - share), (right, share)):
            self._ms[place] *= ratio ** (self._shape_rate * weight)


class ClaimRates:
    """How often drafted tokens come true after their parent did, by the probability that the drafter claims.

    Observed for every drafted token whose parent came true, whether a pass verified it or not. A claim that was seldom
    made before is believed as far as claims in general came true; at the very start, by half.
    """

    _EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95])

    def __init__(self, prior: float = 3.0, keep: float = 0.995) -> None:
        """prior: how many observations of a claim all others count for; keep: what each next one leaves of them."""
        self._prior, self._keep = prior, keep
        self._hits, self._counts = np.zeros(len(self._EDGES) + 1), np.zeros(len(self._EDGES) + 1)
        self._all_hits, self._all_claimed = 1.0, 2.0

    def given_parent(self, tree: DraftTree) -> FloatArray:
        """[n]: estimated probability of each node where its parent came true."""
        claimed = _claimed(tree)
        bins = np.searchsorted(self._EDGES, claimed)
        start = claimed * min(self._all_hits / self._all_claimed, 1.0)
        return np.asarray((self._hits[bins] + self._prior * start) / (self._counts[bins] + self._prior))

    def observe(self, claimed: float, came_true: bool) -> None:
        place = int(np.searchsorted(self._EDGES, claimed))
        self._hits[place] = self._hits[place] * self._keep + came_true
        self._counts[place] = self._counts[place] * self._keep + 1
        self._all_hits = self._all_hits * self._keep + came_true
        self._all_claimed = self._all_claimed * self._keep + claimed


class Trust:
    """How much better or worse one sequence's drafts come true than the calibration says."""

    def __init__(self, prior: float = 3.0, keep: float = 0.95) -> None:
        self._prior, self._keep = prior, keep
        self._hits = self._expected = 0.0

    @property
    def factor(self) -> float:
        return min(max((self._hits + self._prior) / (self._expected + self._prior), 0.1), 1.5)

    def observe(self, expected: float, came_true: bool) -> None:
        self._hits = self._hits * self._keep + came_true
        self._expected = self._expected * self._keep + expected


@dataclass(frozen=True, slots=True)
class Drafted:
    """A tree that was drafted for one sequence, and which of its nodes the next pass verifies."""

    tree: DraftTree
    given_parent: FloatArray  # [n], estimated
    nodes: IntArray  # indices, rising; with every node its parent


class DraftBudget:
    """Chooses the drafts of each pass of a batch, and learns from what comes of them."""

    def __init__(self, costs: PassCosts, *, idle_share: float = 0.01, margin: float = 0.05) -> None:
        """idle_share: of the time, for looking for drafts while they do not pay; margin: gain that is not worth it."""
        self.costs, self.calibration = costs, ClaimRates()
        self._idle_share, self._margin = idle_share, margin
        self._look_ms = 0.0  # of one step's look-ups, running mean
        self._saved_ms = float(costs.ms(1))  # by one step's look-ups, running mean; it starts in their favour
        self._credit_ms = 0.0

    @property
    def worth_looking(self) -> bool:
        """Whether this step looks for drafts: because they have paid, or because there is time to try."""
        return self._saved_ms >= self._look_ms or self._credit_ms >= self._look_ms

    def choose(
        self, trees: Sequence[DraftTree], trusts: Sequence[Trust], max_depths: Sequence[int], max_rows: int
    ) -> list[Drafted]:
        """The nodes, over all sequences of a batch, with which the pass decides most tokens per second.

        max_depths: per sequence, how deep its tree may be; max_rows: drafted ones, in all.
        """
        given = [
            np.minimum(self.calibration.given_parent(tree) * trust.factor, 1.0)
            for tree, trust in zip(trees, trusts, strict=True)
        ]
        chances = [_path_chances(*each) for each in zip(trees, given, max_depths, strict=True)]
        values = np.concatenate(chances)
        order = np.argsort(-values, kind="stable")[:max_rows]  # equal ones: parents come first
        taken = np.zeros(len(values), dtype=np.bool_)
        taken[order[: self._best_count(values[order], len(trees))]] = True
        parts = np.split(taken, np.cumsum([len(each) for each in chances])[:-1])
        return [
            Drafted(tree, parents, np.flatnonzero(part).astype(np.int32))
            for tree, parents, part in zip(trees, given, parts, strict=True)
        ]

    def _best_count(self, chances: FloatArray, num_sequences: int) -> int:
        """How many of the nodes, whose chances fall, to verify beside one row per sequence."""
        possible = int(np.count_nonzero(chances))
        if not possible:
            return 0
        tokens = num_sequences + np.concatenate([[0.0], np.cumsum(chances[:possible])])
        rates = tokens / self.costs.ms(np.arange(num_sequences, num_sequences + possible + 1))
        best = int(rates.argmax())
        return best if rates[best] > rates[0] * (1.0 + self._margin) else 0

    def observe_tree(self, drafted: Drafted, trust: Trust, decided: Sequence[int]) -> None:
        """What came after the root, as far as it is known: at least one token."""
        if not len(drafted.tree):
            return
        claimed = _claimed(drafted.tree).tolist()
        expected = drafted.given_parent.tolist()
        for node, came_true in _outcomes(drafted.tree, decided):
            self.calibration.observe(claimed[node], came_true)
            trust.observe(expected[node], came_true)

    def observe_pass(self, num_sequences: int, num_drafted: int, num_accepted: int, pass_ms: float) -> None:
        """One pass, in all, and what looking for its drafts was good for."""
        self.costs.observe(num_sequences + num_drafted, pass_ms)
        self._credit_ms = min(self._credit_ms + self._idle_share * pass_ms, 4 * self._look_ms + pass_ms)
        if num_drafted:
            plain_ms, with_ms = self.costs.ms([num_sequences, num_sequences + num_drafted]).tolist()
            self._saved(num_accepted * plain_ms / num_sequences - (with_ms - plain_ms))

    def observe_look(self, ms: float, num_chosen: int) -> None:
        """One step's look-ups, over all sequences, of which `num_chosen` tokens go into the pass."""
        paying = self._saved_ms >= self._look_ms
        self._look_ms = ms if not self._look_ms else 0.9 * self._look_ms + 0.1 * ms
        if not paying:
            self._credit_ms -= ms
        if not num_chosen:
            self._saved(0.0)

    def _saved(self, ms: float) -> None:
        self._saved_ms = 0.9 * self._saved_ms + 0.1 * ms


def _claimed(tree: DraftTree) -> FloatArray:
    """[n]: the drafter's probability of each node where its parent came true."""
    of_parent = np.concatenate([[1.0], tree.weights])[tree.parents]
    return np.asarray(np.minimum(tree.weights / of_parent, 1.0))


def _path_chances(tree: DraftTree, given_parent: FloatArray, max_depth: int) -> FloatArray:
    """[n]: probability that a node and all above it come true; 0 for nodes that are too deep."""
    chances, depths = [1.0], [0]
    for parent, given in zip(tree.parents.tolist(), given_parent.tolist(), strict=True):
        depths.append(depths[parent] + 1)
        chances.append(chances[parent] * given if depths[-1] <= max_depth else 0.0)
    return np.array(chances[1:])


def _outcomes(tree: DraftTree, decided: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """The nodes whose parent came true and whose place is decided, and whether they came true."""
    parents, tokens = tree.parents.tolist(), tree.token_ids.tolist()
    at = 0
    for token in decided:
        on_path = None
        for node in range(at, len(parents)):  # children come after their parents
            if parents[node] == at:
                yield node, tokens[node] == token
                if tokens[node] == token:
                    on_path = node + 1
        if on_path is None:
            return
        at = on_path
