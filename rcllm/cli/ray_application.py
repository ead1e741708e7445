"""What Ray's own tools import to serve: `serve run rcllm.cli.ray_application:build items=… config=…`, and KubeRay.

Where `rcllm serve --cluster` begins an application and waits, these hand an application to a Ray cluster that is there
and goes on without them. Never imports ray itself. Invariant: what is wrong with the arguments is said before a replica
is begun.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcllm.cli.clustered import ServeRecipe, check_extra
from rcllm.cli.inputs import make_config
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions
from rcllm.config import for_serving
from rcllm.errors import ConfigError
from rcllm.late import Late
from rcllm.words import nearest

if TYPE_CHECKING:
    from rcllm.on_ray import application, recipe
    from rcllm.server import keys
else:
    application, recipe, keys = (
        Late(f"rcllm.{name}") for name in ("on_ray.application", "on_ray.recipe", "server.keys")
    )

_ANYWHERE = "0.0.0.0"  # Ray's proxy listens as its own configuration says, which is not ours to read


@dataclass(frozen=True, slots=True)
class Arguments:
    """What an application is told; every path is one that all nodes of the cluster can read."""

    items: str  # the catalogue
    config: str  # rcllm.toml, with a section [cluster]
    id_field: str | None = None
    decoder: str | None = None  # a folder of `rcllm sid train`: recommend as well

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        """Raises ConfigError, naming what is missing or unknown."""
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"unknown argument {name!r} of the application; {nearest(name, known)}")
            if not isinstance(value, str):
                raise ConfigError(f"argument {name!r} of the application: expected a text, got {value!r}")
        if missing := [name for name in ("items", "config") if name not in given]:
            raise ConfigError(f"the application needs the argument {missing[0]!r}, such as {missing[0]}=/data/…")
        return cls(**given)


def build(args: Mapping[str, Any]) -> Any:
    """The application, as Ray Serve takes it. Raises ConfigError, DataError.

    What clients change over HTTP lasts as long as this application: one that is deployed anew begins with the files.
    """
    arguments = Arguments.parse(args)
    check_extra()
    config = make_config(EngineOptions(config=Path(arguments.config)))
    config = replace(config, schedule=for_serving(config.schedule))
    keys.check_address(replace(config.server, host=_ANYWHERE))
    cluster = replace(config.cluster, address=config.cluster.address or "auto")
    items = ItemOptions(items=Path(arguments.items), id_field=arguments.id_field)
    decoder = None if arguments.decoder is None else Path(arguments.decoder)
    made = ServeRecipe(config, cluster, items, FidelityOptions(), decoder)
    application.placement_of(made.item_ids(), cluster)
    return application.application(recipe.Plan(made, cluster, uuid.uuid4().hex))
