"""A file of answers that is cut off anywhere goes on after its last whole line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.errors import ConfigError, DataError
from rcllm.wire.answer_file import check_same_job, job_path, opened_answers

SETTINGS = {"command": "rcllm rank", "rank.level": "exact", "--volatile": None, "the requests": "digest:1"}


def answer(line: int, error: str | None = None) -> dict[str, object]:
    return {"request_id": f"r{line}", "line": line} | ({"error": error} if error else {"ranking": ["a", "é"]})


def run(out: Path, *answers: dict[str, object], end: bool = True) -> set[int]:
    """Writes some answers; returns what was answered before."""
    with opened_answers(str(out), SETTINGS) as file:
        before = set(file.answered)
        for each in answers:
            file.write(each)
        if end:
            file.finish()
    return before


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@given(st.data())
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    run(out, *(answer(n) for n in range(1, 5)), end=False)
    whole = out.read_bytes()
    cut = data.draw(st.integers(1, len(whole)))
    out.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert run(out, *(answer(n) for n in range(kept + 1, 5))) == set(range(1, kept + 1))
    assert out.read_bytes() == whole


def test_failures_are_tried_again_and_come_out_in_order(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run(out, answer(1), answer(2, "too long"), answer(3), answer(4, "too long"), end=False)
    assert run(out, answer(2), end=False) == {1, 3}
    assert len(lines(out)) == 5, "nothing that was written is touched before the end"
    assert run(out, answer(4, "still too long")) == {1, 2, 3}
    assert lines(out) == [answer(1), answer(2), answer(3), answer(4, "still too long")]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far.jsonl").touch()
    out = tmp_path / "answers.jsonl"
    out.symlink_to("far.jsonl")
    run(out, answer(2), answer(1))
    assert out.is_symlink()
    assert lines(tmp_path / "far.jsonl") == [answer(1), answer(2)]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"rank.level": "blocks"}, "rank.level was 'exact', is 'blocks'"),
        ({"--volatile": ["price"]}, "--volatile was None, is"),
        ({"the requests": "digest:2"}, "the content of the requests is another"),
    ],
)
def test_answers_of_another_job_are_never_mixed_in(tmp_path: Path, now: dict[str, object], said: str) -> None:
    out = tmp_path / "answers.jsonl"
    run(out, answer(1))
    before = out.read_bytes()
    for ask in (
        lambda: check_same_job(str(out), now, SETTINGS),
        lambda: opened_answers(str(out), SETTINGS | now).__enter__(),
    ):
        with pytest.raises(ConfigError, match="--restart") as refused:
            ask()
        assert said in str(refused.value)
    assert out.read_bytes() == before
    with opened_answers(str(out), SETTINGS | now, restart=True) as file:
        assert not file.answered
    assert out.read_bytes() == b""
    assert json.loads(job_path(out).read_text(encoding="utf-8")) == SETTINGS | now


def test_a_setting_that_is_no_longer_there_makes_another_job(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run(out, answer(1))
    fewer = {name: value for name, value in SETTINGS.items() if name != "the requests"}
    check_same_job(str(out), fewer, ["the requests"])
    with pytest.raises(ConfigError, match="another job: nothing is given for the requests now"):
        check_same_job(str(out), fewer)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "thesis.txt"
    out.write_text("Once upon a time", encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing beside it says"):
        run(out, answer(1))
    assert out.read_text(encoding="utf-8") == "Once upon a time"


def test_a_line_that_is_no_answer_is_told_of(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run(out, answer(1))
    out.write_bytes(b"edited\n" + out.read_bytes())
    with pytest.raises(ConfigError, match="line 1: expected an answer"):
        run(out, answer(2))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with opened_answers(str(out), SETTINGS), pytest.raises(ConfigError, match="another process"):
        run(out, answer(1))


def test_a_device_takes_answers_and_keeps_none() -> None:
    assert run(Path("/dev/null"), answer(1)) == set()
    assert not job_path(Path("/dev/null")).exists()
    with pytest.raises(DataError, match="No space left"):
        run(Path("/dev/full"), answer(1))
