"""Rows of parquet files as plain Python values.

Knows nothing of items or users. Invariant: values do not depend on what else is installed (pyarrow turns nanoseconds
into types of pandas where that is there), and whatever pyarrow says of a file is a DataError or the Problem of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rcllm.data.raw import Problem, Row
from rcllm.data.text import shown
from rcllm.errors import DataError

_BATCH_ROWS = 4096


def parquet_rows(path: Path, note: Callable[[str], None]) -> Iterator[Row | Problem]:
    """The rows in order. Raises DataError, with the row where it is known, for a file that cannot be read on."""
    try:
        import pyarrow as pa  # noqa: PLC0415  the one place that needs it: an optional dependency
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; install it with: pip install 'rcllm[data]'") from error
    done = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in _rows(pa, batch, done):
                    done = row.line
                    yield row
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        place = f"{path}, after row {done:,}" if done else str(path)
        raise DataError(
            f"{place}: expected a parquet file, got: {shown(' '.join(str(error).split()))}; write or fetch it again"
        ) from error


def _check_names(path: Path, names: list[str]) -> None:
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path}: expected each column once, got {shown(twice[0])} twice; rename one")


def _rows(pa: Any, batch: Any, done: int) -> Iterator[Row | Problem]:
    columns = [_microseconds(pa, column) for column in batch.columns]
    names = batch.schema.names
    try:
        whole = [column.to_pylist() for column in columns]
    except (ValueError, OverflowError):  # a value that Python has no type for: look for it row by row
        for index in range(batch.num_rows):
            yield _row(pa, names, [column[index] for column in columns], done + index + 1)
        return
    for index, values in enumerate(zip(*whole, strict=True), done + 1):
        yield Row(index, dict(zip(names, values, strict=True)), "row")


def _row(pa: Any, names: list[str], scalars: list[Any], number: int) -> Row | Problem:
    fields: dict[str, object] = {}
    for name, scalar in zip(names, scalars, strict=True):
        try:
            fields[name] = _value(pa, scalar)
        except UnicodeDecodeError as error:
            return Problem(number, f"expected UTF-8 in {shown(name)}, got {error.reason}", "row")
        except (pa.ArrowException, ValueError, OverflowError) as error:
            return Problem(number, f"expected a value that Python can hold in {shown(name)}, got {error}", "row")
    return Row(number, fields, "row")


def _value(pa: Any, scalar: Any) -> object:
    """The Python value; times that Python's datetime cannot hold as text."""
    kind = scalar.type
    if scalar.is_valid and pa.types.is_struct(kind):
        return {kind.field(index).name: _value(pa, scalar[index]) for index in range(kind.num_fields)}
    if scalar.is_valid and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        return [_value(pa, each) for each in scalar.values]
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        return scalar.cast(pa.string()).as_py()


def _microseconds(pa: Any, column: Any) -> Any:
    """Nanoseconds as microseconds, the finest that Python's datetime holds, also inside lists and structs."""
    kind = _coarse(pa, column.type)
    return column if kind == column.type else column.cast(kind, safe=False)


def _coarse(pa: Any, kind: Any) -> Any:
    types = pa.types
    if types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if types.is_time64(kind):
        return pa.time64("us")
    if types.is_list(kind):
        return pa.list_(_coarse_field(pa, kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_coarse_field(pa, kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_coarse_field(pa, kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_coarse_field(pa, kind.field(index)) for index in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(_coarse_field(pa, kind.key_field), _coarse_field(pa, kind.item_field))
    return kind


def _coarse_field(pa: Any, field: Any) -> Any:
    return field.with_type(_coarse(pa, field.type))
