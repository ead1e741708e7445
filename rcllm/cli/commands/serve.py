"""The options of `rcllm serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Of, Opt
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, RankingOptions, StoreOptions
from rcllm.cli.spread import spread
from rcllm.config import ServerConfig


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how it is served; over the section [server] of the configuration file."""

    host: Annotated[str | None, Of(ServerConfig, "host")] = None
    port: Annotated[int | None, Of(ServerConfig, "port")] = None
    served_name: Annotated[str | None, Of(ServerConfig, "served_name")] = None
    insecure: Annotated[bool, Of(ServerConfig, "insecure")] = False
    warm: Annotated[bool, Of(ServerConfig, "warm")] = True


@spread("rcllm.cli.serve:serve_command")
def serve(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    server: ServerOptions,
    name: Annotated[str | None, Opt("As --model.", name="MODEL")] = None,
    decoder: Annotated[
        Path | None,
        Opt("Also recommend, with this folder of `rcllm sid train`.", metavar="FOLDER", panel="Server"),
    ] = None,
    cluster: Annotated[
        str | None,
        Opt(
            "Answer with several replicas, on Ray: local:4 begins four on this machine; a file is the configuration, "
            "with a section [cluster].",
            metavar="local:N|FILE",
            panel="Server",
        ),
    ] = None,
    demo: Annotated[bool, Opt("Serve MovieLens with a small model, fetched once; needs no other option.")] = False,
) -> None:
    """Serve a model over HTTP: rank, recommend, rerank, score, complete and chat.

    Clients of OpenAI, Cohere and Jina, and score calls of vLLM and SGLang work as they are; docs/serving.md has an
    example for each address. Keys stand in the file (`[server]`, api_keys and admin_key), or in RCLLM_SERVER_API_KEYS
    and RCLLM_SERVER_ADMIN_KEY. Options go before the environment, that before the file. The first signal drains, a
    second one ends at once.

    Example: `rcllm serve --items items.parquet --config rcllm.toml`
    """
