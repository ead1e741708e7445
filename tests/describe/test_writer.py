"""Profiles are answered by a real (tiny) model: what is strict is what is plain, and private text stays private."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.core.decoding import Speculation
from rcllm.core.ranking import Event, ItemId
from rcllm.describe.estimate import cost_per_million, estimate
from rcllm.describe.job import Answer, describe, row_seed
from rcllm.describe.options import DescribeOptions
from rcllm.describe.profiles import Profile, Reject
from rcllm.describe.writer import GeneratorWriter, make_router, provenance_of, to_route
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError
from tests.engine import tiny

PLAIN = DescribeOptions(max_tokens=16, batch=4, speculation=Speculation("none"))
STRICT = replace(PLAIN, speculation=Speculation("strict"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny.build(tiny.NATIVE, template="describe_user")


def _profiles(count: int, first: int = 0) -> list[Profile]:
    return [
        Profile(n + 1, f"u{n}", tuple(Event(ItemId(f"i{(n * 3 + step) % 50}")) for step in range(1 + n % 3)))
        for n in range(first, first + count)
    ]


def _write(writer: GeneratorWriter, profiles: Sequence[Profile]) -> list[Answer]:
    found = dict(writer.write(profiles, [row_seed(0, profile.name) for profile in profiles]))
    return [found[place] for place in range(len(profiles))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_strict_answers_are_plain_answers(engine: Engine, temperature: float) -> None:
    options = replace(PLAIN, temperature=temperature)
    plain = _write(GeneratorWriter(engine, options), _profiles(9))
    writer = GeneratorWriter(engine, replace(options, speculation=Speculation("strict")))
    for _ in range(2):  # the second time, the pool holds the very answers
        strict = _write(writer, _profiles(9))
        assert [each.text for each in strict] == [each.text for each in plain]
        assert [each.num_tokens for each in strict] == [each.num_tokens for each in plain]
        assert all(each.num_divergences == 0 for each in strict)
    assert all(each.num_passes == each.num_tokens for each in plain)
    assert all(each.finish_reason in ("length", "eos") for each in plain)
    assert plain[0].num_prompt_tokens == writer.num_prompt_tokens(_profiles(1)[0])


@pytest.mark.parametrize("share", [True, False])
def test_text_drafts_for_others_only_where_it_is_shared(engine: Engine, share: bool) -> None:
    """Two users with one history: the second one's answer is the first one's."""
    first, twin = _profiles(1)[0], replace(_profiles(1)[0], row=2, name="twin")
    writer = GeneratorWriter(engine, replace(STRICT, batch=1, share_text=share))
    _write(writer, [first])
    assert writer.pools is not None
    prompt = writer.prompt_ids(twin)
    route = to_route(twin, "user", engine.prompter.catalogue)
    drafted = writer.pools.drafter_for(route, prompt, private=not share).draft(prompt, 64)
    alone = GeneratorWriter(engine, PLAIN)
    (plain,) = alone.generator.generate(alone.requests([first], [0]))
    assert (plain.token_ids[0] in drafted.token_ids.tolist()) == share


def test_pools_of_shared_text_are_refused_where_nothing_is_shared(engine: Engine, tmp_path: Path) -> None:
    GeneratorWriter(engine, STRICT).save(tmp_path / "pools")
    with pytest.raises(ConfigError, match="draft for all, this job's are for their own users alone"):
        GeneratorWriter(engine, replace(STRICT, share_text=False)).load(tmp_path / "pools")


def test_users_of_a_group_share_a_pool(engine: Engine) -> None:
    profiles = _profiles(30)
    router = make_router(profiles, engine.prompter.catalogue, num_groups=3, seed=0)
    assert sum(name.startswith("user") for name in router.groups) == 3
    writer = GeneratorWriter(engine, STRICT, router)
    plain = _write(GeneratorWriter(engine, PLAIN), profiles)
    assert [each.text for each in _write(writer, profiles)] == [each.text for each in plain]
    assert writer.pools is not None
    sizes = {name: writer.pools.pool(name).num_tokens for name in router.groups}
    assert sum(size > 0 for size in sizes.values()) > 1


def test_pools_are_saved_and_go_on(engine: Engine, tmp_path: Path) -> None:
    options = replace(PLAIN, speculation=Speculation("relaxed", 2, 0.0))
    first = GeneratorWriter(engine, options)
    _write(first, _profiles(4))
    first.save(tmp_path / "pools")
    second = GeneratorWriter(engine, options)
    second.load(tmp_path / "pools")
    assert first.pools is not None
    assert second.pools is not None
    assert second.pools.pool("user-0").num_tokens == first.pools.pool("user-0").num_tokens > 4 * 16


def test_the_job_on_a_model(engine: Engine, tmp_path: Path) -> None:
    profiles = _profiles(7)
    options = replace(PLAIN, checkpoint_every=3, speculation=Speculation("strict"))
    writer = GeneratorWriter(engine, options)
    report = describe(lambda after: profiles[after:], writer, options, tmp_path / "k.parquet", provenance_of(engine))
    assert (report.done.num_profiles, report.done.num_parts) == (7, 3)
    assert provenance_of(engine).template.startswith("describe_user v1 ")


def test_an_item_without_a_user(engine: Engine) -> None:
    writer = GeneratorWriter(engine, replace(PLAIN, kind="item", speculation=Speculation("strict")))
    answers = _write(
        writer, [Profile(1, "lamp", (Event(text="a red lamp"),)), Profile(2, "rug", (Event(text="a rug"),))]
    )
    assert len(answers) == 2


def test_estimate_counts_all_rows_and_writes_a_few(engine: Engine) -> None:
    rows: list[Profile | Reject] = [*_profiles(30), Reject(31, None, "expected sense")]
    writer = GeneratorWriter(engine, replace(PLAIN, batch=2))
    ticks = iter([0.0, 8.0])
    found = estimate(rows, writer, replace(PLAIN, batch=2), clock=lambda: next(ticks))
    assert (found.num_profiles, found.num_rejects, found.num_counted) == (30, 1, 30)
    assert found.prompt_tokens == sum(writer.num_prompt_tokens(profile) for profile in _profiles(30))
    assert found.rate.num_profiles == 4  # two batches after one that does not count
    assert found.seconds == 30 * 8.0 / 4
    assert found.first_reject == rows[-1]
    assert cost_per_million(2.0, price_per_hour=0.9) == pytest.approx(500.0)
