"""The options of `rcllm cache`: what is kept on disk, and its care."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Opt
from rcllm.cli.options import EngineOptions, ItemOptions, StoreOptions
from rcllm.cli.spread import spread

Folder = Annotated[
    Path | None,
    Opt("The store; default as configured: $RCLLM_HOME/store, else ~/.cache/rcllm/store.", metavar="FOLDER"),
]


@spread("rcllm.cli.cache:warm_command")
def warm(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    store: StoreOptions,
    limit: Annotated[int | None, Ge(1), Opt("Only the first N items, the most popular first; the rest waits.")] = None,
    dry_run: Annotated[bool, Opt("Keep nothing: compute --limit items, and say what the catalogue needs.")] = False,
    cluster: Annotated[
        str | None,
        Opt(
            "Compute the shard of each replica of `rcllm serve --cluster`, with as many processes, on Ray.",
            metavar="local:N|FILE",
        ),
    ] = None,
) -> None:
    """Compute a catalogue ahead of requests, and keep it on disk.

    Blocks that are there are skipped, so an interrupted run goes on where it ended, and after a change of the catalogue
    only the items whose text changed are computed. With --dataset, the most popular items come first. Other processes
    may rank from the same store meanwhile.

    Example: `rcllm warm --items items.jsonl`
    """


@spread("rcllm.cli.stored:stats_command")
def stats(
    engine_options: EngineOptions,
    store_folder: Folder = None,
    as_json: Annotated[bool, Opt("As one JSON object.", name="--json")] = False,
) -> None:
    """Show what is kept: blocks, bytes and rates, and which model they belong to.

    Blocks of another model, adapter, template or dtype are never read. `rcllm cache prune` removes those that the
    configuration given here does not read.

    Example: `rcllm cache stats`
    """


@spread("rcllm.cli.stored:verify_command")
def verify(
    store_folder: Folder = None,
    repair: Annotated[bool, Opt("Drop what is damaged, and make all records agree.")] = False,
) -> None:
    """Read every block against its checksum.

    Ends with 1 where something is damaged and was not repaired.

    Example: `rcllm cache verify --repair`
    """


@spread("rcllm.cli.stored:compact_command")
def compact(store_folder: Folder = None) -> None:
    """Give disk space back that removed blocks took.

    No process may have the store open.

    Example: `rcllm cache compact`
    """


@spread("rcllm.cli.stored:erase_command")
def erase(
    store: StoreOptions,
    user: Annotated[tuple[str, ...], Opt("A user whose blocks go. May repeat.", metavar="ID")] = (),
    item: Annotated[tuple[str, ...], Opt("An item whose blocks go. May repeat.", metavar="ID")] = (),
    tenant: Annotated[str, Opt("The tenant that the users belong to.", metavar="NAME")] = "",
    drafts: Annotated[
        Path | None, Opt("Remove the users from this folder of draft pools as well.", metavar="FOLDER")
    ] = None,
    scrub: Annotated[bool, Opt("Overwrite what was removed, so that no byte of it is left in the file.")] = False,
) -> None:
    """Remove users or items from every tier.

    Each is a line in audit.jsonl beside the store, without its name. Processes that have the store open let go of the
    same blocks with their next request. A semantic pool is a file made of users' texts: build it again with
    `rcllm pool build --exclude-users`.

    Example: `rcllm cache erase --user ann --scrub`
    """


@spread("rcllm.cli.stored:prune_command")
def prune(
    engine_options: EngineOptions,
    store_folder: Folder = None,
    unused_days: Annotated[
        float | None, Ge(0), Opt("Only what no process has used for so many days, whatever it belongs to.")
    ] = None,
) -> None:
    """Remove blocks that the model, adapter, template and dtype do not read.

    Those of the configuration that is given here; with --unused-days, it does not matter.

    Example: `rcllm cache prune --unused-days 30`
    """


@spread("rcllm.cli.stored:export_command")
def export(
    to: Annotated[Path, Opt("A folder to make.", metavar="FOLDER")],
    store_folder: Folder = None,
) -> None:
    """Copy the store into a folder to take to another machine.

    A manifest with checksums lies beside the blocks.

    Example: `rcllm cache export --to warmed`
    """


@spread("rcllm.cli.stored:import_command")
def import_(
    source: Annotated[Path, Opt("What `rcllm cache export` made.", metavar="FOLDER", name="--from")],
    store_folder: Folder = None,
    disk_mb: Annotated[
        int | None, Ge(1), Opt("Disk that the store may use; default a quarter of what is free.")
    ] = None,
) -> None:
    """Take the blocks of an export into the store, each checked.

    Example: `rcllm cache import --from warmed`
    """
