"""What changes what is served: items, users, what is warm. All of it needs the admin key.

Knows nothing of how a change is made. Invariant: when the reply is sent, the change holds for every later answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rcllm.cluster.files import read_placement
from rcllm.core.ranking import ItemId, UserId, whose
from rcllm.data.text import well_formed
from rcllm.errors import UnknownItemError
from rcllm.server.backend import EraseUser, PlaceItems, PutItems, RemoveItems, WarmItems
from rcllm.server.reply import JsonReply
from rcllm.server.served import Ask
from rcllm.wire.bodies import read
from rcllm.wire.items import IdsBody, ItemBody, PlacementBody, WarmBody, item_of, parse_event, parse_items


async def put_item(ask: Ask) -> JsonReply:
    body = read(ItemBody, ask.value)
    item = item_of(body, well_formed(ask.path("item_id")))
    return await _changed(ask, PutItems((item,), {item.item_id: body.codes} if body.codes else {}))


async def put_items(ask: Ask) -> JsonReply:
    items, codes = parse_items(ask.value)
    ask.check_items(len(items), "items")
    return await _changed(ask, PutItems(tuple(items), codes))


async def delete_item(ask: Ask) -> JsonReply:
    item_id = ItemId(well_formed(ask.path("item_id")))
    return await _changed(ask, RemoveItems((item_id,)))


async def delete_items(ask: Ask) -> JsonReply:
    body = read(IdsBody, ask.value)
    ask.check_items(len(body.item_ids), "item_ids")
    return await _changed(ask, RemoveItems(body.item_ids))


async def _changed(ask: Ask, change: PutItems | RemoveItems) -> JsonReply:
    told = asdict(await ask.served.backend.change(change))
    del told["num_left"]  # of placements
    return JsonReply(told)


@contextmanager
def _about(field: str) -> Iterator[None]:
    """An item that is not there is told as the fault of this field."""
    try:
        yield
    except UnknownItemError as error:
        error.field = field
        raise


def _whose(user_id: UserId, ask: Ask) -> UserId:
    """The name under which a user's things are kept; `?tenant=` says whose user it is."""
    return whose(user_id, ask.tenant) or user_id


async def append_event(ask: Ask) -> JsonReply:
    user_id = UserId(well_formed(ask.path("user_id")))
    event = parse_event(ask.value)
    if event.item_id is not None:
        with _about("item_id"):
            ask.served.backend.items[event.item_id]  # raises where it is not there
    return JsonReply({"known_events": ask.served.histories.append(_whose(user_id, ask), (event,))})


async def erase_user(ask: Ask) -> JsonReply:
    """Events and receipts go, and every block of cached KV that was made of the user's words."""
    user_id = UserId(well_formed(ask.path("user_id")))
    name, served = _whose(user_id, ask), ask.served
    events, answers = served.histories.erase(name), served.answers.erase(name)  # first, so that none is run again
    changed = await served.backend.change(EraseUser(user_id, ask.tenant))
    answers += served.answers.erase(name)  # and last, so that none that was on its way stays
    return JsonReply({"num_blocks": changed.num_blocks, "num_events": events, "num_receipts": answers})


async def place(ask: Ask) -> JsonReply:
    """A cluster moves items between its replicas, while it answers; again, until `num_left` is 0."""
    body = read(PlacementBody, ask.value)
    placement = await asyncio.to_thread(read_placement, Path(body.file).expanduser())
    changed = await ask.served.backend.change(PlaceItems(placement, body.max_moves))
    moved = {"num_moved": changed.num_items, "num_left": changed.num_left}
    return JsonReply({**moved, "acknowledged": changed.acknowledged})


async def warm(ask: Ask) -> JsonReply:
    """Begins in the background; `/v1/cache/stats` says how far it is."""
    body = read(WarmBody, ask.value)
    with _about("item_ids"):
        await ask.served.backend.change(WarmItems(body.item_ids))
    return JsonReply(asdict(ask.served.backend.stats().warmth), status_code=202)
