"""The published review corpora: Amazon 2023, Amazon 2018 and 2014, Yelp Open Dataset, Goodreads (UCSD).

Each format is a pair of sources and a loader. Knows nothing of requests. Invariant: field names and texts are the
publisher's, except that the name of a thing is always `title`; what changes from day to day is volatile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data.catalogue import make_item
from rcllm.data.dataset import Dataset, InteractionSource, ItemSource, assemble, assemble_textless
from rcllm.data.raw import Fields, Notes
from rcllm.data.rows import (
    BadRowError,
    RowReader,
    optional_number,
    optional_text,
    required_id,
    required_number,
    required_time,
)
from rcllm.data.text import as_text, shown

_VOLATILE = ("price", "average_rating", "rating_number", "stars", "review_count", "ratings_count")
_NO_PRICE = ("None", "—", "-")  # how some of the publishers write that there is none
_PRICE = re.compile(r"[^{}<>;:]{0,20}\d[^{}<>;:]{0,30}")  # "$12.99", "from 5", "$1.10 - $9.99", "1.299,00 €"


def load_amazon_2023(folder: Path, *, strict: bool = False) -> Dataset:
    """`NAME.jsonl[.gz]` and `meta_NAME.jsonl[.gz]`, joined by `parent_asin`. https://amazon-reviews-2023.github.io"""
    notes = Notes()
    items = ItemSource(
        ("meta_*.jsonl", "meta_*.jsonl.gz"), lambda fields: _amazon_2023_item(fields, notes), notes=notes
    )
    reviews = InteractionSource(("*.jsonl", "*.jsonl.gz"), _amazon_2023_review, but_not="meta_")
    return assemble_textless(folder, items, reviews, strict=strict)


def load_amazon_2018(folder: Path, *, strict: bool = False) -> Dataset:
    """`NAME[_5].json[.gz]` and `meta_NAME.json[.gz]`. https://nijianmo.github.io/amazon

    Also the edition of 2014, whose files have the same names and whose metadata are Python literals.
    """
    notes = Notes()
    items = ItemSource(("meta_*.json", "meta_*.json.gz"), lambda fields: _amazon_2018_item(fields, notes), notes=notes)
    reviews = InteractionSource(("*.json", "*.json.gz"), _amazon_2018_review, but_not="meta_")
    return assemble_textless(folder, items, reviews, strict=strict)


def load_yelp(folder: Path, *, strict: bool = False) -> Dataset:
    """`yelp_academic_dataset_business.json` and `…_review.json`. https://business.yelp.com/data/resources/open-dataset"""
    items = ItemSource(("yelp_academic_dataset_business.json*",), _yelp_business)
    reviews = InteractionSource(("yelp_academic_dataset_review.json*",), _yelp_review)
    return assemble(folder, items, reviews, strict=strict)


def load_goodreads(folder: Path, *, strict: bool = False) -> Dataset:
    """`goodreads_books*.json[.gz]` with `goodreads_interactions*` or `goodreads_reviews*`; names of authors where
    `goodreads_book_authors.json[.gz]` is there too. https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html
    """
    names: dict[str, str] = {}
    for path in sorted(folder.glob("goodreads_book_authors.json*"))[:1]:
        names = dict(RowReader(path, strict=strict).parsed(_goodreads_author))
    items = ItemSource(("goodreads_books*.json*",), lambda fields: _goodreads_book(fields, names))
    log = InteractionSource(("goodreads_interactions*.json*", "goodreads_reviews*.json*"), _goodreads_interaction)
    return assemble(folder, items, log, strict=strict)


def _amazon_2023_item(fields: Fields, notes: Notes) -> Item:
    names = ("title", "store", "categories", "features", "description", "average_rating", "rating_number", "price")
    texts = {name: as_text(fields.get(name)) for name in names}
    return _priced_item(required_id(fields, "parent_asin"), texts, notes)


def _amazon_2023_review(fields: Fields) -> tuple[Interaction]:
    return (
        Interaction(
            UserId(required_id(fields, "user_id")),
            ItemId(required_id(fields, "parent_asin")),
            required_time(fields, "timestamp", units_per_second=1000),
            optional_text(fields, "text") or optional_text(fields, "title"),
            required_number(fields, "rating"),
        ),
    )


def _amazon_2018_item(fields: Fields, notes: Notes) -> Item:
    texts = {
        "title": as_text(fields.get("title")),
        "brand": as_text(fields.get("brand")),
        "categories": as_text(fields.get("category")) or _joined(fields.get("categories")),
        "features": as_text(fields.get("feature")),
        "description": as_text(fields.get("description")),
        "price": as_text(fields.get("price")),
    }
    return _priced_item(required_id(fields, "asin"), texts, notes)


def _amazon_2018_review(fields: Fields) -> tuple[Interaction]:
    return (
        Interaction(
            UserId(required_id(fields, "reviewerID")),
            ItemId(required_id(fields, "asin")),
            required_time(fields, "unixReviewTime"),
            optional_text(fields, "reviewText") or optional_text(fields, "summary"),
            required_number(fields, "overall"),
        ),
    )


def _joined(paths: object) -> str:
    """The categories of 2014, lists of paths such as [["Books", "Kids"]], each name once."""
    names = (as_text(name) for path in (paths if isinstance(paths, list) else []) for name in _as_list(path))
    return as_text(list(dict.fromkeys(names)))


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _priced_item(item_id: str, texts: Mapping[str, str], notes: Notes) -> Item:
    """An item without what stands for no price, such as the style sheets that leaked into the edition of 2018."""
    price = texts["price"]
    if price in _NO_PRICE or not _PRICE.fullmatch(price):
        if price and price not in _NO_PRICE:
            notes.count("a text without a price stood in price, and was left out")
        texts = {name: text for name, text in texts.items() if name != "price"}
    return make_item(item_id, texts, _VOLATILE)


def _yelp_business(fields: Fields) -> Item:
    texts = {
        "title": as_text(fields.get("name")),
        "categories": as_text(fields.get("categories")),
        "city": as_text(fields.get("city")),
        "state": as_text(fields.get("state")),
        "stars": as_text(fields.get("stars")),
        "review_count": as_text(fields.get("review_count")),
    }
    return make_item(required_id(fields, "business_id"), texts, _VOLATILE)


def _yelp_review(fields: Fields) -> tuple[Interaction]:
    return (
        Interaction(
            UserId(required_id(fields, "user_id")),
            ItemId(required_id(fields, "business_id")),
            required_time(fields, "date"),
            optional_text(fields, "text"),
            required_number(fields, "stars"),
        ),
    )


# ---- Goodreads ------------------------------------------------------------------------------------------------------

_NUM_SHELVES = 5
# Shelves that say what a reader does with a book, not what it is about.
_NO_TOPIC = (
    "to-read currently-reading read owned books-i-own my-books favorites favourites default wish-list library "
    "kindle ebook ebooks e-book e-books to-buy audiobook audiobooks audio dnf re-read i-own maybe"
)
_READING_SHELVES = frozenset(_NO_TOPIC.split())
_CALENDAR = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"
_MONTHS = {name: f"{month:02}" for month, name in enumerate(_CALENDAR.split(), 1)}


def _goodreads_author(fields: Fields) -> tuple[str, str]:
    return required_id(fields, "author_id"), as_text(fields.get("name"))


def _goodreads_book(fields: Fields, author_names: Mapping[str, str]) -> Item:
    authors = [author_names.get(author_id, "") for author_id in _each(fields, "authors", "author_id")]
    shelves = [name for name in _each(fields, "popular_shelves", "name") if name not in _READING_SHELVES]
    texts = {
        "title": as_text(fields.get("title")),
        "authors": as_text(authors),
        "shelves": as_text(shelves[:_NUM_SHELVES]),
        "description": as_text(fields.get("description")),
        "average_rating": as_text(fields.get("average_rating")),
        "ratings_count": as_text(fields.get("ratings_count")),
    }
    return make_item(required_id(fields, "book_id"), texts, _VOLATILE)


def _each(fields: Fields, name: str, inner: str) -> list[str]:
    """The `inner` field of each object in the list `name`; both may be absent."""
    objects = fields.get(name) or []
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise BadRowError(f"expected a list of objects in {name!r}, got {shown(objects)}")
    return [as_text(each.get(inner)) for each in objects]


def _goodreads_interaction(fields: Fields) -> tuple[Interaction]:
    when = optional_text(fields, "date_added") or optional_text(fields, "date_updated")
    return (
        Interaction(
            UserId(required_id(fields, "user_id")),
            ItemId(required_id(fields, "book_id")),
            _goodreads_seconds(when),
            optional_text(fields, "review_text") or optional_text(fields, "review_text_incomplete"),
            optional_number(fields, "rating") or None,  # 0 stands for no rating
        ),
    )


def _goodreads_seconds(when: str | None) -> float:
    """Reads `Mon Jan 04 10:01:02 -0800 2016` in any locale."""
    try:
        _, month, day, clock, zone, year = (when or "").split()
        return datetime.fromisoformat(f"{year}-{_MONTHS[month]}-{day}T{clock}{zone}").timestamp()
    except (ValueError, KeyError):
        raise BadRowError(f"expected 'Mon Jan 04 10:01:02 -0800 2016' in 'date_added', got {shown(when)}") from None
