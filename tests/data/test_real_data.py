"""The real data sets, where they lie beside the repository: every row is understood, and requests can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.data import build_requests, histories, load_dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"needs the real data set {name} in shared/data beside the repository")
    return path


@pytest.mark.parametrize(
    ("name", "num_items", "num_users", "num_interactions"),
    [
        ("amazon_scientific", 4_344, 8_317, 58_492),
        ("goodreads", 4_058, 4_990, 54_885),
        ("movielens_100k", 1_682, 943, 100_000),
        ("amazon_industrial", 3_686, 3_285, 22_743),
    ],
)
def test_common_folders_are_read_whole(name: str, num_items: int, num_users: int, num_interactions: int) -> None:
    dataset = load_dataset("auto", folder(name), strict=True)
    assert len(dataset.catalogue) == num_items
    assert len(dataset.interactions) == num_interactions
    assert len(histories(dataset.interactions)) == num_users
    requests = build_requests(dataset, 50, negatives="retrieved")
    assert all(len(set(request.candidates)) == 20 for request in requests)
    assert all(2 <= len(request.history) <= 10 for request in requests)


def test_official_movielens_csv_agrees_with_the_common_form() -> None:
    official = load_dataset("movielens_latest", folder("movielens_latest_small") / "official", strict=True)
    common = load_dataset("common", folder("movielens_latest_small"), strict=True)
    assert list(official.catalogue) == list(common.catalogue)
    assert len(official.interactions) == len(common.interactions) == 100_004
    longer, short = histories(official.interactions), histories(common.interactions)
    assert {user: {row.item_id for row in rows} for user, rows in longer.items()} == {
        user: {row.item_id for row in rows} for user, rows in short.items()
    }


def test_an_official_amazon_2018_file() -> None:
    dataset = load_dataset("auto", folder("amazon_allbeauty_raw"), strict=True)
    by_user = histories(dataset.interactions)
    assert (len(dataset.interactions), len(dataset.catalogue), len(by_user)) == (5_269, 85, 991)
    assert sum(map(len, by_user.values())) == len(set(dataset.interactions)) < 5_269
    requests = build_requests(dataset, None, num_candidates=5, review_history=True)
    assert any(event.text for request in requests for event in request.history)
