"""The chart and the manifests for Ray, as far as a machine without a cluster can tell."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rcllm.cli.ray_application import Arguments
from rcllm.config import Config
from rcllm.errors import ConfigError

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CHART = DEPLOY / "helm" / "rcllm"
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir())}
KEYS = {"keys": {"existingSecret": "rcllm-keys"}}


def values(**over: Any) -> dict[str, Any]:
    """Of the chart, as it is shipped, with some put in place of its own."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for name, value in copy.deepcopy(over).items():
        found[name] = found[name] | value if isinstance(value, dict) else value
    return found


def check(given: dict[str, Any]) -> None:
    jsonschema.validate(given, json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")))


def test_the_schema_takes_the_values_once_keys_are_named() -> None:
    check(values(**KEYS))
    with pytest.raises(jsonschema.ValidationError, match="should be non-empty"):
        check(values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 2},
        {"replicas": 0},
        {"image": {"pullPolicy": "Sometimes"}},
        {"items": "items.parquet"},
        {"resources": {"requests": {"memory": "8 GB"}}},
        {"serviceMonitor": {"enabled": True}},
        {"cluster": {"enabled": "yes"}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(values(**KEYS, **wrong))


def test_templates_name_values_and_helpers_that_there_are() -> None:
    text = "\n".join(TEMPLATES.values())
    for path in set(re.findall(r"\.Values\.([\w.]+)", text)):
        found: Any = values()
        for name in path.split("."):
            assert name in found, path
            found = found[name]
    assert set(re.findall(r'include "([^"]+)"', text)) == set(re.findall(r'define "([^"]+)"', text))


def test_the_configuration_of_the_chart_is_one(tmp_path: Path) -> None:
    (tmp_path / "rcllm.toml").write_text(values()["config"], encoding="utf-8")
    assert Config.load(tmp_path / "rcllm.toml", {}).cluster.replicas == values()["cluster"]["workers"]


def test_pods_are_begun_anew_where_the_configuration_changes() -> None:
    pods = {"statefulset.yaml": 1, "rayservice.yaml": 2}
    for name, count in pods.items():
        assert TEMPLATES[name].count("checksum/config: {{ .Values.config | sha256sum }}") == count, name


@pytest.mark.skipif(shutil.which("helm") is None, reason="Helm is not installed")
@pytest.mark.parametrize("cluster", ["true", "false"])
def test_helm_renders_it(cluster: str) -> None:
    given = ["--set", f"keys.existingSecret=rcllm-keys,cluster.enabled={cluster}"]
    subprocess.run(["helm", "lint", "--strict", CHART, *given], check=True, capture_output=True)
    shown = subprocess.run(["helm", "template", "shop", CHART, *given], check=True, capture_output=True, text=True)
    kinds = {each["kind"] for each in yaml.safe_load_all(shown.stdout) if each}
    assert ("RayService" in kinds) == (cluster == "true")


# ---- Ray -------------------------------------------------------------------------------------------------------------


def serve_config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    return found


def ray_service() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "ray" / "rayservice.yaml").read_text(encoding="utf-8"))
    [found] = [each for each in documents if each["kind"] == "RayService"]
    assert isinstance(found, dict)
    return found


def test_the_application_of_the_files_can_be_imported_and_takes_their_arguments() -> None:
    [application] = serve_config()["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert Arguments.parse(application["args"]).items == "/data/items.parquet"


def test_every_way_to_ray_serves_the_same_application() -> None:
    assert yaml.safe_load(ray_service()["spec"]["serveConfigV2"]) == serve_config()
    assert serve_config()["applications"][0]["import_path"] in TEMPLATES["rayservice.yaml"]


def test_ray_takes_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    assert schema.ServeDeploySchema.model_validate(serve_config()).applications[0].name == "rcllm"


def test_containers_have_the_environment_that_rcllm_gives_ray() -> None:
    application = pytest.importorskip("rcllm.on_ray.application", reason="Ray is not installed")
    cluster = ray_service()["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        given = {each["name"]: each["value"] for each in container["env"]}
        assert application.ENVIRONMENT.items() <= given.items()
    assert all(f"name: {name}" in TEMPLATES["_helpers.tpl"] for name in application.ENVIRONMENT)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"items": "i"}, "needs the argument 'config'"),
        ({"items": "i", "config": "c", "decodr": "d"}, "did you mean 'decoder'?"),
        ({"items": 3, "config": "c"}, "expected a text, got 3"),
    ],
)
def test_arguments_that_are_wrong(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        Arguments.parse(given)
