"""Which column of a file holds what: as a user says, or else by the names that published data sets use.

Knows nothing of files. Invariant: a choice between several columns is never made in silence; where names do not settle
it, the row is refused with the option that does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rcllm.data.raw import Fields, Notes
from rcllm.data.rows import BadRowError
from rcllm.data.text import did_you_mean, listed

HISTORY_NAMES = ("history", "items")  # of the column with a user's list of items; the first is the one to write
_MAX_NAME = 200  # characters of a name that are compared
NO_CLOCK = ""  # as the name of the time column: the order of the rows stands for time

# Other names that published data sets use, in lower case and without signs: userid stands for User-ID and userId too.
_USERS = "userid user uid sessionid customerid visitorid reviewerid memberid profileid"
_ITEMS = (
    "itemid item iid asin parentasin isbn productid movieid bookid artistid trackid songid videoid newsid articleid "
    "businessid animeid gameid sku"
)
_TIMES = "timestamp time datetime date unixreviewtime eventtime createdat ts"


@dataclass(frozen=True, slots=True)
class InteractionColumns:
    """Which column of a log holds what. Where a name is None, the usual ones are tried."""

    user_id: str | None = None
    item_id: str | None = None
    timestamp: str | None = None  # number, datetime or ISO text; NO_CLOCK: the order of the rows stands for time
    units_per_second: float = 1.0  # of numeric timestamps: 1000 for milliseconds
    text: str = "text"  # may be absent
    rating: str = "rating"  # may be absent


@dataclass(frozen=True, slots=True)
class _Sought:
    what: str  # in words
    usual: str  # the name that wins over all others
    others: frozenset[str]  # simplified; of these, a file may have one alone
    option: str  # of the command line
    python: str


_USER = _Sought("the user", "user_id", frozenset(_USERS.split()), "--user-field", "InteractionColumns(user_id=…)")
_ITEM = _Sought("the item", "item_id", frozenset(_ITEMS.split()), "--item-field", "InteractionColumns(item_id=…)")
_TIME = _Sought("the time", "timestamp", frozenset(_TIMES.split()), "--time-field", "InteractionColumns(timestamp=…)")
_KEY = _Sought("the item's id", "item_id", _ITEM.others | {"id"}, "--id-field", "id_field=…")
_KEY_BESIDE_LOG = replace(_KEY, option=_ITEM.option, python=_ITEM.python)


def user_column(given: str | None, fields: Iterable[str], notes: Notes) -> str:
    """The column with the user. Raises BadRowError."""
    return _required(_USER, given, fields, notes)


def item_column(given: str | None, fields: Iterable[str], notes: Notes) -> str:
    """The column of a log with the item. Raises BadRowError."""
    return _required(_ITEM, given, fields, notes)


def has_item(given: str | None, fields: Fields) -> bool:
    """Whether the row has a column for one item."""
    return given in fields if given is not None else any(_simple(name) in _ITEM.others for name in fields)


def id_column(given: str | None, fields: Iterable[str], notes: Notes, log: InteractionColumns | None = None) -> str:
    """The column of a catalogue with the id. Raises BadRowError.

    `log`: of the interactions of the same data set, whose name for the item goes first where the items have it.
    """
    names = list(fields)
    if log is None:
        return _required(_KEY, given, names, notes)
    return _required(_KEY_BESIDE_LOG, log.item_id if given is None and log.item_id in names else given, names, notes)


def time_column(given: str | None, fields: Iterable[str], notes: Notes) -> str | None:
    """The column with the time; None where the order of the rows has to stand for it."""
    if given == NO_CLOCK:
        return None
    found = given or _chosen(_TIME, fields, notes)
    if found is None:
        notes.say(
            f"no column with the time was found, so that the order of the rows stands for it; columns: {listed(fields)}"
            f". If one of them is the time, name it ({_TIME.option}, in Python {_TIME.python})"
        )
    return found


def history_of(fields: Fields) -> object | None:
    """A user's own list, under either of its names; None where there is none. Raises BadRowError for both at once."""
    given = [name for name in HISTORY_NAMES if fields.get(name) is not None]
    if len(given) > 1:
        raise BadRowError(f"expected a user's items under one name, got both {' and '.join(map(repr, given))}")
    return fields[given[0]] if given else None


def _required(sought: _Sought, given: str | None, fields: Iterable[str], notes: Notes) -> str:
    names = list(fields)
    if given is None and (found := _chosen(sought, names, notes)):
        return found
    if given is not None and given in names:
        return given
    expected = f"a field {given!r}" if given is not None else f"a field with {sought.what} (such as {sought.usual})"
    hint = did_you_mean(sought.usual if given is None else given, names)
    raise BadRowError(
        f"expected {expected}, got only {listed(names) or 'an empty row'}; name the right one ({sought.option}, in "
        f"Python {sought.python}).{hint}"
    )


def _chosen(sought: _Sought, fields: Iterable[str], notes: Notes) -> str | None:
    """The column with a usual name; None where there is none. Raises BadRowError where several could be meant."""
    names = list(fields)
    if sought.usual in names:
        return sought.usual
    same = [name for name in names if _simple(name) == _simple(sought.usual)]
    found = same or [name for name in names if _simple(name) in sought.others]
    if len(found) > 1:
        raise BadRowError(
            f"expected one field with {sought.what}, got {listed(found)}; say which ({sought.option}, in Python "
            f"{sought.python})"
        )
    if not found:
        return None
    notes.say(f"{sought.what} was taken from the column {found[0]!r} ({sought.option} names another)")
    return found[0]


def _simple(name: str) -> str:
    return "".join(letter for letter in name[:_MAX_NAME].casefold() if letter.isalnum())
