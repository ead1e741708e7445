"""`rcllm doctor`: what this machine is and can do, and what is wrong with it.

Knows nothing of requests. Invariant: it downloads nothing, and keeps nothing; every finding says what to do about it.
"""

from __future__ import annotations

import os
from dataclasses import replace

import psutil
import torch
import typer
from rich.console import Console
from rich.text import Text

from rcllm.cli.inputs import make_config
from rcllm.cli.kept import Finding, Looked, build_for_probes, look_at_store, probe_tenants
from rcllm.cli.options import EngineOptions, StoreOptions
from rcllm.cli.screen import busy, console
from rcllm.cli.tables import facts_table
from rcllm.config import MIB, Config, context_samples
from rcllm.engine.engine import Engine
from rcllm.errors import RcllmError
from rcllm.model.attend.choose import native_fits
from rcllm.model.attend.native import INSTRUCTIONS, find_compiler, kernels
from rcllm.model.ceilings import Machine, describe_hardware, measure_bandwidth, measure_gemm, measure_narrow
from rcllm.model.decoder import Decoder
from rcllm.model.pull import local_folder
from rcllm.store.codec import DTYPES

_ITEM_TOKENS = 100
_ROWS = (64, 1024)  # fresh tokens of a request that reuses, and of one that does not
_BUSY = 0.5  # of the cores, by other processes
LEAST_MEMORY_GB = 3  # of a machine that serves the bundled model with default settings: a process takes 60 %


def doctor_command(engine_options: EngineOptions, store: StoreOptions) -> None:
    """Prints what it finds; ends with 1 for a problem."""
    config = make_config(engine_options, store=store)
    screen, findings = console(), list[Finding]()
    busy_share = psutil.cpu_percent(interval=0.5) / 100
    machine = describe_hardware()
    screen.print(facts_table("Machine", _machine(machine)))
    findings += _about_machine(machine, busy_share)
    with busy("looking at the store"):
        kept = look_at_store(config.store)
    engine, problem = _load(config)
    if engine is None:
        findings.append(Finding("problem", problem))
    else:
        screen.print(facts_table("\nModel and cache", _model(engine)))
        fact, advice = _native(engine)
        findings += advice
        with busy("measuring"):
            rates = _rates(engine)
        screen.print(facts_table("\nCompute", {"native kernels": fact} | rates))
        with busy("asking as two tenants"):
            tenants = probe_tenants(engine)
        kept = Looked({**kept.facts, **tenants.facts}, (*kept.findings, *tenants.findings))
    screen.print(facts_table("\nWhat is kept", kept.facts))
    findings += kept.findings
    _report(findings, screen)
    if any(finding.kind == "problem" for finding in findings):
        raise typer.Exit(1)


def _machine(machine: Machine) -> dict[str, str]:
    available = min(psutil.virtual_memory().available, machine.memory_bytes)
    return {
        "processor": f"{machine.cpu}, {machine.num_cores} cores, torch uses {machine.num_threads}",
        "instruction set": machine.instruction_set,
        "memory": f"{machine.memory_bytes / 1e9:,.1f} GB, {available / 1e9:,.1f} GB available",
        "GPU": machine.cuda_device or "none that torch sees",
        "torch": machine.torch_version,
    }


def _about_machine(machine: Machine, busy_share: float) -> list[Finding]:
    findings = []
    if machine.memory_bytes < LEAST_MEMORY_GB * 1e9:
        findings.append(
            Finding(
                "advice",
                f"this machine has {machine.memory_bytes / 1e9:.1f} GB of memory; the bundled model needs "
                f"{LEAST_MEMORY_GB} GB with default settings, else --memory-mb 1700",
            )
        )
    if busy_share > _BUSY:
        findings.append(
            Finding(
                "advice",
                f"other processes use {busy_share:.0%} of the processor. Threads then wait for each other, and "
                "requests take many times as long: stop them, or leave them cores with --threads",
            )
        )
    if machine.num_threads > machine.num_cores:
        findings.append(
            Finding(
                "advice",
                f"torch uses {machine.num_threads} threads, but this process may use {machine.num_cores} cores: "
                f"--threads {machine.num_cores}",
            )
        )
    return findings


def _load(config: Config) -> tuple[Engine | None, str]:
    """The engine with a made-up item, or why there is none."""
    if local_folder(config.model.path) is None:
        return None, f"the model {config.model.path!r} is not on this machine: rcllm pull {config.model.path}"
    if context_samples(config.prompt.context):  # needs data, and changes nothing that is looked at here
        config = replace(config, prompt=replace(config.prompt, context="instruction"))
    try:
        with busy("loading the model"):
            return build_for_probes(config), ""
    except RcllmError as error:
        return None, str(error)


def _model(engine: Engine) -> dict[str, str]:
    spec, config = engine.decoder.spec, engine.config
    per_token = spec.kv_bytes_per_token(engine.pool.dtype.itemsize)
    budget, limit = engine.stats().budget_bytes, config.cache.memory_mb * MIB
    fitting = budget // (per_token * _ITEM_TOKENS)
    return {
        "model": f"{config.model.path}: {spec.family}, {spec.num_weights / 1e6:,.0f} M weights, "
        f"{spec.num_layers} layers, {engine.decoder.max_positions:,} positions",
        "computes in": f"{config.model.dtype} on {config.model.device}",
        "weights": _weights(engine.decoder),
        "cached KV": f"{per_token:,} bytes per token in {config.cache.kv_dtype}",
        "budget": f"{budget / 1e6:,.0f} MB for cached KV, of {limit / 1e6:,.0f} MB for the process",
        "fits": f"{fitting:,} items of {_ITEM_TOKENS} tokens as candidates; half as many as candidates and as events",
    }


def _weights(decoder: Decoder) -> str:
    """What they are kept in, and what that changed."""
    size = f"{decoder.kept}, {decoder.matrix_bytes / 1e6:,.0f} MB"
    if decoder.kept == "full":
        return f"{size}; model.weights int8 takes less, and reads less in each pass of few tokens"
    if decoder.num_rounded == 0:
        return f"{size}; every value as in the model's files"
    where = "" if decoder.device.type == "cpu" else " on a CPU"  # a GPU has no room for full weights beside
    rounded = f"{decoder.num_rounded:,} matrices are rounded to 8 bits"
    return f"{size}; {rounded}, which rcllm calibrate{where} tells the cost of"


def _native(engine: Engine) -> tuple[str, list[Finding]]:
    """Whether the compiled kernels are in use, and if not, what to do about it."""
    decoder = engine.decoder
    if decoder.kernels is not None:
        return "compiled and in use", []
    if decoder.device.type != "cpu":
        return "not needed on a GPU", []
    slower = "everything works without them, several times slower"
    if not native_fits(decoder.spec, decoder.dtype, decoder.device):
        why = f"do not fit this model ({engine.config.model.dtype}, heads of {decoder.spec.head_dim})"
        return why, [
            Finding(
                "advice",
                f"the native kernels {why}: they need fp32, bf16 or int8, and heads of a multiple of 32; {slower}",
            )
        ]
    if os.environ.get("RCLLM_NATIVE") == "0":
        return "switched off", [Finding("advice", f"RCLLM_NATIVE=0 switches the native kernels off; {slower}")]
    if find_compiler() is None:
        install = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), or set CXX"
        return "no C++ compiler", [Finding("advice", f"the native kernels need a C++ compiler: {install}; {slower}")]
    assert kernels() is None
    return "could not be compiled", [
        Finding("advice", f"{find_compiler()} cannot compile the native kernels, which need g++ 9 or later; {slower}")
    ]


def _rates(engine: Engine) -> dict[str, str]:
    decoder = engine.decoder
    dtype: torch.dtype = DTYPES[engine.config.model.dtype]
    rates = {rows: measure_gemm(rows, decoder.spec, dtype, decoder.device) for rows in _ROWS}
    narrow = INSTRUCTIONS if decoder.device.type == "cpu" else ()
    return {f"products in {products}": _narrow(decoder, products) for products in narrow} | {
        "matrix products": ", ".join(f"{rate:,.0f} GFLOP/s at {rows:,} fresh tokens" for rows, rate in rates.items()),
        "memory": f"read at {measure_bandwidth(decoder.device) / 1e9:,.1f} GB/s",
    }


def _narrow(decoder: Decoder, products: str) -> str:
    """What this processor would gain by model.dtype bf16 or int8, or gains."""
    quick = {rows: measure_narrow(products, decoder.spec, rows, decoder.kernels) for rows in _ROWS}
    times = ", ".join(f"{ratio:.2f} at {rows:,} fresh tokens" for rows, ratio in quick.items())
    instruction = INSTRUCTIONS[products]
    if decoder.kernels is None or products not in decoder.kernels.products:
        return f"imitated, without {instruction} or native kernels; times the speed of fp32: {times}"
    option = "--dtype int8 --weights int8" if products == "int8" else f"--dtype {products}"
    use = "" if decoder.products == products else f"; rcllm calibrate {option} tells what it costs in quality"
    return f"{instruction}; times the speed of fp32: {times}{use}"


def _report(findings: list[Finding], screen: Console) -> None:
    if not findings:
        screen.print("\nNothing to improve.", style="green")
    for finding in findings:
        colour = "bold red" if finding.kind == "problem" else "yellow"
        screen.print(Text.assemble((f"\n{finding.kind}: ", colour), finding.text), soft_wrap=True)
