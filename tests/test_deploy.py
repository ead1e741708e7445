"""The deployment files, as far as a machine without their programs can tell: they parse, and name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from rcllm.config import ServerConfig
from rcllm.core.receipts import Step
from rcllm.errors import OverloadedError
from rcllm.fidelity.monitor import GuardEvent
from rcllm.fidelity.shadow import GuardCounts, GuardStats, GuardStatus, KindStats
from rcllm.schedule.cost import CostStats, Rates
from rcllm.server.app import ENDPOINTS, make_app
from rcllm.server.backend import Door, Stats
from rcllm.server.fake import FakeBackend
from rcllm.store.contract import TierStats

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(DEPLOY.rglob("*")) if path.is_file()}
_METRIC = re.compile(r"\b(?:(?:vllm|rcllm):\w+|process_\w+)")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))["panels"]
    return found


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """By each name of /metrics, the labels that it has, of a server that has seen everything."""
    kind = KindStats("pointwise", "blocks", 1.0, 3, 0.1)
    step = GuardEvent(1.0, "pointwise", "trip", "blocks", "exact", 1200.0, 40, 0.1, 0.2)
    guard = GuardStatus(("blocks", "exact"), 0.05, 0.1, GuardStats(GuardCounts(), (kind,)), (step,), 0, 0.0)
    held = Stats(
        hits={"device": 3},
        tiers=(TierStats("disk", 7, 8, 9),),
        rates={"disk": 1.0},
        door=Door(2, 30.0, {"accepted": 6}),
        costs=CostStats(1, 0.1, 1.0, Rates(1.0, 1.0, 1.0, 1.0, 1.0)),
        guard=guard,
    )
    backend = FakeBackend({"a": "red"}, rule=_once_refused())
    backend.stats = lambda: held  # type: ignore[method-assign]
    with TestClient(make_app(backend)) as client:
        for _ in range(2):
            client.post("/v1/rank", json={"candidates": ["a"]})
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _once_refused() -> Any:
    """Answers, with something given up, after it has refused once."""
    plain, outcomes = FakeBackend({"a": "red"}), [OverloadedError("too much waits", 1.0)]
    step: Step = "level"

    def rule(request: Any) -> Any:
        if outcomes:
            return outcomes.pop()
        answer = plain._rank(request)
        return replace(answer, receipt=replace(answer.receipt, degraded=(step,)))

    return rule


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_metrics_has(panel: dict[str, Any], labels: dict[str, set[str]]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        names = _METRIC.findall(target["expr"])
        assert names, target["expr"]
        for name in names:
            assert name in labels, f"/metrics has no {name}"
        known = set().union(*(labels[name] for name in names))
        grouped = {word for group in re.findall(r"by \(([\w, ]+)\)", target["expr"]) for word in group.split(", ")}
        assert grouped <= known, f"{target['expr']}: unknown labels {grouped - known}"
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped


def test_panels_have_ids_of_their_own_and_one_source() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    (source,) = read_yaml("grafana/datasource.yml")["datasources"]
    used = {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]}
    assert used == {source["uid"]}


def test_compose_mounts_files_that_are_there() -> None:
    compose = read_yaml("compose.yaml")
    services = compose["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    for mount in mounts:
        assert (DEPLOY / mount).is_file() if mount.startswith(".") else mount in compose["volumes"], mount
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    assert services["prometheus"]["secrets"] == list(compose["secrets"])
    assert (DEPLOY / services["rcllm"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["rcllm"]["build"]["dockerfile"]).is_file()
    grace = int(services["rcllm"]["stop_grace_period"].removesuffix("s"))
    assert grace > ServerConfig().drain_s
    assert set(read_yaml("compose.cuda.yaml")["services"]) <= set(services)


def test_prometheus_asks_the_server_that_compose_starts() -> None:
    (job,) = read_yaml("prometheus.yml")["scrape_configs"]
    compose = read_yaml("compose.yaml")
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose["services"]
    assert f"EXPOSE {port}" in (DEPLOY / "Dockerfile").read_text("utf-8")
    assert job["metrics_path"] in {endpoint.path for endpoint in ENDPOINTS}
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["secrets"]


def test_variables_and_addresses_are_those_of_the_server() -> None:
    for path, text in {**TEXTS, Path("deploying.md"): PAGE}.items():
        for name in re.findall(r"RCLLM_SERVER_(\w+)", text):
            assert hasattr(ServerConfig(), name.lower()), f"{path.name}: RCLLM_SERVER_{name}"
    (asked,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", TEXTS[DEPLOY / "Dockerfile"])
    assert asked == "/health"


def test_the_image_is_built_of_files_that_are_there_and_not_left_out() -> None:
    text = TEXTS[DEPLOY / "Dockerfile"]
    let_in = {line[1:] for line in TEXTS[DEPLOY / "Dockerfile.dockerignore"].splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    (torch,) = re.findall(r"ARG TORCH=(\S+)", text)
    assert f"torch=={torch}" in (ROOT / "constraints.txt").read_text("utf-8")
    (extras,) = re.findall(r"-e '\.\[([\w,]+)\]'", text)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    assert text.index("USER rcllm") < text.index("ENTRYPOINT"), "nothing runs as root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_to_say_of_the_unit(tmp_path: Path) -> None:
    """With a command that is there, since rcllm is installed elsewhere here."""
    unit = tmp_path / "rcllm.service"
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", TEXTS[DEPLOY / "rcllm.service"]))
    ran = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    said = [line for line in ran.stderr.splitlines() if "rcllm.service" in line]
    assert said == []


def test_the_page_names_every_file() -> None:
    for path in TEXTS:
        named = "deploy/helm/rcllm" if "helm" in path.parts else path.name
        assert named in PAGE, path
