"""Logs as lines of JSON on stderr, by the standard library.

Knows nothing of what is logged. Invariant: a line holds the fields that the code names and no body, key, or text of a
user; one record is one line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from rcllm.plain_json import to_json

access = logging.getLogger("rcllm.access")
_FIELDS = "rcllm_fields"  # attribute of a record


class JsonLines(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= getattr(record, _FIELDS, {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return to_json(line)


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """All loggers of this process, uvicorn's too, write to `stream`, by default stderr."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True


def tell(fields: Mapping[str, object]) -> None:
    """One line for one request."""
    access.info("request", extra={_FIELDS: dict(fields)})
