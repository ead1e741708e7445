"""`rcllm serve` as a process: it listens, answers, drains at the first signal, and refuses what is not safe."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Run, Shop

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(shop: Shop, *words: str, **environ: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "rcllm.cli.app", "serve", *shop.on_items, "--port", "0", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environ}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving at (http://\S+),", line):
                yield found[1], process
                return
        raise AssertionError(f"it ended with {process.wait()} before it served")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_it_answers_and_drains(shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text('[server]\nserved_name = "shop"\nkept_answers = 5\nadmin_key = "key-of-the-file"\n')
    words = ("--config", str(config), "--readout", "pointwise", "--allow-uncalibrated")
    with serving(shop, *words, RCLLM_SERVER_ADMIN_KEY="key-of-the-environment") as (address, process):
        told = httpx.post(f"{address}/v1/rank", json={"candidates": ["i1", "i2"], "history": ["i3"]}, timeout=30)
        assert told.json()["readout"] == "pointwise"
        assert [each["id"] for each in httpx.get(f"{address}/v1/models").json()["data"]] == ["shop"]
        change = {"json": {"fields": {"title": "new"}}}
        for key, status in (("key-of-the-file", 403), ("key-of-the-environment", 200)):
            reply = httpx.put(f"{address}/v1/items/x", headers={"x-api-key": key}, **change)  # type: ignore[arg-type]
            assert reply.status_code == status, "the environment goes before the file"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert "draining" in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "--insecure"),
        (("--port", "70000"), "--port must be at most 65535"),
        (("somewhere", "--demo"), "named twice"),
        (("--demo",), "--demo brings its own model and items: leave out --items and --model"),
        (("--demo", "--template", "titles", "--readout", "label"), "--items and --model and --template and --readout"),
        (("--decoder", "nowhere"), "there is no such folder"),
        (("--host", "no.such.host.invalid", "--insecure"), "could not begin"),
    ],
)
def test_what_is_not_safe_or_wrong_is_said_before_the_model_is_loaded(
    run: Run, shop: Shop, words: tuple[str, ...], said: str
) -> None:
    ended = run("serve", *shop.on_items, *words)
    assert ended.exit_code == 2
    assert said in " ".join(ended.output.split())


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(run: Run, shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run("serve", *shop.on_items, "--port", taken.getsockname()[1])
    assert ended.exit_code == 2
    assert "is another one there? Choose another --port" in ended.output


def test_a_tenant_needs_a_key_where_it_is_named(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[server.tenant_keys]\nshop-a = []\n")
    ended = run("serve", *shop.on_items, "--config", config)
    assert ended.exit_code == 2
    assert "server.tenant_keys.shop-a must be a list of at least 1" in " ".join(ended.output.split())


def test_no_message_shows_a_key(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    for written in ('api_keys = "secret"', 'api_keys = ["secret"]', 'tenant_keys = {a = ["secret"]}', "admin_key = 5"):
        config.write_text(f"[server]\n{written}\n")
        ended = run("serve", *shop.on_items, "--config", config)
        assert ended.exit_code == 2
        assert "got a" in ended.output
        assert "secret" not in ended.output


def test_unknown_keys_are_refused_with_the_nearest_name(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[server]\nprot = 80\n")
    ended = run("serve", *shop.on_items, "--config", config)
    assert ended.exit_code == 2
    assert "did you mean 'port'?" in ended.output
