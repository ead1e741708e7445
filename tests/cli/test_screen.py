"""What reaches a terminal: users' text steers nothing; progress is told where there is no terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.table import Table
from rich.text import Text

from rcllm.cli import screen
from rcllm.cli.tables import facts_table
from tests.cli.conftest import Run, Shop, write_lines

NASTY = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202eevil [red]lamp[/red] :duck:"
SHOWN = "␛[2J␛]0;owned"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _plain(text: str) -> str:
    """Without what Rich itself writes for colours and bars."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_users_text_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    table = Table(title=NASTY)
    table.add_column(NASTY, min_width=90)
    table.add_row(NASTY)
    for thing in (NASTY, Text(NASTY), table, facts_table(NASTY, {NASTY: NASTY})):
        screen.console().print(thing)
    screen.say(f"error: {NASTY}", "bold red")
    with screen.busy(NASTY):
        pass
    with screen.progress("more") as bar:
        bar.add_task(NASTY, more=NASTY, total=3)
    text = _plain(terminal.getvalue())
    assert not STEERING.search(text.replace("\r", ""))
    assert text.count(SHOWN) >= 9
    assert "\\x9b31m" in text
    assert "\\u202eevil" in text
    assert text.count("[red]lamp[/red]") >= 5
    assert ":duck:" in text


def test_titles_in_explain(run: Run, shop: Shop) -> None:
    items = [{"item_id": "a\x1b[2J", "title": NASTY}, {"item_id": "b", "title": "[bold] rug"}]
    requests = [{"request_id": "r\x1b[0m", "candidates": ["a\x1b[2J", "b"], "history": ["b"], "positive": "b"}]
    folder = shop.items.parent
    words = ("--items", write_lines(folder / "nasty.jsonl", items), "--model", shop.model, "--memory-mb", 6000)
    path = write_lines(folder / "nasty-requests.jsonl", requests)
    shown = run("explain", *words, "--request", path)
    assert shown.exit_code == 0, shown.stderr
    assert SHOWN in shown.stdout
    assert "[bold] rug" in shown.stdout
    assert not STEERING.search(shown.stdout)
    refused = run(
        "rank", *words, "--in", write_lines(folder / "nope.jsonl", [{"request_id": NASTY, "candidates": ["b", NASTY]}])
    )
    assert not STEERING.search(refused.stderr)
    assert not STEERING.search(refused.stdout), "JSON escapes what a terminal would obey"


def test_a_line_from_time_to_time_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "_TOLD_EVERY_S", 0.05)
    with screen.progress("size") as bar:
        task = bar.add_task("ranking", total=1000, completed=200, size="3 MB")
        bar.add_task("done before", total=1, completed=1, size="")
        for _ in range(4):
            bar.advance(task, 100)
            time.sleep(0.04)
    with screen.busy("loading a model"):
        time.sleep(0.12)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^ranking: [345]00 of 1,000, 3 MB, [\d,.]+ a second, about 0:00:0\d left$", err, re.MULTILINE)
    assert "done before" not in err
    assert "still loading a model" in err
    assert not STEERING.search(err)


def test_colours_that_an_environment_forces_stay_out_of_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen.say("careful", "bold red")
    with screen.progress() as bar:
        bar.advance(bar.add_task("ranking", total=1))
    assert capsys.readouterr().err == "careful\n"
