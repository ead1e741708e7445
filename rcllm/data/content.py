"""The bytes and lines of a file, whatever it is compressed with and however its text begins.

Knows nothing of rows. Invariant: compression is told by the first bytes and never by the name, a byte order mark never
reaches a caller, and whatever the system says of a file becomes a DataError that names it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from rcllm.data.text import did_you_mean
from rcllm.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz")  # what may stand after the suffix that says what a file holds
_Content = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | BufferedReader
_OPENERS: dict[bytes, Callable[[Path], _Content]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_PACKED = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstandard", b"7z\xbc\xaf": "7z"}
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def suffix_of(path: Path) -> str:
    """The suffix that says what the file holds: `.jsonl` of `items.jsonl.gz`."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def is_wide(encoding: str) -> bool:
    """Whether a line end is more than one byte in it, so that `raw_lines` gives its lines as UTF-8."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def raw_lines(path: Path, encoding: str = "utf-8") -> Iterator[bytes]:
    """The lines with their ends, as they stand in the file; those of a wide encoding as UTF-8."""
    with _reading(path) as file:
        first = file.readline()
        if is_wide(encoding) or first.startswith(_UTF16_MARKS):
            file.seek(0)
            with io.TextIOWrapper(file, encoding if is_wide(encoding) else "utf-16", newline="\n") as text:
                for line in text:
                    yield line.removeprefix("\ufeff").encode("utf-8")
        elif first:
            yield first.removeprefix(_UTF8_MARK)
            yield from file


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes of the content, without a byte order mark."""
    with _reading(path) as file:
        return file.read(size).removeprefix(_UTF8_MARK)


def read_text(path: Path) -> str:
    """The whole content, which is UTF-8, or says by a byte order mark that it is UTF-16."""
    try:
        return b"".join(raw_lines(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got {error.reason}; save it in that encoding") from error


def text_lines(path: Path) -> list[str]:
    """The lines that are not blank, without the spaces around them and without invisible marks of byte order."""
    lines = (line.replace("\ufeff", "").strip() for line in io.StringIO(read_text(path), newline=None))
    return [line for line in lines if line]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[_Content]:
    """The unpacked content. Raises DataError, also for what goes wrong while it is read."""
    if not path.is_file():
        _raise_missing(path)
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if packed := next((name for mark, name in _PACKED.items() if start.startswith(mark)), None):
            raise DataError(f"{path}: expected text, plain or packed with gzip, bzip2 or xz, got {packed}; unpack it")
        opener = next((opener for mark, opener in _OPENERS.items() if start.startswith(mark)), None)
        content: _Content = path.open("rb") if opener is None else opener(path)
        with content:
            yield content
    except _BROKEN as error:
        raise DataError(
            f"{path}: expected a whole compressed file, got one that breaks off ({error}); fetch it again"
        ) from error
    except UnicodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-16, as its first bytes say, got {error}; save it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _raise_missing(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder; name a file in it, or give the folder as a data set")
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    raise DataError(f"{path}: no such file; check the path.{did_you_mean(path.name, beside)}")
