"""Lists of ids: what editors leave in a file is never part of an id, and unknown ids are told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.data.ids import read_ids, tell_unknown
from rcllm.errors import DataError
from rcllm.prototypes.texts import read_users_file
from rcllm.wire.lines import read_item_ids

KNOWN = ("B003", "B004", "10")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_reader_of_ids_reads_what_windows_editors_write(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "deny.txt"
    path.write_bytes("B003\r\n B004\r\n\r\nB003\r\n".encode(encoding))
    assert read_ids(path) == read_item_ids(path) == ("B003", "B004")
    assert read_users_file(path) == {"B003", "B004"}


def test_what_is_not_text_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="a: expected text in UTF-8"):
        read_ids(tmp_path / "a")
    with pytest.raises(DataError, match="no such file"):
        read_ids(tmp_path / "b")


def test_unknown_ids_are_counted_and_the_first_are_named() -> None:
    assert tell_unknown("deny.txt", KNOWN, KNOWN) is None
    assert tell_unknown("deny.txt", ("B003", "zz"), KNOWN) == "1 of 2 ids of deny.txt is not in the catalogue: 'zz'."
    many = tell_unknown("deny.txt", [f"zz{n}" for n in range(12)], KNOWN)
    assert many == "12 of 12 ids of deny.txt are not in the catalogue: 'zz0', 'zz1', 'zz2' and 9 more."


@pytest.mark.parametrize(("given", "meant"), [("B0003", "B003"), ("10.0", "10")])
def test_the_nearest_known_id_is_offered(given: str, meant: str) -> None:
    told = tell_unknown("deny.txt", [given], KNOWN)
    assert told is not None
    assert f"Did you mean '{meant}'" in told
