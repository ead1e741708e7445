"""`rcllm place`. Knows nothing of how placements are found or requests routed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from rcllm.cli.commands.place import RoomOptions
from rcllm.cli.inputs import Inputs, load_inputs, tell_read
from rcllm.cli.options import ItemOptions
from rcllm.cli.outputs import check_apart, check_file
from rcllm.cli.screen import busy, console, say
from rcllm.cli.tables import facts_table
from rcllm.cluster.evaluate import Report, evaluate
from rcllm.cluster.files import read_placement, write_placement
from rcllm.cluster.logs import LogReport, collect_log, read_requests
from rcllm.cluster.moves import differing, matched, plan_moves
from rcllm.cluster.options import PolicyName, TrialConfig
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import PlacedHoldings, Placement, Room
from rcllm.cluster.route import make_route
from rcllm.cluster.statistics import collect
from rcllm.cluster.trial import Trial, make_trial
from rcllm.cluster.view import ClusterView, NodeState, RoutedBlock, RoutedRequest
from rcllm.config import ClusterConfig, RouteName
from rcllm.core.ranking import ItemId
from rcllm.data import load_dataset
from rcllm.data.text import did_you_mean
from rcllm.durable import write, writing
from rcllm.errors import ConfigError, UnknownItemError
from rcllm.wire.lines import one_line

_CHARACTERS = 4  # of a token of ordinary text
_SPARE = 1.1  # catalogues that one copy takes: partitions may be 5 % out of balance, and hot items are everywhere
_FEW = 12  # nodes that a table shows


def build_command(
    item_options: ItemOptions, out: Path, room: RoomOptions, policy: PolicyName, log: Path | None, trial: TrialConfig
) -> None:
    """Writes the placement, and says how it does on requests that it has not seen, where there are any."""
    check_file(out, item_options, log)
    inputs = load_inputs(item_options)
    sizes = _sizes(inputs, room)
    made = None
    if log is not None:
        with busy("reading the log"):
            statistics, report = collect_log(log, sizes)
        _tell(report)
    else:
        made = _trial(inputs, trial)
        with busy("counting requests"):
            statistics = collect(made.past, made.item_ids, list(sizes.values()))
    with busy("placing items"):
        placement = make_place(policy, seed=trial.seed)(statistics, _room(room, sizes))
    with writing(out):
        write_placement(out, placement)
    console().print(facts_table("Placement", _facts(placement, out)))
    if placement.evicted.any():
        say(f"warning: {placement.evicted.sum():,} items fit on no node: give more memory, by --node-gb or --copies")
    if made is not None:
        _show(evaluate(placement, statistics, made.held_out), placement)


def eval_command(
    placement: Path, held_out: Path | None, log: Path | None, dataset: Path | None, format: str, trial: TrialConfig
) -> None:
    """Shows the report."""
    placed = read_placement(placement)
    sizes = dict(zip(placed.item_ids, placed.num_bytes.tolist(), strict=True))
    if dataset is not None:
        with busy("reading items"):
            data = load_dataset(format, dataset)
        tell_read(data.reports, data.notes)
        made = make_trial(data, trial)
        if made.item_ids != placed.item_ids:
            raise ConfigError(f"{placement} was made of other items than {dataset} has; build it from that data set")
        statistics, asked = collect(made.past, made.item_ids, placed.num_bytes), made.held_out
    elif held_out is not None:
        asked, report = read_requests(held_out, placed.item_ids)
        _tell(report)
        statistics, report = collect_log(log or held_out, sizes)
        if log is not None:
            _tell(report)
        else:
            say("note: without --log, edges, heat and prices are those of the requests that are judged", "dim")
    else:
        raise ConfigError("there are no requests: give --held-out FILE (a log) or --dataset FOLDER")
    _show(evaluate(placed, statistics, asked), placed)


def diff_command(
    old: Path, new: Path, log: Path | None, max_moves: int | None, moves: Path | None, out: Path | None
) -> None:
    """Shows what changes, and writes the moves and the placement after them."""
    check_file(moves, old, new, log)
    check_file(out, old, new, log)
    check_apart(moves=moves, out=out)
    before, goal = read_placement(old), read_placement(new)
    goal = matched(before, goal)
    heat = np.ones(before.num_items)
    if log is not None:
        statistics, report = collect_log(log, dict(zip(before.item_ids, before.num_bytes.tolist(), strict=True)))
        _tell(report)
        heat = statistics.heat
    plan = plan_moves(before, goal, heat, max_moves)
    facts = {what: f"{number:,} items" for what, number in differing(before, goal)}
    owned = sum(move.becomes_owner for move in plan.moves)
    facts["moves"] = f"{len(plan.moves):,} copies of {plan.num_bytes / 1e9:,.2f} GB, {owned:,} to new owners"
    facts["left"] = f"{plan.num_left:,} copies" + (", for the next plan" if plan.num_left else "")
    console().print(facts_table("Difference", facts))
    if moves is not None:
        with writing(moves):
            write(moves, "".join(json.dumps(asdict(move)) + "\n" for move in plan.moves).encode())
    if out is not None:
        with writing(out):
            write_placement(out, plan.after)


def explain_command(
    placement: Path, item: str | None, request: str | None, policy: RouteName, load: tuple[str, ...]
) -> None:
    """Says where an item is, or which node answers a request."""
    placed = read_placement(placement)
    if item is None and request is None:
        raise ConfigError("expected --item ID or --request FILE:LINE, got neither")
    if item is not None:
        console().print(facts_table(f"Item {item}", _where(placed, item)))
    if request is not None:
        _explain_request(placed, request, policy, _loads(placed, load))


def _explain_request(placed: Placement, where: str, policy: str, loads: Mapping[int, float]) -> None:
    asked = one_line(where)
    numbers = {item_id: number for number, item_id in enumerate(placed.item_ids)}
    unknown = [each for each in asked.candidates if each not in numbers]
    if unknown:
        say(f"note: {len(unknown):,} candidates are not in the placement, such as {unknown[0]!r}: no node holds them")
    sizes = {each: int(placed.num_bytes[numbers[each]]) for each in asked.candidates if each in numbers}
    blocks = tuple(_block(each, sizes.get(each, 0)) for each in asked.candidates)
    full_s = ClusterConfig().full_queue_ms / 1e3
    loaded = [loads.get(node, 0.0) for node in range(placed.room.num_nodes)]
    nodes = [NodeState(str(node), load * full_s, load) for node, load in enumerate(loaded)]
    view = ClusterView.of(nodes, PlacedHoldings.of(placed))
    console().print(make_route(policy)(view, RoutedRequest(0, blocks)).explain(), markup=False)


def _block(item_id: ItemId, num_bytes: int) -> RoutedBlock:
    """Of an item that has so many bytes of KV, with a token's as `rcllm place build` has them by default."""
    return RoutedBlock(item_id, num_bytes, max(1, num_bytes // RoomOptions().bytes_per_token))


def _where(placed: Placement, item: str) -> dict[str, str]:
    if item not in placed.item_ids:
        raise UnknownItemError(f"the placement has no item {item!r}.{did_you_mean(item, placed.item_ids)}")
    number = placed.item_ids.index(ItemId(item))
    facts = {"bytes": f"{placed.num_bytes[number]:,}"}
    if placed.replicated[number]:
        return facts | {"held": "by every node, for it is among the hottest"}
    if placed.evicted[number]:
        return facts | {"held": "by no node, for there was no room; it is computed when it is asked for"}
    copies = [node for node, halo in enumerate(placed.halos) if number in halo]
    facts["owner"] = f"node {placed.owner[number]}"
    for node in copies[:_FEW]:
        place = int(np.flatnonzero(placed.halos[node] == number)[0]) + 1
        facts[f"copy on node {node}"] = f"number {place:,} of {len(placed.halos[node]):,} that its requests miss most"
    return facts


def _loads(placed: Placement, given: tuple[str, ...]) -> dict[int, float]:
    found = {}
    for each in given:
        node, _, share = each.partition("=")
        try:
            found[int(node)] = float(share)
        except ValueError:
            raise ConfigError(f"expected --load NODE=SHARE, such as 3=0.9, got {each!r}") from None
        if not (0 <= int(node) < placed.room.num_nodes and 0.0 <= float(share) <= 1.0):
            raise ConfigError(f"expected --load of a node below {placed.room.num_nodes} and from 0 to 1, got {each!r}")
    return found


def _sizes(inputs: Inputs, room: RoomOptions) -> dict[ItemId, int]:
    """Bytes of the KV of each item."""
    if room.tokens_per_item is not None:
        return dict.fromkeys(inputs.catalogue, room.tokens_per_item * room.bytes_per_token)
    say(
        f"note: tokens of items are estimated, one for {_CHARACTERS} characters; --tokens-per-item says otherwise",
        "dim",
    )
    return {
        item_id: max(1, sum(map(len, item.fields.values())) // _CHARACTERS) * room.bytes_per_token
        for item_id, item in inputs.catalogue.items()
    }


def _room(room: RoomOptions, sizes: Mapping[ItemId, int]) -> Room:
    if room.node_gb is not None:
        return Room(room.nodes, int(room.node_gb * 1e9))
    return Room(room.nodes, int(max(room.copies, _SPARE if room.copies >= 1 else 0) * sum(sizes.values()) / room.nodes))


def _trial(inputs: Inputs, config: TrialConfig) -> Trial:
    if inputs.dataset is None:
        raise ConfigError("there are no requests: give --log FILE, or --dataset FOLDER to make some from")
    with busy("making requests"):
        return make_trial(inputs.dataset, config)


def _tell(report: LogReport) -> None:
    tell_read([report.rows])
    if report.num_unknown:
        say(f"warning: {report.num_unknown:,} mentions of items that are not known were left out")
    if report.num_pruned:
        say(
            f"note: {report.num_pruned:,} pairs of items were forgotten to bound memory: the rarest of each item", "dim"
        )


def _facts(placement: Placement, out: Path) -> dict[str, str]:
    room = placement.room
    return {
        "file": str(out),
        "policy": placement.policy,
        "nodes": f"{room.num_nodes:,} of {room.node_bytes / 1e9:,.2f} GB",
        "items": f"{placement.num_items:,} of {placement.num_bytes.sum() / 1e9:,.2f} GB",
        "strata": f"{placement.replicated.sum():,} replicated, {placement.sharded.sum():,} sharded, "
        f"{placement.evicted.sum():,} evicted; {sum(map(len, placement.halos)):,} copies in halos",
    }


def _show(report: Report, placement: Placement) -> None:
    balance = report.balance
    facts = {
        "requests": f"{report.num_requests:,} that the placement has not seen",
        "on the best node": f"{report.best:.1%} of a request's items; {report.best_p10:.0%} or less in one of ten",
        "without copies": f"{report.owned:.1%}",
        "with load in mind": f"{report.spread:.1%}; the fullest node gets {balance.spread:.2f} × the mean of requests, "
        f"and {balance.requests:.2f} × where the best node answers",
        "edge cut": f"{report.edge_cut:.1%} of the weight of pairs lies between two owners",
        "balance": f"the fullest owner has {balance.num_bytes:.3f} × the mean in bytes, {balance.heat:.3f} × in heat",
    }
    console().print(facts_table("On held-out requests", facts))
    console().print(_strata_table(report))


def _strata_table(report: Report) -> Table:
    table = Table(title="GB by stratum", title_justify="left")
    names = tuple(report.bytes_by_stratum[0])
    for name in ("node", *names, "all"):
        table.add_column(name, justify="right")
    for row in _rows(report, names):
        table.add_row(*row)
    return table


def _rows(report: Report, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for node, used in enumerate(report.bytes_by_stratum[:_FEW]):
        values = [used[name] for name in names]  # type: ignore[index]
        yield (str(node), *(f"{value / 1e9:,.2f}" for value in (*values, sum(values))))
    if (more := len(report.bytes_by_stratum) - _FEW) > 0:
        yield (f"and {more} more", *("" for _ in names), "")
