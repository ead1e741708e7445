"""Catalogues of semantic IDs in files: LC-Rec and MiniOneRec `index.json`, FlashRec JSON, and tables of rows.

Knows nothing of how codes are found or who uses them. Invariant: what `write_codes` writes, `read_codes` reads back
as the same items with the same codes. A file that cannot be understood is an error that names the item or line.

    index     {"B00X": ["<a_12>", "<b_3>", "<c_7>"], …}
    flashrec  {"12,3,7": [{"pid": "B00X"}, …], …}; also {"12,3,7": 1}, [[12, 3, 7], …], and RecIF's packed keys
    rows      parquet, JSONL or CSV with item_id and either codes (a list, or tokens) or level_0, level_1, …
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcllm.codes.index import MAX_LEVELS, MIN_LEVELS, CodeIndex
from rcllm.codes.updates import Update
from rcllm.core.decoding import STYLE as STYLE
from rcllm.core.ranking import ItemId
from rcllm.data.content import read_text, suffix_of
from rcllm.data.files import iter_rows
from rcllm.data.raw import Fields, Problem
from rcllm.data.text import as_id, as_number, listed, shown
from rcllm.durable import renamed
from rcllm.errors import ConfigError, DataError
from rcllm.plain_json import to_json

_TOKEN = re.compile(r"<(?:\w+_)?([a-z])_(\d+)>")  # OpenOneRec puts an s_ before the level
_CODES_NAMES = ("codes", "sid", "semantic_id")  # columns that hold all codes of an item
_LEVEL_NAMES = ("level_{}", "code_{}", "sid_{}")  # columns that hold one
_ID_NAMES = ("pid", "iid", "item_id", "id")  # of the objects in a FlashRec file
_RECIF_BASE, _RECIF_LEVELS = 8192, 3  # of RecIF's packed keys: (a · 8192 + b) · 8192 + c
_MAX_CODE = 2**24 - 1  # more codes than any vocabulary has
_TRUE, _FALSE = ("", "true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")

Codes = tuple[int, ...]
Entry = tuple[ItemId, Codes]


def check_style(style: str) -> None:
    """Raises ConfigError for a style that `token` cannot write a code in."""
    rest = style.replace("{level}", "").replace("{code}", "")
    if "{code}" not in style or "{" in rest or "}" in rest:
        raise ConfigError(
            f"expected a style with {{code}}, and {{level}} where the vocabulary tells levels apart (a, b, …), but no "
            f"other braces, such as {STYLE!r}; got {style!r}"
        )


def token(level: int, code: int, style: str = STYLE) -> str:
    """How a code is written: code 12 of level 0 is <a_12>. `style`: see `check_style`."""
    return style.format(level=chr(ord("a") + level), code=code)


def parse_tokens(text: str) -> Codes:
    """The codes of `<a_12><b_3>…`, level after level. Raises ValueError."""
    found = [(match[1], int(match[2])) for match in _TOKEN.finditer(text)]
    if not found or _TOKEN.sub("", text).strip() or any(ord(name) - ord("a") != i for i, (name, _) in enumerate(found)):
        raise ValueError(f"expected a token for each level in order, such as <a_12><b_3>, got {shown(text)}")
    return tuple(code for _, code in found)


def read_codes(path: Path, sizes: Sequence[int] | None = None) -> CodeIndex:
    """Any of the layouts above, by suffix and content. Raises DataError.

    `sizes`: codes of each level; None: one more than the largest code that the file has.
    """
    enabled: dict[ItemId, bool] = {}
    entries = _json_entries(path) if suffix_of(path) == ".json" else _row_entries(path, enabled)
    items: dict[ItemId, Codes] = {}
    for item_id, codes in entries:
        if item_id in items:
            raise DataError(f"{path}: expected each item once, got item {shown(item_id)} twice; remove one of them")
        items[item_id] = codes
        _check_codes(path, item_id, codes, len(next(iter(items.values()))))
    if not items:
        raise DataError(f"{path}: expected items, got none; check that the file was written whole")
    rows = np.array(list(items.values()), np.int32)
    try:
        code_index = CodeIndex.build(rows, list(items), tuple(rows.max(axis=0) + 1) if sizes is None else sizes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return code_index.changed(Update(enabled=enabled)) if enabled else code_index


def _check_codes(path: Path, item_id: ItemId, codes: Codes, num_levels: int) -> None:
    """As many as the first item has, and such as can be."""
    if len(codes) != num_levels or not MIN_LEVELS <= num_levels <= MAX_LEVELS:
        expected = f"{num_levels} codes as the first item has" if len(codes) != num_levels else "2 to 6 codes"
        raise DataError(f"{path}, item {shown(item_id)}: expected {expected}, got {len(codes)}: {codes[:MAX_LEVELS]}")
    if min(codes) < 0 or max(codes) > _MAX_CODE:
        raise DataError(
            f"{path}, item {shown(item_id)}: expected codes from 0 to {_MAX_CODE}, got {codes}; correct them"
        )


def write_codes(path: Path, code_index: CodeIndex, layout: str = "") -> None:
    """By `layout` (index, flashrec, parquet) or else by suffix (.json: index, .parquet). Raises ConfigError, DataError.

    The file is there whole or not at all. Only parquet keeps which items are disabled, and flashrec not their order.
    """
    layout = layout or {".json": "index", ".parquet": "parquet"}.get(path.suffix, path.suffix)
    if layout not in _WRITERS:
        raise ConfigError(
            f"{path}: expected a layout of {', '.join(_WRITERS)}, or a name that ends in .json or .parquet, "
            f"got {layout!r}"
        )
    with renamed(path) as partial:
        _WRITERS[layout](partial, code_index)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_entries(path: Path) -> Iterable[Entry]:
    try:
        content = json.loads(read_text(path), object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got: {error}; write or fetch the file again") from error
    if isinstance(content, list):
        return (_numbered(path, f"entry {number}", row) for number, row in enumerate(content, 1))
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object or list, got {type(content).__name__}; see the layouts known")
    keyed_by_codes = all(re.fullmatch(r"[\d,\s]+", key) for key in content)
    if keyed_by_codes and not all(_is_tokens(value) for value in content.values()):
        return _flashrec_entries(path, content)
    return (_token_entry(path, key, value) for key, value in content.items())


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} twice")
    return content


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and "<" in each for each in value)


def _token_entry(path: Path, item_id: str, value: object) -> Entry:
    try:
        if not _is_tokens(value) or not isinstance(value, list):
            raise ValueError(f"expected a list of tokens, such as <a_12>, got {shown(value)}")
        return ItemId(item_id), parse_tokens("".join(value))
    except ValueError as error:
        raise DataError(f"{path}, item {shown(item_id)}: {error}; correct it, or leave the item out") from error


def _numbered(path: Path, where: str, row: object) -> Entry:
    """A sequence of codes without an item, which stands for itself."""
    if not isinstance(row, list) or not all(type(code) is int for code in row):
        raise DataError(f"{path}, {where}: expected a list of codes, such as [12, 3, 7], got {shown(row)}")
    return ItemId(",".join(map(str, row))), tuple(row)


def _flashrec_entries(path: Path, content: Mapping[str, Any]) -> Iterator[Entry]:
    bare = all(value == 1 for value in content.values())  # sequences alone, as FlashRec's converter writes them
    for key, value in content.items():
        codes = _key_codes(path, key)
        if bare:
            yield ItemId(",".join(map(str, codes))), codes
            continue
        for each in value if isinstance(value, list) else [value]:
            yield _item_id(path, key, each), codes


def _key_codes(path: Path, key: str) -> Codes:
    try:
        numbers = tuple(int(part) for part in key.split(","))
    except ValueError:
        raise DataError(f"{path}, key {shown(key)}: expected codes with commas between them, such as 12,3,7") from None
    if len(numbers) > 1:
        return numbers
    packed = numbers[0]
    if packed >= _RECIF_BASE**_RECIF_LEVELS:
        raise DataError(
            f"{path}, key {shown(key)}: expected codes such as 12,3,7, or {_RECIF_LEVELS} of them packed in base "
            f"{_RECIF_BASE}"
        )
    return tuple(packed // _RECIF_BASE**power % _RECIF_BASE for power in reversed(range(_RECIF_LEVELS)))


def _item_id(path: Path, key: str, value: object) -> ItemId:
    if isinstance(value, dict):
        value = next((value[name] for name in _ID_NAMES if name in value), None)
    if (item_id := as_id(value)) is None:
        raise DataError(
            f"{path}, key {shown(key)}: expected items as ids, or as objects with one of {', '.join(_ID_NAMES)}, "
            f"got {shown(value)}"
        )
    return ItemId(item_id)


def _write_index(path: Path, code_index: CodeIndex) -> None:
    rows = zip(code_index.item_ids, code_index.codes.tolist(), strict=True)
    _dump(path, {item_id: [token(level, code) for level, code in enumerate(row)] for item_id, row in rows})


def _write_flashrec(path: Path, code_index: CodeIndex) -> None:
    content: dict[str, list[dict[str, str]]] = {}
    for number in code_index.shelf.order.tolist():
        key = ",".join(map(str, code_index.codes[number].tolist()))
        content.setdefault(key, []).append({"pid": code_index.item_ids[number]})
    _dump(path, content)


def _dump(path: Path, content: object) -> None:
    path.write_text(to_json(content), encoding="utf-8")


# ---- rows ------------------------------------------------------------------------------------------------------------


def _row_entries(path: Path, enabled: dict[ItemId, bool]) -> Iterator[Entry]:
    """Also fills in `enabled`, where the file has that column."""
    for row in iter_rows(path):
        if isinstance(row, Problem):
            raise DataError(f"{path}, {row.place}: {row.reason}")
        try:
            if (item_id := as_id(row.fields.get("item_id"))) is None:
                raise ValueError(f"expected a column item_id with the item's id, got {listed(row.fields)}")
            codes = _row_codes(row.fields)
            if not _is_enabled(row.fields.get("enabled")):
                enabled[ItemId(item_id)] = False
        except ValueError as error:
            raise DataError(f"{path}, {row.place}: {error}; correct the row, or leave it out") from error
        yield ItemId(item_id), codes


def _is_enabled(value: object) -> bool:
    """Text formats have no booleans, so that words and digits stand for them; an empty cell says nothing."""
    word = str("" if value is None else value).strip().lower()
    if word not in _TRUE and word not in _FALSE:
        raise ValueError(f"expected true or false in enabled, got {shown(value)}")
    return word in _TRUE


def _row_codes(fields: Fields) -> Codes:
    for name in _CODES_NAMES:
        if (value := fields.get(name)) is not None:
            if isinstance(value, str):
                return parse_tokens(value)
            if isinstance(value, list) and _is_tokens(value):
                return parse_tokens("".join(value))
            if isinstance(value, list):
                return tuple(_code(each) for each in value)
            raise ValueError(f"expected a list of codes in {name}, got {shown(value)}")
    for style in _LEVEL_NAMES:
        names = [style.format(level) for level in range(MAX_LEVELS)]
        if names[0] in fields:
            return tuple(_code(fields[name]) for name in names if name in fields)
    raise ValueError(f"expected a column {_CODES_NAMES[0]}, or level_0, level_1, …, got {listed(fields)}")


def _code(value: object) -> int:
    """A whole number, also where pandas made it a float."""
    number = as_number(value)
    if number is None or not number.is_integer():
        raise ValueError(f"expected a whole number as a code, got {shown(value)}")
    return int(number)


def _write_parquet(path: Path, code_index: CodeIndex) -> None:
    try:
        import pyarrow as pa  # noqa: PLC0415  the one place that needs it here: an optional dependency
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: writing parquet needs pyarrow; install it with: pip install 'rcllm[data]'") from error
    flat = pa.array(code_index.codes.ravel())
    columns = {
        "item_id": pa.array(list(code_index.item_ids), pa.string()),
        "codes": pa.FixedSizeListArray.from_arrays(flat, code_index.num_levels),
        "enabled": pa.array(code_index.enabled),
    }
    pq.write_table(pa.table(columns), path)


_WRITERS: dict[str, Callable[[Path, CodeIndex], None]] = {
    "index": _write_index,
    "flashrec": _write_flashrec,
    "parquet": _write_parquet,
}
