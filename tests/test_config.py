"""The configuration: read strictly, resolved once."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rcllm.config import (
    MIB,
    CacheConfig,
    Config,
    Hardware,
    ModelConfig,
    PromptConfig,
    ScheduleConfig,
    StoreConfig,
    check_options,
    context_samples,
    nearest,
    num_usable_cores,
    resolve,
)
from rcllm.core.ranking import Level, RankOptions, Selection
from rcllm.errors import ConfigError
from rcllm.plain_json import as_json
from rcllm.schedule.admission import Open

SMALL = Hardware(has_cuda=False, memory_bytes=1000 * MIB)
LARGE = Hardware(has_cuda=True, memory_bytes=1000 * MIB)


def load(folder: Path, text: str) -> Config:
    path = folder / "rcllm.toml"
    path.write_text(text, encoding="utf-8")
    return Config.load(path)


def test_a_file_is_read_section_by_section(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [model]
        path = "some/model"
        threads = 2
        [prompt]
        context = "mean(4)"
        [cache]
        kv_dtype = "bf16"
        [rank]
        level = "linked(8)"
        parallel = true
        [rank.selection]
        policy = "tail"
        window = 4
        """,
    )
    assert config.model == ModelConfig(path="some/model", threads=2)
    assert config.prompt == PromptConfig(context="mean(4)")
    assert config.cache == CacheConfig(kv_dtype="bf16")
    assert config.rank == RankOptions(level=Level("linked", 8), parallel=True, selection=Selection("tail", window=4))
    assert load(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cahce]", "unknown key 'cahce'; did you mean 'cache'"),
        ("[cache]\nmemory_gb = 3", "unknown key 'memory_gb' in cache; did you mean 'memory_mb'"),
        ("[cache]\nmemory_mb = '3'", "cache.memory_mb must be a whole number, got '3'"),
        ("[cache]\nmemory_mb = true", "cache.memory_mb must be a whole number, got true"),
        ("[rank]\nparallel = 1", "rank.parallel must be true or false, got 1"),
        (
            "[rank]\nreadout = 'labels'",
            "rank.readout must be one of label, pointwise, likelihood, got 'labels'; did you mean 'label'",
        ),
        ("[rank]\nlevel = 'fast'", "rank.level: unknown reuse level 'fast'"),
        ("[rank]\nlevel = 3", "rank.level: expected a text, got 3"),
        ("[rank.selection]\npolicy = 'best'", "rank.selection.policy must be one of rcllm, .*, got 'best'"),
        ("[rank.selection]\nlambda = 0.5", "unknown key 'lambda' in rank.selection; known: check_layer, divergence"),
        ("model = 3", "model must be a section, got 3"),
        ("[model", r"rcllm\.toml"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        Config.load(tmp_path / "absent.toml")


def autos(value: Any) -> list[str]:
    found = []
    for field in fields(value):
        inner = getattr(value, field.name)
        found += autos(inner) if is_dataclass(inner) else [field.name] * (inner == "auto")
    return found


@pytest.mark.parametrize(
    ("hardware", "device", "dtype", "kv_dtype"), [(SMALL, "cpu", "fp32", "fp16"), (LARGE, "cuda", "bf16", "bf16")]
)
def test_resolving_fits_the_hardware(hardware: Hardware, device: str, dtype: str, kv_dtype: str) -> None:
    config = resolve(Config(), hardware)
    assert (config.model.device, config.model.dtype, config.cache.kv_dtype) == (device, dtype, kv_dtype)
    assert (config.cache.memory_mb, config.store.queue_mb) == (600, 18)
    # what is left to choose: the backend (per pass), the mask (by the adapter), the chat format (by the tokenizer), and
    # the name of the reuse level (by the calibration)
    assert autos(config) == ["attention", "mask", "chat", "name"]
    assert resolve(config, hardware) == config


def test_resolving_keeps_what_is_given() -> None:
    store = StoreConfig(queue_mb=300)
    given = Config(
        ModelConfig(device="cpu", dtype="bf16"), cache=CacheConfig(memory_mb=7, kv_dtype="fp32"), store=store
    )
    assert resolve(given, LARGE) == given
    assert resolve(replace(given, cache=CacheConfig(memory_mb=7)), LARGE).cache.kv_dtype == "bf16"
    levels = ModelConfig(device="cpu", dtype="int8", weights="int8")
    assert resolve(Config(levels), LARGE).cache.kv_dtype == "bf16"
    for hardware in (SMALL, LARGE):
        assert resolve(Config(cache=CacheConfig(kv_dtype="int8")), hardware).cache.kv_dtype == "int8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(ModelConfig(device="cuda")), "torch sees no GPU"),
        (
            Config(ModelConfig(dtype="int8")),
            r"weights in levels, got model\.weights full; set weights = 'int8' as well",
        ),
        (Config(ModelConfig(max_positions=0)), r"model\.max_positions must be at least 1, got 0"),
        (Config(prompt=PromptConfig(max_candidates=0)), r"prompt\.max_candidates must be at least 1"),
        (Config(cache=CacheConfig(pass_tokens=-1)), r"cache\.pass_tokens must be at least 1"),
        (Config(prompt=PromptConfig(context="instructions")), "unknown canonical context 'instructions'"),
        (Config(rank=RankOptions(layout="items_first", readout="pointwise")), "needs layout history_first"),
    ],
)
def test_what_cannot_work_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config, SMALL)


def test_products_in_int8_are_for_cpus() -> None:
    with pytest.raises(ConfigError, match=r"int8 is for CPUs, got device cuda; use dtype = 'auto'"):
        resolve(Config(ModelConfig(dtype="int8", weights="int8")), LARGE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "content_free", "readout": "likelihood"}, "corrects label letters; read-out 'likelihood' has none"),
        ({"layout": "items_first", "readout": "likelihood"}, "needs layout history_first"),
        (
            {"readout": "labels"},
            "readout must be one of label, pointwise, likelihood, got 'labels'; did you mean 'label'",
        ),
        ({"history": "none"}, "history must be one of chain, shared, semantic, got 'none'"),
        ({"level": "blocks"}, r"level must be a Level, got 'blocks'; read one with Level\.parse"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(RankOptions(**options))


def test_contexts() -> None:
    counts = [context_samples(name) for name in ("none", "bos", "instruction", "typical", "mean(1)", "mean(12)")]
    assert counts == [0, 0, 0, 1, 1, 12]
    for name in ("", "mean", "mean()", "mean(0)", "mean(-1)", "mean(²)", "mean(2.5)"):
        with pytest.raises(ConfigError, match="expected one of none, bos"):
            context_samples(name)


def test_what_json_has_no_word_for_becomes_none() -> None:
    values = as_json(CacheConfig(pool_mb=math.inf, semantic_pool="Infinity"))  # type: ignore[arg-type]
    assert (values["pool_mb"], values["semantic_pool"], values["pass_tokens"]) == (None, "Infinity", 2048)


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("blokcs", ["blocks", "exact"]) == "did you mean 'blocks'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_variables_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rcllm.toml"
    path.write_text("[cache]\nmemory_mb = 100\npool_mb = 50\n[rank]\nparallel = true\n", encoding="utf-8")
    environ = {
        "RCLLM_CACHE_MEMORY_MB": "200",
        "RCLLM_MODEL_PATH": "7",
        "RCLLM_RANK_LEVEL": "tail(0.2)",
        "RCLLM_RANK_PARALLEL": "false",
        "RCLLM_RANK_SELECTION_WINDOW": "4",
        "RCLLM_HOME": "read elsewhere",
        "HOME": "not ours",
    }
    config = Config.load(path, environ)
    assert config.cache == CacheConfig(memory_mb=200, pool_mb=50)
    assert config.model.path == "7"
    assert config.rank == RankOptions(level=Level("tail", 0.2), selection=Selection(window=4))
    assert Config.load() == Config()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RCLLM_CACHE_MEMORY", "1", "unknown variable RCLLM_CACHE_MEMORY; did you mean 'RCLLM_CACHE_MEMORY_MB'"),
        ("RCLLM_CACHE_MEMORY_MB", "1.5", "RCLLM_CACHE_MEMORY_MB must be a whole number, got 1.5"),
        ("RCLLM_RANK_PARALLEL", "yes", "RCLLM_RANK_PARALLEL must be true or false, got 'yes'"),
        ("RCLLM_RANK_SELECTION_DIVERGENCE", "nan", "RCLLM_RANK_SELECTION_DIVERGENCE must be a finite number, got nan"),
        ("RCLLM_PROMPT_CONTEXT", "mean", "RCLLM_PROMPT_CONTEXT: unknown canonical context 'mean'"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^environment: {message}"):
        Config.load(None, {variable: value})


def test_more_threads_than_cores_are_refused_wherever_they_are_asked_for(tmp_path: Path) -> None:
    cores = num_usable_cores()
    expected = rf"threads: expected at most {cores}, the cores that this process may use, got {cores + 1}"
    with pytest.raises(ConfigError, match=rf"rcllm\.toml: model\.{expected}"):
        load(tmp_path, f"[model]\nthreads = {cores + 1}")
    with pytest.raises(ConfigError, match=rf"^model\.{expected}"):
        resolve(Config(ModelConfig(threads=cores + 1)), SMALL)
    assert resolve(Config(ModelConfig(threads=cores)), SMALL).model.threads == cores


def test_the_default_level_is_exact_until_a_calibration_says_otherwise() -> None:
    assert RankOptions().level == Level("auto")
    assert Open("causal").admit(RankOptions()).options.level == Level("exact")
    assert Open("blocks").admit(RankOptions()).options.level == Level("blocks")


def test_a_schedule_limits_nothing_until_it_is_told_to(tmp_path: Path) -> None:
    assert load(tmp_path, "[schedule]").schedule == ScheduleConfig()
    given = load(
        tmp_path, "[schedule]\nmax_waiting = 64\ndeadline_ms = 150.0\ntenant_shares = {gold = 3.0, free = 0.5}"
    )
    assert given.schedule == ScheduleConfig(64, deadline_ms=150.0, tenant_shares={"gold": 3.0, "free": 0.5})
    from_environment = Config.load(
        None, {"RCLLM_SCHEDULE_MAX_WAIT_MS": "80", "RCLLM_SCHEDULE_TENANT_SHARES": "{a = 2.0}"}
    )
    assert from_environment.schedule == ScheduleConfig(max_wait_ms=80, tenant_shares={"a": 2.0})
    with pytest.raises(ConfigError, match=r"schedule\.tenant_shares\.a must be above 0, got 0"):
        load(tmp_path, "[schedule]\ntenant_shares = {a = 0.0}")
    with pytest.raises(ConfigError, match=r"schedule\.max_waiting must be at least 0, got -1"):
        resolve(Config(schedule=ScheduleConfig(max_waiting=-1)), SMALL)
