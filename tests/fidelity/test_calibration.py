"""What a calibration allows: passing rungs, `auto`, refusals, other models, the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.core.ranking import Level, RankOptions, Selection
from rcllm.errors import ConfigError, DataError, UncalibratedError
from rcllm.fidelity.calibration import Calibrated, Calibration, Rung, passing
from rcllm.fidelity.intervals import Interval
from rcllm.fidelity.measures import QUALITY
from rcllm.fidelity.records import Configuration
from rcllm.fidelity.summary import CLOSENESS, Summary, Timing
from rcllm.fidelity.target import Target
from rcllm.schedule.admission import Identity

IDENTITY = Identity("0a1b2c3d4e5f", "tok", "tem", "cha", "fp32", "fp16", "causal")
CONTEXT = "instruction"


def summary(delta: float, low: float, tau: float, *, ms: float | None = None, flops: float = 1e9) -> Summary:
    measures = {name: Interval(0.5, 0.4, 0.6, 100) for name in (*QUALITY, *CLOSENESS)}
    return Summary(
        num_requests=100,
        measures=measures | {"tau": Interval(tau, tau - 0.01, tau + 0.01, 100)},
        deltas={name: Interval(delta, low, 2 * delta - low, 100) for name in QUALITY},
        prompt_tokens=1000.0,
        fresh_tokens=50.0,
        flops=flops,
        flops_saved=0.9,
        timing=None if ms is None else Timing(10, ms, 10.0, math.nan),
    )


def known_for(found: Summary, ndcg: int, tau: int) -> Summary:
    """The same where only so many requests have a positive, and so many an order to agree on."""
    delta, agreed = replace(found.deltas["ndcg10"], count=ndcg), replace(found.measures["tau"], count=tau)
    return replace(found, deltas={**found.deltas, "ndcg10": delta}, measures={**found.measures, "tau": agreed})


def rung(level: str, found: Summary, context: str = CONTEXT, **options: object) -> Rung:
    asked = replace(RankOptions(level=Level.parse(level)), **options)  # type: ignore[arg-type]
    return Rung(Configuration.of(context, asked), found)


RUNGS = (
    rung("full", summary(0.0, 0.0, 1.0, ms=1000.0), context=""),
    rung("blocks", summary(-0.02, -0.03, 0.8, ms=50.0, flops=1e9)),
    rung("linked(4)", summary(-0.001, -0.004, 0.95, ms=90.0, flops=3e9)),
    rung("tail(0.1)", summary(-0.001, -0.004, 0.94, ms=80.0, flops=4e9)),
    rung("corrected(0.3, 0.3)", summary(0.0, -0.003, 0.97, ms=200.0), selection=Selection("two_pass")),
    rung("blocks", summary(0.0, 0.0, 1.0, ms=10.0), context="mean(4)"),
    rung("blocks", summary(0.0, 0.0, 1.0, ms=20.0), label_place="before"),
)
CALIBRATION = Calibration(IDENTITY, {"cpu": "x"}, "shop", 0, 100, RUNGS)


def calibrated(calibration: Calibration | None = CALIBRATION, **changed: object) -> Calibrated:
    return replace(Calibrated.of(calibration, IDENTITY, CONTEXT), **changed)  # type: ignore[arg-type]


def options(level: str, **changed: object) -> RankOptions:
    return replace(RankOptions(level=Level.parse(level)), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (summary(0.0, -0.0099, 0.9), ()),
        (summary(0.0, -0.0101, 0.9), ("NDCG@10 -0.0101 at worst",)),
        (summary(0.0, 0.0, 0.899), ("Kendall τ 0.899",)),
        (summary(-0.02, -0.03, 0.5), ("NDCG@10", "Kendall τ")),
        (summary(math.nan, math.nan, 1.0), ("NDCG@10 +nan",)),
        (summary(0.0, 0.0, math.nan), ("Kendall τ nan",)),
        (known_for(summary(0.0, 0.0, 1.0), 3, 100), ("NDCG@10 is known for 3 requests",)),
        (known_for(summary(0.0, 0.0, 1.0), 100, 29), ("Kendall τ is known for 29 requests, fewer than 30",)),
        (known_for(summary(0.0, 0.0, 1.0), 30, 30), ()),
    ],
)
def test_what_passes(found: Summary, why: tuple[str, ...]) -> None:
    failures = Target().failures(found)
    assert len(failures) == len(why)
    assert all(word in failure for word, failure in zip(why, failures, strict=True))


def test_a_target_must_mean_something() -> None:
    with pytest.raises(ConfigError, match="cost"):
        Target(cost="euros")  # type: ignore[arg-type]


def test_the_cheapest_is_by_time_or_by_flops() -> None:
    wanted = CALIBRATION.rungs_of(CONTEXT, options("auto"))
    assert [str(r.configuration.options.level) for r in passing(wanted, Target())][:2] == ["tail(0.1)", "linked(4)"]
    by_flops = passing(wanted, Target(cost="flops"))
    assert [str(r.configuration.options.level) for r in by_flops][-1] == "tail(0.1)"
    untimed = [replace(r, summary=replace(r.summary, timing=None)) for r in wanted]
    assert passing(untimed, Target()) == [replace(r, summary=replace(r.summary, timing=None)) for r in by_flops]


def test_auto_is_the_cheapest_that_passes_for_these_options_and_this_context() -> None:
    admitted = calibrated().admit(options("auto"))
    assert admitted.options == options("tail(0.1)")
    assert "tail(0.1)" in admitted.notes[0]
    assert "100 requests of shop" in admitted.notes[0]
    assert calibrated().admit(options("auto", label_place="before")).options.level == Level("blocks")
    assert calibrated(context="mean(4)").admit(options("auto")).options.level == Level("blocks")


def test_auto_takes_the_selection_that_was_measured() -> None:
    strict = calibrated(target=Target(tau=0.96))
    assert strict.admit(options("auto")).options == options("corrected(0.3, 0.3)", selection=Selection("two_pass"))


@pytest.mark.parametrize(
    ("admission", "asked", "why"),
    [
        (calibrated(None), options("auto"), "no calibration"),
        (calibrated(), options("auto", layout="items_first"), "nothing was calibrated for these options"),
        (calibrated(context="bos"), options("auto"), "this canonical context"),
        (calibrated(target=Target(tau=0.99)), options("auto"), "none of 4 calibrated levels passes"),
    ],
)
def test_auto_is_exact_where_nothing_passes(admission: Calibrated, asked: RankOptions, why: str) -> None:
    admitted = admission.admit(asked)
    assert admitted.options == replace(asked, level=Level("exact"))
    assert why in admitted.notes[0]


@pytest.mark.parametrize(
    ("admission", "level", "why"),
    [
        (calibrated(None), "blocks", "no calibration"),
        (calibrated(), "blocks", "does not pass: NDCG@10 -0.0300 at worst"),
        (calibrated(), "tail(0.2)", "measured there were blocks, linked(4), tail(0.1), corrected"),
        (calibrated(), "corrected(0.3, 0.3)", "by two_pass"),
    ],
)
def test_what_was_not_measured_or_does_not_pass_is_refused(admission: Calibrated, level: str, why: str) -> None:
    with pytest.raises(UncalibratedError) as caught:
        admission.admit(options(level))
    assert why in str(caught.value)
    assert "rcllm calibrate" in str(caught.value)
    assert "--allow-uncalibrated" in str(caught.value)
    assert replace(admission, allow_uncalibrated=True).admit(options(level)).options == options(level)


def test_what_one_semantic_pool_gave_says_nothing_of_another() -> None:
    semantic = rung("blocks", summary(0.0, 0.0, 1.0), history="semantic")
    found = replace(CALIBRATION, identity=replace(IDENTITY, semantic_pool="one"), rungs=(*RUNGS, semantic))
    asked = options("auto", history="semantic")
    for pool, level in (("one", "blocks"), ("two", "exact"), ("", "exact")):
        admission = Calibrated.of(found, replace(IDENTITY, semantic_pool=pool), CONTEXT)
        assert admission.admit(asked).options.level == Level(level)  # type: ignore[arg-type]
        assert admission.admit(options("auto")).options.level == Level("tail", 0.1)
    tuned = replace(IDENTITY, mask="blocks", semantic_pool="one")
    admission = Calibrated.of(replace(found, identity=tuned), tuned, CONTEXT)
    (cheaper,) = admission.cheaper(options("exact", history="semantic"))
    assert cheaper.options == options("blocks", history="semantic"), "approximate under the block mask as well"


def test_the_ladder_for_a_guard() -> None:
    assert list(map(str, calibrated().ladder(options("auto")))) == [
        "tail(0.1)",
        "linked(4)",
        "corrected(0.3, 0.3)",
        "exact",
    ]
    assert calibrated(None).ladder(options("auto")) == (Level("exact"),)


@pytest.mark.parametrize("level", ["full", "exact"])
def test_what_is_exact_is_always_admitted(level: str) -> None:
    assert calibrated(None).admit(options(level)).options == options(level)


def test_a_passing_level_is_admitted_with_its_figures() -> None:
    admitted = calibrated().admit(options("linked(4)"))
    assert admitted.options == options("linked(4)")
    assert "-0.0010 [-0.0040, +0.0020]" in admitted.notes[0]


@pytest.mark.parametrize("level", ["blocks", "tail(0.3)", "auto"])
def test_a_model_tuned_for_blocks_needs_no_calibration(level: str) -> None:
    tuned = replace(IDENTITY, mask="blocks")
    admitted = Calibrated.of(None, tuned, CONTEXT).admit(options(level))
    assert admitted.options == options("blocks" if level == "auto" else level)
    with pytest.raises(UncalibratedError):  # prototypes of other tokens are not what the mask was tuned for
        Calibrated.of(None, tuned, CONTEXT).admit(options("blocks", history="semantic"))


@pytest.mark.parametrize(("field", "value"), [("model", "999999999999"), ("template", "other"), ("kv_dtype", "fp32")])
def test_another_model_or_template_is_refused(field: str, value: str) -> None:
    other = replace(IDENTITY, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{field} {value} instead of"):
        Calibrated.of(CALIBRATION, other, CONTEXT)


def test_the_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "fidelity.json"
    whole = replace(CALIBRATION, recommended=RUNGS[3].configuration, notes=("left out",), target=Target(tau=0.8))
    whole.save(path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["identity"]["model"] == IDENTITY.model
    assert repr(Calibration.load(path)) == repr(whole), "NaN is not equal to itself, its text is"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "expected what `rcllm calibrate` writes"),
        ("{", "expected what"),
        ('{"version": 7}', "format version 7"),
        ('{"version": 1, "rungs": []}', "expected what"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "fidelity.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=why):
        Calibration.load(path)
    with pytest.raises(DataError, match="rcllm calibrate"):
        Calibration.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("asked", "cheaper"),
    [
        ("exact", ["corrected(0.3, 0.3)", "linked(4)", "tail(0.1)"]),
        ("full", ["corrected(0.3, 0.3)", "linked(4)", "tail(0.1)"]),
        ("linked(4)", ["tail(0.1)"]),
        ("tail(0.1)", []),
    ],
)
def test_what_may_save_time_passes_and_is_cheaper_the_dearest_first(asked: str, cheaper: list[str]) -> None:
    """`blocks` is the cheapest of all, was measured, and does not pass."""
    found = calibrated().cheaper(options(asked))
    assert [str(each.options.level) for each in found] == cheaper
    for each in found:
        assert calibrated().admit(each.options).options == each.options
        assert each.notes[0].startswith(f"level {each.options.level} instead of {asked}: NDCG@10")
    if cheaper and cheaper[0].startswith("corrected"):
        assert found[0].options.selection == Selection("two_pass"), "as it was measured"


def test_what_may_save_time_where_nothing_is_calibrated() -> None:
    assert calibrated(None).cheaper(options("exact")) == ()
    blocks = calibrated(None, identity=replace(IDENTITY, mask="blocks"))
    assert [each.options.level for each in blocks.cheaper(options("exact"))] == [Level("blocks")]
    assert blocks.cheaper(options("blocks")) == ()
    assert blocks.cheaper(options("exact", history="semantic")) == (), "prototypes are approximate under any mask"
