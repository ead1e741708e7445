"""What is said of semantic IDs and of the decoder that generates them: are they any good, and what to try if not.

Knows nothing of how codes are found or networks trained, and prints nothing. Invariant: every figure stands in what is
given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rcllm.sid.held_out import Comparison
from rcllm.sid.quantise import Codes, fitting_size

_SHARED = 2.0  # items per first-level code under which hardly anything is shared


def levels_of(codes: Codes) -> Table:
    """One row per level: how its codes are used, and what they leave unexplained."""
    table = Table(box=SIMPLE_HEAD, title="Levels", title_justify="left")
    for column in ("level", "codes used", "items per code", "entropy, bits", "of at most", "variance left"):
        table.add_column(column, justify="right")
    for level, (size, stats) in enumerate(zip(codes.sizes, codes.levels, strict=True)):
        each = len(codes.codes) / stats.used
        cells = (f"{each:.1f}", f"{stats.entropy_bits:.2f}", f"{math.log2(size):.2f}", f"{stats.error:.1%}")
        table.add_row(chr(ord("a") + level), f"{stats.used} / {size}", *cells)
    return table


def code_facts(codes: Codes) -> dict[str, str]:
    """Collisions, and how alike the items are that share a code."""
    near, any_two = codes.likeness.shared, codes.likeness.random
    alike = "no two items share their first code, so that nothing learnt of one helps another"
    if not math.isnan(near):
        alike = (
            f"items with the same first code have cosine {near:.2f}, two items at random {any_two:.2f}; "
            f"{codes.items_per_first_code:.1f} items share one"
        )
    return {
        "collisions": f"{codes.collisions:,} items shared a semantic ID; none does now, {codes.moved:,} moved",
        "alike": alike,
    }


def code_warnings(codes: Codes) -> list[str]:
    """What speaks against these codes, in words."""
    warnings = []
    if codes.items_per_first_code < _SHARED and codes.sizes[0] > fitting_size(len(codes.codes), len(codes.sizes)):
        warnings.append(
            f"{codes.sizes[0]} codes at the first level for {len(codes.codes):,} items: hardly two items share one "
            f"({codes.items_per_first_code:.1f} on average), so that a model learns little. Leave out --size and "
            "--levels, or make --size smaller"
        )
    if codes.moved > len(codes.codes) // 2:
        why = "the codes are too coarse for what tells items apart: give --interactions, or more --levels"
        if codes.twins > codes.moved // 2:
            why = f"{codes.twins:,} have the same text as another: embed more fields, or give --interactions"
        warnings.append(f"{codes.moved:,} of {len(codes.codes):,} items have codes that are not their nearest; {why}")
    return warnings


def comparison_table(found: Comparison, whom: str) -> Table:
    """The model and what it must beat, on the same users."""
    left_out = f", {found.num_left_out:,} left out whose last item was not new" if found.num_left_out else ""
    table = Table(box=SIMPLE_HEAD, title=f"The next item of {found.num_users:,} {whom}{left_out}", title_justify="left")
    table.add_column("")
    for column in ("recall@10", "NDCG@10"):
        table.add_column(column, justify="right")
    ways = {
        "the model": found.model,
        "its decoder alone": found.alone,
        "item-kNN": found.item_knn,
        "popularity": found.popularity,
        "a guess": found.guess,
    }
    for name, way in ways.items():
        table.add_row(name, f"{way.recall:.3f}", f"{way.ndcg:.3f}")
    return table


def verdict(found: Comparison, tries: Sequence[str]) -> str | None:
    """What to say of a model that is no better than what costs nothing; None where it is."""
    worse = found.worse_than()
    if not worse:
        return None
    return f"the model is no better than {worse[0]} on held-out users. Try {'; '.join(tries)}"
