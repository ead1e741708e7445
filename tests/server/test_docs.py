"""What docs/serving.md says is there: addresses, codes, settings, and its snippet runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from rcllm.config import ServerConfig
from rcllm.fields import parse
from rcllm.server.app import ENDPOINTS
from rcllm.server.failures import FAILURES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_address_has_an_example() -> None:
    asked = set(re.findall(r"localhost:8000(/[\w/.-]*)", PAGE)) | set(re.findall(r"`(/[\w/]+)`", PAGE))
    for endpoint in ENDPOINTS:
        pattern = re.sub(r"{\w+(:\w+)?}", "[^/]+", endpoint.path)
        assert any(re.fullmatch(pattern, path) for path in asked), endpoint.path
    known = "|".join(re.sub(r"{\w+(:\w+)?}", "[^/]+", endpoint.path) for endpoint in ENDPOINTS)
    assert [path for path in asked if not re.fullmatch(known, path)] == []


def test_every_code_is_told() -> None:
    for failure in FAILURES.values():
        assert f"`{failure.code}`" in PAGE
        assert str(failure.status) in PAGE


def test_the_settings_are_settings() -> None:
    (text,) = blocks("toml")
    assert parse(ServerConfig, tomllib.loads(text)["server"]).kept_answers == 1000
    for name in re.findall(r"`(max_\w+|kept_\w+|\w+_s)`", PAGE):
        assert hasattr(ServerConfig(), name), name


def test_the_snippet_runs() -> None:
    (snippet,) = blocks("python")
    exec(compile(snippet, "docs/serving.md", "exec"), {})
