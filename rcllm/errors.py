"""Everything that rcllm raises at a user, in one tree.

    RcllmError
    ├── ConfigError              an option, file or value of the configuration is wrong
    │   └── UncalibratedError        a reuse level was asked for that no calibration allows
    ├── DataError                a data file is malformed (names file and line)
    ├── FetchError               a package or model could not be downloaded
    ├── ModelError               a model folder cannot be used
    │   └── UnsupportedModelError    the architecture, or a variant of it, is not implemented
    ├── StoreError               a tier of the store cannot be opened, read or written
    ├── AccessError              a request brings no key that fits
    │   ├── ForbiddenError           its key may ask, but not change what is served
    │   └── TenantError              its key may ask, but not for this tenant
    ├── ClosingError             the server is going down, and takes no more requests
    ├── RequestError             one request is wrong; the engine and other requests go on
    │   ├── UnknownItemError         a candidate or event names an item the catalogue lacks
    │   ├── NotServedError           it is fine, but nothing here answers such requests
    │   ├── PromptTooLongError       the prompt exceeds the model's context
    │   ├── TooLargeError            it has more bytes, items or tokens than the server takes
    │   └── CancelledError           the request was withdrawn before it was answered
    ├── CapacityError            the request is fine but does not fit the memory budget
    ├── ErasureError             blocks of a user or item may be left on a tier of the store
    ├── OverloadedError          the request is fine, but others are ahead of it: ask again in `retry_after_s`
    └── DeadlineError            the request cannot be answered by its deadline, or was not

Beside it three warnings: TextWarning, a model is asked with other text than it should be; ModelWarning, what fits and
is used may not have been made for each other; StoreWarning, a tier of the store failed and the others go on.

Messages say what was expected, what came, and what to do. `assert` is for our own mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Response = TypeVar("Response")


class RcllmError(Exception):
    """Base class of every error that a user of rcllm may want to catch."""

    field: str | None = None  # the value that is wrong, as whoever gave it names it, where one is


class ConfigError(RcllmError):
    """An option is unknown or has a value that cannot work."""


class UncalibratedError(ConfigError):
    """A reuse level has no passing calibration for this model, template and options."""


class DataError(RcllmError):
    """A data file is missing, malformed, or holds nothing usable."""


class FetchError(RcllmError):
    """A package or model could not be downloaded or failed its checksum."""


class ModelError(RcllmError):
    """A model folder or file is missing something, or its parts disagree."""


class UnsupportedModelError(ModelError):
    """The model is intact, but it is a variant that rcllm does not implement."""


class StoreError(RcllmError):
    """A tier below the pool cannot be opened, read or written. Whoever asks for a request goes on without it."""


class AccessError(RcllmError):
    """A request brings no key, or none that fits."""


class ForbiddenError(AccessError):
    """The key of a request may ask, but not change what is served."""


class TenantError(AccessError):
    """The key of a request may not name the tenant that it names."""


class ClosingError(RcllmError):
    """The server is going down."""


class RequestError(RcllmError):
    """A request is malformed. Nothing was computed and nothing was changed for it."""


class UnknownItemError(RequestError):
    """A request names an item that is not in the catalogue."""


class NotServedError(RequestError):
    """What is asked for is not served here, such as recommendations where no decoder is loaded."""


class TooLargeError(RequestError):
    """A request has more bytes, items or tokens than the server takes."""


class PromptTooLongError(RequestError):
    """The rendered prompt needs more positions than the model has."""


class CancelledError(RequestError):
    """A request was withdrawn before it was answered."""


class CapacityError(RcllmError):
    """The KV that one request needs at once is larger than the cache budget."""


class ErasureError(RcllmError):
    """A tier of the store failed while an owner was erased; what the others had is gone."""


class OverloadedError(RcllmError):
    """A request was not taken in, because too much waits already. Nothing was computed for it."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """retry_after_s: by estimate, when there will be room."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RcllmError):
    """A request has less time than any way of answering it takes, or its time was over before its turn came."""


def answered(outcomes: Iterable[Response | RcllmError]) -> list[Response]:
    """The responses of a batch, for callers that need them all. Raises the first error, where there is one."""
    responses = []
    for outcome in outcomes:
        if isinstance(outcome, RcllmError):
            raise outcome
        responses.append(outcome)
    return responses


class TextWarning(UserWarning):
    """Items lack what the template shows, or a ranker is asked otherwise than it was tuned; receipts say so as well."""


class ModelWarning(UserWarning):
    """The parts of a model fit, but their names say that they belong to different ones."""


class StoreWarning(UserWarning):
    """A tier of the store failed; requests are answered without it until it works again."""
