"""Records from several processes: what is known is not asked for again, and results are those of one process."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator

import pytest

from rcllm.core.ranking import Level, RankOptions
from rcllm.fidelity.evaluate import evaluate
from rcllm.fidelity.records import RecordFile
from rcllm.fidelity.spread import Ahead, Done, Evaluating, Part
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_compute_thread")
OPTIONS = [RankOptions(level=Level.parse(level)) for level in ("blocks", "full")]
ASKED = [tiny.request(tuple((n * 3 + k) % 50 for k in range(4)), name=f"r{n}") for n in range(20)]


def test_parts_fill_the_file_with_what_one_process_finds() -> None:
    leading, other = tiny.fresh(items=tiny.catalogue()), Evaluating(tiny.fresh(items=tiny.catalogue()), ())
    parts: list[Part] = []

    def over(some: Iterable[Part]) -> Iterator[Done]:
        for part in some:
            parts.append(pickle.loads(pickle.dumps(part)))
            yield pickle.loads(pickle.dumps(other(parts[-1])))

    told: list[int] = []
    with RecordFile() as kept, RecordFile() as alone:
        evaluate(leading, ASKED[:8], OPTIONS[:1], kept)  # as before an interruption
        Ahead(over, kept).run(leading, ASKED, OPTIONS, told.append)
        assert [(len(part.requests), len(part.options)) for part in parts] == [(8, 1), (8, 2), (4, 2)]
        assert sum(told) == 8 + 16 + 8
        found = kept.all()
        passes = leading.costs.num_passes
        evaluate(leading, ASKED, OPTIONS, kept)
        assert leading.costs.num_passes == passes, "nothing is left to compute"
        expected = evaluate(leading, ASKED, OPTIONS, alone)
        assert alone.all().keys() == found.keys()
        for key, record in alone.all().items():
            assert found[key].scores == pytest.approx(record.scores, abs=1e-4)
        assert sum(map(len, expected.values())) == len(found)
