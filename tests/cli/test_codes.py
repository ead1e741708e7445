"""What `rcllm sid` says of codes and models: the figures, and what to try where they are no good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from rcllm.cli.codes import code_facts, code_warnings, comparison_table, levels_of, verdict
from rcllm.sid.config import CodeConfig
from rcllm.sid.held_out import Comparison, Worth
from rcllm.sid.quantise import Codes, fitting, quantise


def shown(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def of_clusters(num_items: int, config: CodeConfig | None = None) -> Codes:
    """Codes of vectors around eight centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 16))
    vectors = centres[rng.integers(8, size=num_items)] + 0.1 * rng.normal(size=(num_items, 16))
    return quantise(vectors.astype(np.float32), config or fitting(num_items, None, None))


def test_the_table_of_levels_counts_what_is_used() -> None:
    codes = of_clusters(200)
    lines = shown(levels_of(codes)).splitlines()
    rows = [line.split() for line in lines if line.strip()[:2] in ("a ", "b ", "c ")]
    assert len(rows) == len(codes.sizes)
    assert rows[0][1:4] == [str(codes.levels[0].used), "/", str(codes.sizes[0])]
    assert rows[0][4] == f"{200 / codes.levels[0].used:.1f}"
    assert float(rows[-1][-1].rstrip("%")) <= float(rows[0][-1].rstrip("%")), "every level explains more"


def test_codes_that_fit_are_praised_by_figures_alone() -> None:
    codes = of_clusters(200)
    assert code_warnings(codes) == []
    facts = code_facts(codes)
    assert f"{codes.items_per_first_code:.1f} items share one" in facts["alike"]
    assert codes.likeness.shared > codes.likeness.random + 0.2
    assert f"{codes.collisions} items shared a semantic ID" in facts["collisions"]


def test_codes_that_share_nothing_are_told() -> None:
    codes = of_clusters(40, CodeConfig(2, 64))
    (warning,) = code_warnings(codes)
    assert "64 codes at the first level for 40 items: hardly two items share one" in warning
    assert "Leave out --size" in warning


def test_a_catalogue_without_two_alike_says_so() -> None:
    vectors = np.eye(8, dtype=np.float32)
    codes = quantise(vectors, CodeConfig(2, 8))
    assert codes.levels[0].used == 8
    assert code_facts(codes)["alike"].startswith("no two items share their first code")


def test_items_with_one_text_are_told() -> None:
    vectors = np.zeros((60, 4), dtype=np.float32)
    vectors[:10] = np.random.default_rng(0).normal(size=(10, 4))
    told = code_warnings(quantise(vectors, CodeConfig(2, 16)))
    assert any("; 49 have the same text as another: embed more fields, or give --interactions" in text for text in told)


def test_codes_that_are_too_coarse_are_not_laid_on_equal_texts() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 32))
    noise = 0.01 * np.random.default_rng(1).normal(size=(400, 32))
    codes = quantise((np.repeat(vectors, 50, axis=0) + noise).astype(np.float32), CodeConfig(2, 22))
    assert codes.twins == 0
    (warning,) = code_warnings(codes)
    assert f"{codes.moved} of 400 items" in warning
    assert "too coarse for what tells items apart: give --interactions, or more --levels" in warning


WAYS = Comparison(
    num_users=1_200, num_left_out=3, model=Worth(0.2, 0.1), alone=Worth(0.18, 0.07), item_knn=Worth(0.15, 0.08),
    popularity=Worth(0.1, 0.05), guess=Worth(0.01, 0.005),
)  # fmt: skip


def test_the_model_stands_beside_what_costs_nothing() -> None:
    page = shown(comparison_table(WAYS, "test users"))
    title = "The next item of 1,200 test users, 3 left out whose last item was not new"
    assert title in " ".join(page.split())
    assert [line.split()[-2:] for line in page.splitlines() if "item-kNN" in line] == [["0.150", "0.080"]]
    assert [line.split()[-2:] for line in page.splitlines() if "its decoder alone" in line] == [["0.180", "0.070"]]
    assert "left out" not in shown(comparison_table(replace(WAYS, num_left_out=0), "test users"))


@pytest.mark.parametrize(("model", "beaten_by"), [(Worth(0.12, 0.06), "item-kNN"), (Worth(0.005, 0.001), "a guess")])
def test_a_model_that_loses_is_told_what_to_try(model: Worth, beaten_by: str) -> None:
    told = verdict(replace(WAYS, model=model), ["more --epochs", "more users"])
    assert told is not None
    assert beaten_by in told
    assert told.endswith("Try more --epochs; more users")


def test_a_model_that_wins_gets_no_advice() -> None:
    assert verdict(WAYS, ["more --epochs"]) is None
