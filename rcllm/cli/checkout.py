"""What a checkout has beside the package, for demos: a tuned ranker, and a decoder of semantic IDs of films.

A wheel has neither. Knows nothing of what demos do with them.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parents[2]
RANKER, RANKER_TEMPLATE = _ROOT / "adapters" / "smollm2-135m-scored-blocks", "echo_scored"  # read-out pointwise
DECODER = _ROOT / "decoders" / "movielens"
