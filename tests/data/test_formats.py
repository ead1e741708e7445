"""Every published format, on small files in the publisher's layout, each with malformed rows on known lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import (
    FORMATS,
    Dataset,
    InteractionColumns,
    detect_format,
    fetch_movielens,
    histories,
    load_dataset,
    movielens,
)
from rcllm.errors import ConfigError, DataError


def write(folder: Path, name: str, *lines: str, encoding: str = "utf-8") -> None:
    raw = "".join(line + "\n" for line in lines).encode(encoding)
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def row(user: str, item: str, when: float, text: str | None = None, rating: float | None = None) -> Interaction:
    return Interaction(UserId(user), ItemId(item), when, text, rating)


def load(name: str, folder: Path, bad_lines: dict[str, list[int]]) -> Dataset:
    """Loads by name and by detection, and checks the reported lines and that strict mode stops at the first."""
    dataset = load_dataset(name, folder)
    assert detect_format(folder) == name
    reported = {report.path.name: [each.line for each in report.problems] for report in dataset.reports}
    assert reported == bad_lines
    for file, lines in bad_lines.items():
        if lines:
            with pytest.raises(DataError, match=rf"{file}, line {lines[0]}: expected "):
                load_dataset("auto", folder, strict=True)
            break
    else:
        assert load_dataset("auto", folder, strict=True).interactions == dataset.interactions
    return dataset


def test_common(tmp_path: Path) -> None:
    write(tmp_path, "items.jsonl", '{"item_id": "1", "title": "A", "genres": ["x", "y"]}', '{"item_id": "1"}')
    write(tmp_path, "users.jsonl", '{"user_id": "u", "items": ["1", "1"]}', '{"user_id": "v", "items": ["9"]}')
    dataset = load("common", tmp_path, {"items.jsonl": [2], "users.jsonl": [2]})
    assert list(dataset.catalogue.values()) == [Item(ItemId("1"), {"title": "A", "genres": "x, y"})]
    assert dataset.interactions == (row("u", "1", 0), row("u", "1", 1))
    assert str(dataset).startswith(f"{tmp_path.name}: 1 items, 2 interactions\n{tmp_path / 'items.jsonl'}: 1 rows read")


AMAZON_REVIEW = (
    '{"rating": 5.0, "title": "Nice", "text": "Works well.", "images": [], "asin": "B00V", "parent_asin": "B00P", '
    '"user_id": "AGK", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}'
)


def test_amazon_2023(tmp_path: Path) -> None:
    write(
        tmp_path,
        "meta_All_Beauty.jsonl.gz",
        '{"main_category": "All Beauty", "title": "Spray", "average_rating": 4.8, "rating_number": 10, '
        '"features": ["Light", "Vegan"], "description": [], "price": 12.5, "images": [], "videos": [], '
        '"store": "Herb", "categories": ["Hair"], "details": {"Form": "Spray"}, "parent_asin": "B00P"}',
        '{"title": "no id"}',
        '{"title": "Comb", "price": "None", "parent_asin": "B00Q", "description": ["Long", "fine"]}',
    )
    write(
        tmp_path,
        "All_Beauty.jsonl.gz",
        AMAZON_REVIEW,
        AMAZON_REVIEW.replace("1588687728923", '"noon"'),
        AMAZON_REVIEW.replace("Works well.", "").replace("B00P", "B00Q"),
        AMAZON_REVIEW.replace("B00P", "B00X"),
        AMAZON_REVIEW[:40],
    )
    dataset = load("amazon_2023", tmp_path, {"meta_All_Beauty.jsonl.gz": [2], "All_Beauty.jsonl.gz": [2, 4, 5]})
    assert list(dataset.catalogue.values()) == [
        Item(
            ItemId("B00P"),
            {"title": "Spray", "store": "Herb", "categories": "Hair", "features": "Light, Vegan"},
            {"price": "12.5", "average_rating": "4.8", "rating_number": "10"},
        ),
        Item(ItemId("B00Q"), {"title": "Comb", "description": "Long, fine"}),
    ]
    assert dataset.interactions == (
        row("AGK", "B00P", 1588687728.923, "Works well.", 5),
        row("AGK", "B00Q", 1588687728.923, "Nice", 5),
    )


def test_amazon_2023_without_metadata_has_items_without_text(tmp_path: Path) -> None:
    write(tmp_path, "All_Beauty.jsonl", AMAZON_REVIEW)
    dataset = load("amazon_2023", tmp_path, {"All_Beauty.jsonl": []})
    assert list(dataset.catalogue.values()) == [Item(ItemId("B00P"), {})]


def test_amazon_2018(tmp_path: Path) -> None:
    review = (
        '{"overall": 4.0, "verified": true, "reviewTime": "09 1, 2016", "reviewerID": "A3C", "asin": "B01", '
        '"reviewText": "As advertised.", "summary": "Five Stars", "unixReviewTime": 1472688000}'
    )
    write(tmp_path, "All_Beauty_5.json.gz", review, review.replace('"asin"', '"isbn"'), review)
    write(
        tmp_path,
        "meta_All_Beauty.json.gz",
        '{"asin": "B01", "title": "Gel", "brand": "Ice", "category": ["Beauty", "Skin"], "price": "$12.99"}',
    )
    dataset = load("amazon_2018", tmp_path, {"meta_All_Beauty.json.gz": [], "All_Beauty_5.json.gz": [2]})
    fields = {"title": "Gel", "brand": "Ice", "categories": "Beauty, Skin"}
    assert list(dataset.catalogue.values()) == [Item(ItemId("B01"), fields, {"price": "$12.99"})]
    assert dataset.interactions == (row("A3C", "B01", 1472688000, "As advertised.", 4),) * 2


def test_yelp(tmp_path: Path) -> None:
    write(
        tmp_path,
        "yelp_academic_dataset_business.json",
        '{"business_id": "P1", "name": "St Honore", "city": "Philadelphia", "state": "PA", "stars": 4.0, '
        '"review_count": 80, "attributes": {"WiFi": "free"}, "categories": "Bakeries, Food", "hours": null}',
        '{"business_id": null, "name": "?"}',
    )
    review = (
        '{"review_id": "K", "user_id": "mh", "business_id": "P1", "stars": 3.0, "useful": 0, '
        '"text": "Decent.", "date": "2018-07-07 22:09:11"}'
    )
    write(tmp_path, "yelp_academic_dataset_review.json", review.replace("2018-07-07 22", "July"), review)
    dataset = load(
        "yelp", tmp_path, {"yelp_academic_dataset_business.json": [2], "yelp_academic_dataset_review.json": [1]}
    )
    assert list(dataset.catalogue.values()) == [
        Item(
            ItemId("P1"),
            {"title": "St Honore", "categories": "Bakeries, Food", "city": "Philadelphia", "state": "PA"},
            {"stars": "4", "review_count": "80"},
        )
    ]
    assert dataset.interactions == (row("mh", "P1", 1531001351, "Decent.", 3),)


BOOK = (
    '{"book_id": "12", "title": "Dawn", "description": "A tale.", "average_rating": "4.03", "ratings_count": "", '
    '"authors": [{"author_id": "6", "role": ""}, {"author_id": "7", "role": ""}], '
    '"popular_shelves": [{"count": "90", "name": "to-read"}, {"count": "9", "name": "fantasy"}]}'
)
READING = (
    '{"user_id": "8e", "book_id": "12", "review_id": "r", "is_read": true, "rating": 4, '
    '"review_text_incomplete": "Oh", "date_added": "Mon Jan 04 10:01:02 -0800 2016", "date_updated": "", "read_at": ""}'
)


def test_goodreads(tmp_path: Path) -> None:
    write(tmp_path, "goodreads_books_poetry.json.gz", BOOK, '{"book_id": "13", "authors": "me"}')
    write(tmp_path, "goodreads_book_authors.json.gz", '{"author_id": "6", "name": "Ann Lee"}')
    write(
        tmp_path,
        "goodreads_interactions_poetry.json.gz",
        READING,
        READING.replace("Mon Jan 04", "Monday"),
        READING.replace('"rating": 4', '"rating": 0'),
    )
    files: dict[str, list[int]] = {"goodreads_books_poetry.json.gz": [2], "goodreads_interactions_poetry.json.gz": [2]}
    dataset = load("goodreads", tmp_path, files)
    assert list(dataset.catalogue.values()) == [
        Item(
            ItemId("12"),
            {"title": "Dawn", "authors": "Ann Lee", "shelves": "fantasy", "description": "A tale."},
            {"average_rating": "4.03"},
        )
    ]
    assert dataset.interactions == (row("8e", "12", 1451930462, "Oh", 4), row("8e", "12", 1451930462, "Oh"))


def test_goodreads_reviews_without_author_names(tmp_path: Path) -> None:
    write(tmp_path, "goodreads_books.json.gz", BOOK)
    review = READING.replace("review_text_incomplete", "review_text")
    dated = review.replace('"date_added": "Mon Jan 04 10:01:02 -0800 2016"', '"date_added": ""')
    updated = dated.replace('"date_updated": ""', '"date_updated": "Thu Jan 01 00:00:09 +0000 1970"')
    write(tmp_path, "goodreads_reviews_dedup.json.gz", review, updated)
    dataset = load("goodreads", tmp_path, {"goodreads_books.json.gz": [], "goodreads_reviews_dedup.json.gz": []})
    assert "authors" not in dataset.catalogue[ItemId("12")].fields
    assert dataset.interactions == (row("8e", "12", 1451930462, "Oh", 4), row("8e", "12", 9, "Oh", 4))


def test_movielens_100k(tmp_path: Path) -> None:
    flags = ["0|1|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0", "1" + "|0" * 18]
    write(
        tmp_path,
        "u.item",
        f"1|Les Misérables (1995)|01-Jan-1995||http://us.imdb.com/x|{flags[0]}",
        f"2|unknown||||{flags[1]}",
        f"3|short|{flags[0]}",
        f"4|wrong flag||||2{flags[0][1:]}",
        encoding="latin-1",
    )
    write(tmp_path, "u.data", "196\t1\t3\t881250949", "196\t3\t3\t881250949", "196\t1\tx\t881250949", "1 1 1 1")
    dataset = load("movielens_100k", tmp_path, {"u.item": [3, 4], "u.data": [2, 3, 4]})
    assert list(dataset.catalogue.values()) == [
        Item(ItemId("1"), {"title": "Les Misérables (1995)", "genres": "Action, Comedy"}),
        Item(ItemId("2"), {"title": "unknown"}),
    ]
    assert dataset.interactions == (row("196", "1", 881250949, rating=3),)


def test_movielens_1m(tmp_path: Path) -> None:
    write(tmp_path, "movies.dat", "1::Café: 1::Drama|War", "2::none", encoding="latin-1")
    write(tmp_path, "ratings.dat", "7::1::5::978300760", "7::1::5", "7::2::5::978300760")
    dataset = load("movielens_1m", tmp_path, {"movies.dat": [2], "ratings.dat": [2, 3]})
    assert list(dataset.catalogue.values()) == [Item(ItemId("1"), {"title": "Café: 1", "genres": "Drama, War"})]
    assert dataset.interactions == (row("7", "1", 978300760, rating=5),)


def test_movielens_latest(tmp_path: Path) -> None:
    write(
        tmp_path,
        "movies.csv",
        "movieId,title,genres",
        '1,"Good, the Bad (1966)",Western|Drama',
        "2,Other (2000),(no genres listed)",
        ",No id,Drama",
    )
    write(
        tmp_path, "ratings.csv", "userId,movieId,rating,timestamp", "1,1,2.5,1260759144", "1,2,,", "1,2,4.0,1260759179"
    )
    dataset = load("movielens_latest", tmp_path, {"movies.csv": [4], "ratings.csv": [3]})
    assert list(dataset.catalogue.values()) == [
        Item(ItemId("1"), {"title": "Good, the Bad (1966)", "genres": "Western, Drama"}),
        Item(ItemId("2"), {"title": "Other (2000)"}),
    ]
    assert dataset.interactions == (row("1", "1", 1260759144, rating=2.5), row("1", "2", 1260759179, rating=4))


INTER = ("user_id:token\titem_id:token\trating:float\ttimestamp:float", "196\t1\t3\t881250949")
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float",
    '1\tToy "Story"\t1995\tAnimation Children\'s\t2.50',
)


def test_recbole(tmp_path: Path) -> None:
    write(tmp_path, "ml.inter", *INTER, "196\t1\t3", "196\t2\t3\t881250949")
    write(tmp_path, "ml.item", *ITEM, "2\t\t")
    dataset = load("recbole", tmp_path, {"ml.item": [3], "ml.inter": [3, 4]})
    fields = {"title": 'Toy "Story"', "year": "1995", "genres": "Animation Children's"}
    assert list(dataset.catalogue.values()) == [Item(ItemId("1"), fields, {"price": "2.50"})]
    assert dataset.interactions == (row("196", "1", 881250949, rating=3),)


def test_recbole_without_items_or_types(tmp_path: Path) -> None:
    write(tmp_path, "ml.inter", *INTER)
    assert list(load("recbole", tmp_path, {"ml.inter": []}).catalogue) == ["1"]
    write(tmp_path, "ml.inter", "user_id\titem_id\ttimestamp", "1\t2\t3")
    with pytest.raises(DataError, match="expected a column header like user_id:token"):
        load_dataset("recbole", tmp_path)


def test_several_files_of_a_format_are_read_together(tmp_path: Path) -> None:
    write(tmp_path, "A.jsonl", AMAZON_REVIEW)
    write(tmp_path, "B.jsonl", AMAZON_REVIEW.replace("B00P", "B00Q"))
    dataset = load_dataset("amazon_2023", tmp_path)
    assert list(dataset.catalogue) == ["B00P", "B00Q"]
    assert [report.path.name for report in dataset.reports] == ["A.jsonl", "B.jsonl"]


def test_an_item_in_two_files_is_a_malformed_row_of_the_second(tmp_path: Path) -> None:
    write(tmp_path, "meta_A.jsonl", '{"parent_asin": "B00P", "title": "first"}')
    write(tmp_path, "meta_B.jsonl", '{"parent_asin": "B00Q"}', '{"parent_asin": "B00P", "title": "second"}')
    write(tmp_path, "A.jsonl", AMAZON_REVIEW)
    dataset = load("amazon_2023", tmp_path, {"meta_B.jsonl": [2], "meta_A.jsonl": [], "A.jsonl": []})
    assert dataset.catalogue[ItemId("B00P")].fields == {"title": "first"}


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a data format \(auto, common, .*got 'yalp'\. Did you mean 'yelp'"):
        load_dataset("yalp", tmp_path)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_folder_without_the_files_says_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected a folder with"):
        load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected a file named .*, got an empty folder"):
        load_dataset(name, tmp_path)
    with pytest.raises(DataError, match="name the format, or call the files items and interactions"):
        load_dataset("auto", tmp_path)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was fetched, as requirement and member; a file of one row comes."""
    asked: list[tuple[str, str]] = []

    def from_wheel(requirement: str, member: str, destination: Path, sha256: str) -> Path:
        asked.append((requirement, member))
        destination.parent.mkdir(parents=True, exist_ok=True)
        write(destination.parent, destination.name, *(ITEM if destination.suffix == ".item" else INTER))
        assert len(sha256) == 64
        return destination

    monkeypatch.setattr(movielens, "from_wheel", from_wheel)
    return asked


def test_fetched_movielens_is_loaded_from_pinned_files(tmp_path: Path, fetched: list[tuple[str, str]]) -> None:
    assert len(fetch_movielens(tmp_path).interactions) == 1
    assert fetched == [
        ("recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.item"),
        ("recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.inter"),
    ]


def test_movielens_stands_for_a_folder_that_is_fetched(
    tmp_path: Path, fetched: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("auto", "movielens").interactions) == 1
    assert (tmp_path / "home" / "data" / "ml-100k" / "ml-100k.item").is_file()
    with pytest.raises(DataError, match="expected a folder with"):
        load_dataset("yelp", "movielens")


def test_a_folder_called_movielens_is_read_itself(
    tmp_path: Path, fetched: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "movielens").mkdir()
    with pytest.raises(DataError, match="give movielens, a small data set that is fetched"):
        load_dataset("auto", "movielens")
    assert not fetched


@pytest.mark.slow
def test_movielens_can_be_fetched(tmp_path: Path) -> None:
    dataset = fetch_movielens(tmp_path)
    assert (len(dataset.catalogue), len(dataset.interactions)) == (1682, 100_000)
    fields = {"title": "Toy Story", "year": "1995", "genres": "Animation Children's Comedy"}
    assert dataset.catalogue[ItemId("1")] == Item(ItemId("1"), fields)


def test_recbole_without_a_clock_keeps_the_order_of_the_parts(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float"
    write(tmp_path, "x.test.inter", header, "u\tc\t1")
    write(tmp_path, "x.train.inter", header, "u\ta\t1")
    write(tmp_path, "x.valid.inter", header, "u\tb\t1")
    dataset = load_dataset("auto", tmp_path)
    assert [each.item_id for each in histories(dataset.interactions)[UserId("u")]] == ["a", "b", "c"]
    assert "the order of the rows stands for it" in str(dataset)


def test_recbole_with_other_columns(tmp_path: Path) -> None:
    write(tmp_path, "x.inter", "listener:token\tartist_id:token\twhen:float", "u\t7\t5", "u\t9\t3")
    write(tmp_path, "x.item", "artist_id:token\tname:token_seq", "7\tThe Bees", "9\tThe Dees")
    with pytest.raises(DataError, match=r"expected a field with the user .*'listener'.*--user-field"):
        load_dataset("auto", tmp_path)
    columns = InteractionColumns(user_id="listener", timestamp="when")
    dataset = load_dataset("auto", tmp_path, columns=columns)
    assert dataset.interactions == (row("u", "7", 5), row("u", "9", 3))
    assert dataset.catalogue[ItemId("7")].fields == {"title": "The Bees"}
    with pytest.raises(ConfigError, match="the columns of yelp are fixed"):
        load_dataset("yelp", tmp_path, columns=columns)


def test_a_folder_of_items_and_interactions_is_what_it_looks_like(tmp_path: Path) -> None:
    write(tmp_path, "items.jsonl", '{"item_id": "1", "title": "A"}')
    write(tmp_path, "inter.jsonl", '{"user_id": "u", "item_id": "1", "timestamp": 5}')
    dataset = load("common", tmp_path, {"items.jsonl": [], "inter.jsonl": []})
    assert dataset.interactions == (row("u", "1", 5),)
    dataset = load_dataset("auto", tmp_path)
    assert dataset.notes == ("the folder was read as common, because of inter.jsonl",)
    assert str(dataset).splitlines()[1] == "  the folder was read as common, because of inter.jsonl"


def test_items_may_call_their_id_as_their_interactions_do(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", "code,title", "a,A", "b,B")
    write(tmp_path, "interactions.csv", "who,code,ts", "u,a,5", "u,b,6")
    with pytest.raises(DataError, match=r"items.csv.*--item-field"):
        load_dataset("auto", tmp_path, columns=InteractionColumns(user_id="who"))
    dataset = load_dataset("auto", tmp_path, columns=InteractionColumns(user_id="who", item_id="code"))
    assert dataset.catalogue[ItemId("a")] == Item(ItemId("a"), {"title": "A"})
    assert dataset.interactions == (row("u", "a", 5), row("u", "b", 6))


def test_items_with_a_usual_id_beside_a_column_of_another_name(tmp_path: Path) -> None:
    write(tmp_path, "items.jsonl", '{"item_id": "a", "title": "A"}', '{"code": "b", "title": "B"}')
    write(tmp_path, "inter.csv", "user_id,code,ts", "u,a,5")
    dataset = load_dataset("auto", tmp_path, columns=InteractionColumns(item_id="code"))
    assert list(dataset.catalogue) == ["a"], "the first row settles the column"
    assert [problem.line for problem in dataset.reports[0].problems] == [2]


def test_a_folder_that_may_be_two_things_says_so(tmp_path: Path) -> None:
    write(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp", "1,1,2.5,1260759144")
    write(tmp_path, "movies.csv", "movieId,title,genres", "1,A,War")
    write(tmp_path, "ml.inter", *INTER)
    assert load_dataset("auto", tmp_path).notes == (
        "the folder was read as movielens_latest, because of ratings.csv",
        "ml.inter points to recbole: to read it so, name the format (--format)",
    )


def test_any_other_json_lines_are_not_taken_for_amazon(tmp_path: Path) -> None:
    write(tmp_path, "things.jsonl", '{"thing": 1}')
    with pytest.raises(DataError, match=r"expected a folder with one of users\.jsonl \(common\).*got 'things\.jsonl'"):
        load_dataset("auto", tmp_path)


def test_amazon_2014_metadata_are_python_literals(tmp_path: Path) -> None:
    write(tmp_path, "meta_X.json", "{'asin': '1', 'title': \"Kid's\", 'price': 9.5, 'categories': [['B', 'K'], ['B']]}")
    write(
        tmp_path, "reviews_X_5.json", '{"reviewerID": "A", "asin": "1", "overall": 5.0, "unixReviewTime": 1252800000}'
    )
    for name in ("auto", "amazon_2014"):
        dataset = load_dataset(name, tmp_path)
        expected = Item(ItemId("1"), {"title": "Kid's", "categories": "B, K"}, {"price": "9.5"})
        assert list(dataset.catalogue.values()) == [expected]
        assert "Python literals" in str(dataset)


@pytest.mark.parametrize(
    ("price", "kept"),
    [
        ("$12.99", True),
        ("from 5.00", True),
        ("$1.10 - $9.99", True),
        ("1.299,00 €", True),
        (".a-box-inner{background-color:#fff}", False),
        ("<span>3</span>", False),
        ("9" * 60, False),
    ],
)
def test_a_style_sheet_is_no_price(tmp_path: Path, price: str, kept: bool) -> None:
    write(tmp_path, "meta_X.json", f'{{"asin": "1", "price": "{price}"}}')
    write(tmp_path, "X_5.json", '{"reviewerID": "A", "asin": "1", "overall": 5.0, "unixReviewTime": 1252800000}')
    dataset = load_dataset("amazon_2018", tmp_path)
    assert (dataset.catalogue[ItemId("1")].volatile == {"price": price}) is kept
    assert (dataset.reports[0].notes == ()) is kept


def test_files_that_are_passed_over_are_named(tmp_path: Path) -> None:
    write(tmp_path, "items.jsonl", '{"item_id": "1"}')
    write(tmp_path, "items.csv", "item_id", "2")
    write(tmp_path, "users.jsonl", '{"user_id": "u", "history": ["1"]}')
    write(tmp_path, "inter.jsonl", '{"user_id": "u", "item_id": "1"}')
    assert load_dataset("common", tmp_path).notes == (
        "'items.csv' stayed unread, because items.jsonl is there too",
        "'inter.jsonl' stayed unread, because users.jsonl is there too",
    )
