"""`rcllm place`: built from a data set or a log, judged, compared, explained; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcllm.cluster.files import read_placement
from tests.cli.conftest import Run, Shop

ROOM = ("--nodes", 4, "--tokens-per-item", 10)


@pytest.fixture
def built(run: Run, shop: Shop, tmp_path: Path) -> Path:
    out = tmp_path / "placement.json"
    ended = run("place", "build", "--dataset", shop.dataset, *ROOM, "--candidates", 5, "--out", out)
    assert ended.exit_code == 0, ended.output
    return out


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    rows = [{"candidates": [f"i{5 * (group % 8) + step}" for step in range(5)]} for group in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_build_from_a_data_set(built: Path, run: Run, shop: Shop) -> None:
    placement = read_placement(built)
    assert (placement.num_items, placement.room.num_nodes, placement.policy) == (40, 4, "learned")
    ended = run("place", "eval", "--placement", built, "--dataset", shop.dataset, "--candidates", 5)
    assert ended.exit_code == 0, ended.output
    assert "on the best node" in ended.output
    assert "edge cut" in ended.output


def test_build_from_a_log(run: Run, shop: Shop, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    ended = run("place", "build", "--items", shop.items, "--log", log, *ROOM, "--policy", "metis", "--out", out)
    assert ended.exit_code == 0, ended.output
    ended = run("place", "eval", "--placement", out, "--held-out", log)
    assert ended.exit_code == 0, ended.output
    assert "100.0% of a request's items" in ended.output, "the log's groups of five lie together"
    assert "without --log" in ended.output


def test_diff_plans_bounded_moves(built: Path, run: Run, shop: Shop, tmp_path: Path) -> None:
    other, moves, out = (tmp_path / name for name in ("other.json", "moves.jsonl", "next.json"))
    words = ("--dataset", shop.dataset, *ROOM, "--candidates", 5, "--policy", "random")
    assert run("place", "build", *words, "--out", other).exit_code == 0
    ended = run("place", "diff", "--old", other, "--new", built, "--max-moves", 3, "--moves", moves, "--out", out)
    assert ended.exit_code == 0, ended.output
    assert len(moves.read_text().splitlines()) == 3
    read_placement(out)


def test_moves_and_placement_are_two_files(built: Path, run: Run, tmp_path: Path) -> None:
    one, same = tmp_path / "x.json", tmp_path / "folder" / ".." / "x.json"
    same.parent.parent.mkdir()
    ended = run("place", "diff", "--old", built, "--new", built, "--moves", one, "--out", same)
    assert ended.exit_code == 2
    assert "--moves and --out name the same file: each needs its own" in " ".join(ended.output.split())
    assert not one.exists()


def test_explain(built: Path, run: Run, shop: Shop) -> None:
    ended = run("place", "explain", "--placement", built, "--item", "i5")
    assert "owner" in ended.output or "every node" in ended.output
    ended = run("place", "explain", "--placement", built, "--request", f"{shop.requests}:1", "--load", "0=0.5")
    assert ended.exit_code == 0, ended.output
    assert "affinity chose" in ended.output


def test_explain_by_time_counts_what_nodes_hold_and_their_queues(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    room = ("--nodes", 4, "--tokens-per-item", 100, "--copies", 1, "--policy", "hash")
    assert run("place", "build", "--dataset", shop.dataset, *room, "--candidates", 5, "--out", out).exit_code == 0

    def chosen(*words: object) -> str:
        ended = run("place", "explain", "--placement", out, "--request", f"{shop.requests}:1", *words)
        assert ended.exit_code == 0, ended.output
        return ended.output.partition(" chose ")[2].partition(",")[0]

    most = chosen("--policy", "hit_only")
    others = [f"{node}=0.1" for node in range(4) if str(node) != most]
    assert chosen("--policy", "ttft") == chosen("--policy", "ttft", *(f"--load={each}" for each in others)) == most
    assert chosen("--policy", "ttft", "--load", f"{most}=1") != most


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("explain",), "expected --item ID or --request"),
        (("explain", "--item", "i99"), "has no item 'i99'"),
        (("explain", "--request", "{requests}:1", "--load", "9=1"), "a node below 4"),
        (("explain", "--request", "{requests}:1", "--load", "x"), "expected --load NODE=SHARE"),
        (("eval",), "there are no requests"),
    ],
)
def test_what_is_refused(built: Path, run: Run, shop: Shop, words: tuple[str, ...], why: str) -> None:
    command, *more = (word.format(requests=shop.requests) for word in words)
    ended = run("place", command, "--placement", built, *more)
    assert ended.exit_code != 0
    assert why in " ".join(ended.output.split())


def test_no_requests_to_build_from(run: Run, shop: Shop, tmp_path: Path) -> None:
    ended = run("place", "build", "--items", shop.items, "--out", tmp_path / "p.json")
    assert ended.exit_code == 2
    assert "give --log FILE" in " ".join(ended.output.split())


def test_memory_that_does_not_hold_the_catalogue_is_told(run: Run, shop: Shop, tmp_path: Path) -> None:
    words = ("--dataset", shop.dataset, "--candidates", 5, "--nodes", 2, "--tokens-per-item", 10, "--copies", 0.5)
    ended = run("place", "build", *words, "--out", tmp_path / "p.json")
    assert ended.exit_code == 0, ended.output
    assert "fit on no node" in ended.output
