"""`rcllm doctor` on what is kept: tenants that are not kept apart and stores that are not well are problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rcllm.prompt import draft
from rcllm.store.disk import DiskStore
from tests.cli.conftest import Run, Shop
from tests.store.disks import put


@pytest.fixture
def doctor(run: Run, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr("rcllm.model.ceilings._SECONDS", 0.0)
    monkeypatch.setenv("RCLLM_STORE_FOLDER", str(tmp_path / "kept"))

    def ask(*words: object, code: int = 0) -> str:
        shown = run("doctor", "--model", shop.model, *words)
        assert shown.exit_code == code, shown.output
        return shown.stdout

    return ask


def test_tenants_are_kept_apart_and_a_store_is_made_when_it_is_used(doctor: Callable[..., str], tmp_path: Path) -> None:
    shown = doctor()
    assert "kept apart: of 3 blocks of a user, another tenant's user found none" in shown
    assert "made when it is first used" in shown
    assert not (tmp_path / "kept").exists()
    assert "off: what is computed ends with its process" in doctor("--no-store")


def test_a_probe_that_hits_is_a_problem(doctor: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "whose", lambda user_id, tenant: user_id)
    shown = doctor(code=1)
    assert "NOT kept apart" in shown
    assert "read across tenants: of what tenant probe-1 computed, tenant probe-2 found 3 blocks and read 3" in shown


def test_a_store_that_is_well(doctor: Callable[..., str], tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "kept", 1 << 30) as disk:
        put(disk, range(5), "item:1")
    shown = doctor("--disk-mb", 50)
    assert "5 blocks" in shown
    assert "of 52 MB" in shown
    assert "GB free" in shown
    assert "a first guess" in shown


def test_a_store_that_is_damaged(doctor: Callable[..., str], tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "kept", 1 << 30) as disk:
        put(disk, range(5), "item:1")
        with disk._access.raw_writing() as txn:
            txn.drop(disk._access.opened.dbs.order, delete=False)
    assert "the order of eviction names other blocks than there are" in doctor(code=1)
    (tmp_path / "kept" / "data.mdb").write_bytes(b"junk" * 5000)
    shown = doctor(code=1)
    assert "which cannot be used" in shown
    assert "verify --repair" in shown


def test_a_shared_store_that_is_away(doctor: Callable[..., str]) -> None:
    assert "does not answer" in doctor("--shared-store", "valkey://127.0.0.1:1/0", code=1)


def test_a_template_that_ranks_nothing_is_not_probed(doctor: Callable[..., str]) -> None:
    assert "this template ranks nothing" in doctor("--template", "describe_user")
