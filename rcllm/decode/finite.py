"""The one guard of everything that is read from a model: what is not a number is an error of the request it came for.

Never imports torch: whoever has a tensor says whether it is finite.
"""

from __future__ import annotations

from rcllm.errors import ModelError


def not_numbers() -> ModelError:
    """What a request is told whose rows gave NaN or infinity."""
    return ModelError(
        "the model gave scores that are not numbers (NaN or infinity): its weights are damaged, or too large for the "
        "data type that it computes in. Fetch the model again, or compute in fp32"
    )
