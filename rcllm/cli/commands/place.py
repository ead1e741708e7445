"""The options of `rcllm place build`, `eval`, `diff` and `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Opt
from rcllm.cli.options import ItemOptions
from rcllm.cli.spread import Without, spread
from rcllm.cluster.options import PolicyName, TrialConfig
from rcllm.config import RouteName

_ROOM, _LOG = "Nodes and their memory", "Requests"
_FEW = ("field", "delimiter", "encoding", "volatile")
Past = Annotated[
    Path | None,
    Opt(
        "Log of past requests (.jsonl, .parquet, packed or not), streamed: a row per request, with a list of item ids "
        "in candidates (or items).",
        metavar="FILE",
        panel=_LOG,
    ),
]


@dataclass(frozen=True, slots=True)
class RoomOptions:
    """How many nodes there are, and how much of their memory is for items."""

    nodes: Annotated[int, Ge(1), Opt("How many.", panel=_ROOM)] = 8
    node_gb: Annotated[
        float | None, Ge(0), Opt("Memory of each for items, in 10^9 bytes; else --copies.", panel=_ROOM)
    ] = None
    copies: Annotated[float, Ge(0), Opt("Memory of all nodes, in catalogues.", panel=_ROOM)] = 2.0
    bytes_per_token: Annotated[int, Ge(1), Opt("KV of one token; 147456: Qwen3-8B in 16 bits.", panel=_ROOM)] = 147_456
    tokens_per_item: Annotated[
        int | None, Ge(1), Opt("Of every item; else a token for 4 characters of its text.", panel=_ROOM)
    ] = None


@spread("rcllm.cli.place:build_command")
def build(
    item_options: Annotated[ItemOptions, Without(_FEW)],
    out: Annotated[Path, Opt("The placement.", metavar="FILE.json")],
    room: RoomOptions,
    policy: Annotated[
        PolicyName,
        Opt(
            "learned: METIS and copies that are found in rounds. spread: the same with load in mind. halo: copies in "
            "one pass. The others make no copies.",
        ),
    ] = "learned",
    log: Past = None,
    *,
    trial: TrialConfig,
) -> None:
    """Decide which node holds which items, from the requests of the past.

    The hottest items go to every node, the others to one owner each; what is left of a node's memory holds copies of
    what the requests that come to it miss most. Say --log for your own requests, or --dataset to make some from the
    histories of users.

    Example: `rcllm place build --items items.jsonl --log requests.jsonl --nodes 8 --node-gb 64 --out placement.json`
    """


@spread("rcllm.cli.place:eval_command")
def evaluate(
    placement: Annotated[Path, Opt("Of `rcllm place build`.", metavar="FILE.json", name="--placement")],
    held_out: Annotated[
        Path | None,
        Opt("Log of requests that the placement has not seen; like --log.", metavar="FILE", panel=_LOG),
    ] = None,
    log: Past = None,
    dataset: Annotated[
        Path | None,
        Opt("Instead of logs: requests made from it, of those held out.", metavar="FOLDER|movielens", panel=_LOG),
    ] = None,
    format: Annotated[str, Opt("Format of the data set; auto tells it.", metavar="NAME", panel=_LOG)] = "auto",
    *,
    trial: TrialConfig,
) -> None:
    """Tell what a placement is worth: a request's items on its best node.

    Tells the balance of the nodes, too.

    Example: `rcllm place eval --placement placement.json --held-out yesterday.jsonl --log requests.jsonl`
    """


@spread("rcllm.cli.place:diff_command")
def diff(
    old: Annotated[Path, Opt("The placement as it is.", metavar="FILE.json")],
    new: Annotated[Path, Opt("The placement to come to, of the same items and nodes.", metavar="FILE.json")],
    log: Annotated[
        Path | None, Opt("Log of requests: hot items move first. Else all are alike.", metavar="FILE")
    ] = None,
    max_moves: Annotated[int | None, Ge(0), Opt("Copies to make, at most; else as many as it takes.")] = None,
    moves: Annotated[Path | None, Opt("Where the moves go, as JSON lines.", metavar="FILE.jsonl")] = None,
    out: Annotated[Path | None, Opt("The placement after these moves.", metavar="FILE.json")] = None,
) -> None:
    """Show what changes from one placement to another, and plan bounded moves.

    Nodes are numbered so that most bytes stay. A block is served by its old owner until the new one has it.

    Example: `rcllm place diff --old now.json --new better.json --max-moves 1000 --moves moves.jsonl --out next.json`
    """


@spread("rcllm.cli.place:explain_command")
def explain(
    placement: Annotated[Path, Opt("Of `rcllm place build`.", metavar="FILE.json", name="--placement")],
    item: Annotated[str | None, Opt("An item: where it is.", metavar="ID")] = None,
    request: Annotated[str | None, Opt("A request: which node answers it, and why.", metavar="FILE:LINE")] = None,
    policy: Annotated[RouteName, Opt("Routes the request.")] = "affinity",
    load: Annotated[
        tuple[str, ...],
        Opt("Load of a node, 0 to 1 (a queue of a second); others have none. May repeat.", metavar="NODE=SHARE"),
    ] = (),
) -> None:
    """Explain where an item is, or which node would answer a request.

    Example: `rcllm place explain --placement placement.json --request requests.jsonl:1 --load 3=0.9`
    """
