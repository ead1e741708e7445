"""The page in a real browser, Debian's Chromium: it loads, ranks, and is readable and reachable for everybody."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from rcllm.config import ServerConfig
from rcllm.core.ranking import ItemId
from rcllm.errors import UncalibratedError
from rcllm.server.fake import FakeBackend
from rcllm.server.viewers import Viewer
from tests.server.live import living

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the driver
]
EVIL = "<img src=x onerror=\"document.title='broken into'\">"
ITEMS = {"a": "red lamp", "b": "blue lamp", "c": "red chair", "d": "old table", "e": EVIL, "f": "a plain stool"}
KEY = "a-key-of-eight"
VIEWER = Viewer("viewer 7", (ItemId("a"),), (ItemId("b"), ItemId("c")), (ItemId("c"),))
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Seen:
    """A page, and what it complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with living(FakeBackend(ITEMS), ServerConfig(), (VIEWER,)) as address:
        yield address


@pytest.fixture
def seen(browser: Any, site: str) -> Iterator[Seen]:
    """Wide and light, at the live view."""
    with_page = opened(browser, site)
    yield with_page
    with_page.page.context.close()
    assert with_page.complaints == []


def opened(browser: Any, address: str, viewport: dict[str, int] = WIDE, scheme: str = "light") -> Seen:
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_timeout(15_000)
    found = Seen(page)
    page.on("console", lambda message: found.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.goto(address)
    return found


def to_playground(page: Any) -> None:
    page.get_by_role("tab", name="Playground").click()


def rank_example(page: Any) -> None:
    to_playground(page)
    page.get_by_role("button", name="Fill in an example").click()
    page.locator("#candidates .chosen li").first.wait_for()
    page.get_by_role("button", name="Rank", exact=True).click()
    page.locator(".receipt").first.wait_for()


def test_the_live_view_fills_itself(seen: Seen) -> None:
    page = seen.page
    page.locator("#state", has_text="ready").wait_for()
    page.locator("#tiles div").first.wait_for()
    assert page.locator("#tiles dt").all_inner_texts()[:3] == ["Answered", "TTFT, median", "TTFT, P95"]
    assert page.locator("#cache-facts").inner_text().split()[:2] == ["Items", "6"]
    assert page.locator("#queue-time canvas").count() == 1
    assert page.locator("#queue-time").get_attribute("aria-label") == "0 wait, 0 are under way"


def test_a_ranking_shows_in_the_playground_and_then_in_the_figures(seen: Seen) -> None:
    page = seen.page
    rank_example(page)
    cards = page.locator(".answer h3").all_inner_texts()
    assert [text.split()[0] for text in cards] == ["exact", "auto"]
    assert page.locator(".answer").nth(1).locator(".move", has_text="same place").count() > 0
    block = page.locator(".prompt button").first
    block.hover()
    assert "from the device pool" in page.locator(".why").first.inner_text()
    page.get_by_role("tab", name="Live").click()
    page.locator("#ttft-table tbody tr th", has_text="exact").wait_for()
    page.locator("#ttft-spread canvas").wait_for()


def test_a_viewer_of_a_data_set_can_be_chosen(seen: Seen) -> None:
    page = seen.page
    to_playground(page)
    page.get_by_label("A viewer of the data set").select_option("viewer 7")
    page.locator("#candidates .chosen li").nth(1).wait_for()
    assert page.locator("#history .chosen li span").all_inner_texts() == ["red lamp"]
    page.get_by_role("button", name="Rank", exact=True).click()
    page.locator(".receipt").first.wait_for()
    assert page.locator(".answer").first.locator(".title").all_inner_texts() == ["blue lamp", "red chair ✓ chosen next"]


def test_a_title_that_is_markup_is_shown_as_text(seen: Seen) -> None:
    page = seen.page
    rank_example(page)
    for where in ("#candidates .chosen, #history .chosen", ".ranking", ".prompt"):
        assert page.locator(where).locator("img").count() == 0
    assert page.locator(".title", has_text=EVIL).count() + page.locator(".chosen", has_text=EVIL).count() > 0
    assert page.locator("button[aria-label*='onerror']").count() > 0
    assert page.title() == "rcllm"


def test_everything_is_reached_by_the_keyboard(seen: Seen) -> None:
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-playground"
    page.locator("#viewer").wait_for()  # it shows once the server has told of the data set's viewers
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "viewer"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "history-input"
    page.keyboard.type("my own words")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # to what was chosen
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "candidates-input"
    for _ in range(2):
        page.keyboard.type("lamp")
        page.locator("#candidates-options [role=option]", has_text="blue").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown") if _ else None
        assert page.locator("#candidates-input").get_attribute("aria-activedescendant")
        page.keyboard.press("Enter")
    assert page.locator("#candidates .chosen li").locator("span").all_inner_texts() == ["red lamp", "blue lamp"]
    page.keyboard.press("Enter")  # the input is empty: sends the form
    page.locator(".prompt button").first.wait_for()
    page.locator(".prompt button").first.focus()
    page.keyboard.press("ArrowRight")
    assert "blue lamp" in page.evaluate("document.activeElement.ariaLabel")
    assert "blue lamp" in page.locator(".why").first.inner_text()


def test_every_control_and_picture_has_a_name(seen: Seen) -> None:
    rank_example(seen.page)
    nameless = seen.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [role=img], [role=group], [role=listbox]')]
            .filter((each) => each.checkVisibility())
            .filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length))
            .map((each) => each.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_told_from_their_ground(browser: Any, site: str, scheme: str) -> None:
    seen = opened(browser, site, scheme=scheme)
    rank_example(seen.page)
    for view in ("playground", "live"):
        seen.page.locator(f"#tab-{view}").click()
        assert seen.page.evaluate(_WEAK) == [], f"{scheme}, {view}: contrast below 4.5"
    ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    seen.page.context.close()
    assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, site: str, scheme: str) -> None:
    seen = opened(browser, site, PHONE, scheme)
    seen.page.locator("#tiles div").first.wait_for()
    wider = "document.documentElement.scrollWidth - innerWidth"
    assert seen.page.evaluate(wider) <= 0
    rank_example(seen.page)
    assert seen.page.evaluate(wider) <= 0
    seen.page.context.close()
    assert seen.complaints == []


def test_a_key_is_asked_for_and_kept_nowhere(browser: Any) -> None:
    with living(FakeBackend(ITEMS), ServerConfig(api_keys=(KEY,))) as address:
        seen = opened(browser, address)
        page = seen.page
        for attempt in ("wrong-key", KEY):
            page.locator("#key-dialog[open]").wait_for()
            page.get_by_label("API key").fill(attempt)
            page.get_by_role("button", name="Open").click()
        page.locator("#state", has_text="ready").wait_for()
        rank_example(page)
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert KEY not in kept
        assert page.locator("#key").input_value() == ""
        page.reload()
        page.locator("#key-dialog[open]").wait_for()
        page.context.close()
    assert all("401" in complaint for complaint in seen.complaints), "the browser tells each 401"


def test_a_server_that_goes_is_told(browser: Any) -> None:
    with living(FakeBackend(ITEMS), ServerConfig(drain_s=0)) as address:
        seen = opened(browser, address)
        seen.page.locator("#state", has_text="ready").wait_for()
        seen.page.route("**/v1/dashboard", lambda route: route.abort())
        seen.page.locator("#state", has_text="no answer").wait_for()
        seen.page.unroute("**/v1/dashboard")
        seen.page.locator("#state", has_text="ready").wait_for()
        seen.page.context.close()


def test_a_refused_level_stands_beside_the_others(browser: Any) -> None:
    backend = FakeBackend(ITEMS)

    def rule(request: Any) -> Any:
        if str(request.options.level) == "auto":
            return UncalibratedError("no calibration allows it")
        return backend._rank(request)

    with living(FakeBackend(ITEMS, rule=rule)) as address:
        seen = opened(browser, address)
        rank_example(seen.page)
        assert seen.page.locator(".answer", has_text="403").locator(".wrong").inner_text() == "no calibration allows it"
        assert seen.page.locator(".ranking").count() == 1
        seen.page.context.close()


def test_what_follows_from_two_looks(seen: Seen) -> None:
    """Quantiles by the straight line within a bucket; differences by word; late answers are 503."""
    told = seen.page.evaluate(
        """async () => {
            const { grown, outcomes, quantile, spread, Samples } = await import('/page/samples.js');
            const requests = (counts, failed) => ({ requests: { ttft: [{ kind: 'rank', level: 'blocks', counts }],
                answered: { rank: 9 }, degraded: { level: 2 }, failed } });
            const old = requests([1, 0, 0], {});
            const now = requests([1, 4, 0], { overloaded: 3, deadline: 2, invalid: 1 });
            const samples = new Samples();
            for (const time_s of [0, 100, 1000, 1001]) samples.add({ time_s, started_s: 5 });
            const kept = samples.all.map((look) => look.time_s);
            samples.add({ time_s: 1002, started_s: 999 });
            const medians = [[0, 4, 0], [0, 0, 2], [0, 0, 0]].map((counts) => quantile(0.5, counts, [1, 2]));
            return [...medians, spread(now, old)[0].counts, spread(old, old).length, grown({ a: 3, b: 1 }, { a: 1 }),
                outcomes(now, null), kept, samples.all.length];
        }"""
    )
    assert told[:2] == [1500, 2000]
    assert math.isnan(told[2])
    assert told[3:6] == [[0, 4, 0], 0, {"a": 2, "b": 1}]
    assert told[6] == {"answered": 9, "degraded": 2, "r429": 3, "r503": 2, "other": 1}
    assert told[7:] == [[100, 1000, 1001], 1], "old looks go, and those of a server that was started anew"


# every visible text against the nearest ground that is painted
_WEAK = """() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const light = ({ r, g, b }) => {
    const part = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.a > 0.99) return colour;
    }
    return { r: 255, g: 255, b: 255 };
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const weak = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest('.hidden, .skip, script')) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) weak.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return weak;
}"""
