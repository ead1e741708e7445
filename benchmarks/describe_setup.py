"""What the parts of `benchmarks.describe` share: the workloads, the warm pools, and answers that are kept between runs.

Knows nothing of what is measured. Invariant: a pool never holds an answer to a prompt that is measured with it; kept
answers fill pools and features, and are never timed.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from benchmarks.harness import SHARED, console
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.decoding import Speculation
from rcllm.core.ranking import Event, ItemId, UserId
from rcllm.data import Dataset, histories
from rcllm.describe.options import DescribeOptions, Kind
from rcllm.describe.profiles import Profile
from rcllm.describe.writer import GeneratorWriter, to_route
from rcllm.drafts.folder import DraftPools
from rcllm.drafts.groups import Router
from rcllm.engine.engine import Engine
from rcllm.errors import answered
from rcllm.fetch import cache_dir

MAX_EVENTS = 15
NONE, STRICT = Speculation("none"), Speculation("strict")
RELAXED, WIDE = Speculation("relaxed", 2, 0.1), Speculation("relaxed", 5, 0.02)
_RELAXED_VERSION = "2"  # answers that were kept by another rule than today's are made again


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Prompts to measure, and what their pool is learned from: earlier answers of the same model to other prompts."""

    name: str
    kind: Kind
    tested: tuple[Profile, ...]
    earlier: tuple[Profile, ...]
    texts: tuple[str, ...] = ()  # besides, texts of another model


class Workbench:
    """An engine for one kind of profile, and the answers that it gave before."""

    def __init__(self, kind: Kind, max_tokens: int, data: Dataset, model: ModelConfig | None = None) -> None:
        prompt, cache = PromptConfig(f"describe_{kind}"), CacheConfig(pool_mb=1500)
        config = Config(model or ModelConfig(), prompt=prompt, cache=cache)
        self.kind, self.data = kind, data
        self.engine = Engine.build(data.catalogue, config)
        self.max_tokens = max_tokens
        self.kept = Kept(cache_dir() / "benchmarks" / "describe-answers.jsonl")

    def options(self, speculation: Speculation, batch: int) -> DescribeOptions:
        return DescribeOptions(
            kind=self.kind, max_tokens=self.max_tokens, speculation=speculation, batch=batch, max_events=MAX_EVENTS
        )

    def writer(self, speculation: Speculation, batch: int, pools: Path | None = None) -> GeneratorWriter:
        writer = GeneratorWriter(self.engine, self.options(speculation, batch))
        if pools is not None and speculation != NONE:
            writer.load(pools)
        return writer

    def answers(self, profiles: Sequence[Profile], speculation: Speculation) -> list[Answered]:
        """Answers, from the file of kept ones where they are; drafted from pools that begin empty."""
        version = _RELAXED_VERSION if speculation.name == "relaxed" else ""
        made_with = f"{speculation} {version} {self.max_tokens}"
        writer = self.writer(speculation, 16)
        keys = [self._key(writer, profile, made_with) for profile in profiles]
        missing = [profile for profile, key in zip(profiles, keys, strict=True) if key not in self.kept]
        if missing:
            by_id = {str(profile.row): self._key(writer, profile, made_with) for profile in missing}
            requests = writer.requests(missing, [0] * len(missing))
            with console.status(f"{len(missing)} answers, {speculation}") as status:
                for number, (request, found) in enumerate(writer.generator.stream(requests), 1):
                    [answer] = answered([found])
                    self.kept.add(by_id[request.request_id], Answered(answer.text, answer.token_ids))
                    status.update(f"{number} of {len(missing)} answers, {speculation}")
        return [self.kept[key] for key in keys]

    def warm_pools(self, scenario: Scenario, folder: Path, router: Router | None = None) -> Path:
        """A folder of pools that hold the answers to the scenario's earlier profiles."""
        writer = GeneratorWriter(self.engine, self.options(STRICT, 16), router)
        assert writer.pools is not None
        self.learn(writer.pools, scenario)
        writer.save(folder)
        return folder

    def learn(self, pools: DraftPools, scenario: Scenario) -> None:
        lead = self.lead
        earlier = self.answers(scenario.earlier, NONE)
        for profile, answer in zip(scenario.earlier, earlier, strict=True):
            pools.learn(to_route(profile, self.kind, self.data.catalogue), (*lead, *answer.token_ids))
        for number, text in enumerate(scenario.texts):
            ids = self.engine.prompter.tokenizer.encode(" " + text)
            pools.learn(to_route(Profile(0, f"text {number}", ()), self.kind, self.data.catalogue), ids)

    @property
    def lead(self) -> tuple[int, ...]:
        """The last tokens of every prompt."""
        prompter = self.engine.prompter
        return prompter.tokenizer.encode_control(prompter.template.answer)[-4:]

    def _key(self, writer: GeneratorWriter, profile: Profile, made_with: str) -> str:
        prompt = json.dumps(writer.prompt_ids(profile))
        return blake3(f"{writer.identity} {made_with} {prompt}".encode()).hexdigest()[:24]


@dataclasses.dataclass(frozen=True)
class Answered:
    text: str
    token_ids: tuple[int, ...]


class Kept:
    """Answers in a file of JSON lines; a line that a kill tore is made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, Answered] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                value = json.loads(line)
                self._found[value["key"]] = Answered(value["text"], tuple(value["token_ids"]))
            except (ValueError, KeyError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Answered:
        return self._found[key]

    def add(self, key: str, answer: Answered) -> None:
        self._found[key] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if self._torn() else "")
            file.write(json.dumps({"key": key, **dataclasses.asdict(answer)}) + "\n")

    def _torn(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return size > 0 and file.read(1) != b"\n"


def user_scenarios(data: Dataset, tested: int, earlier: int) -> dict[str, Scenario]:
    """MovieLens users. `new_users`: the pool holds answers about others. `refresh` (DARE's own setting): it holds those
    besides the answer about each user as he was before his latest choice, as a nightly job finds it.
    """
    items = {user: [row.item_id for row in rows] for user, rows in histories(data.interactions).items()}
    order = sorted(
        (user for user in items if len(items[user]) > MAX_EVENTS), key=lambda user: blake3(user.encode()).digest()
    )
    now = [user_profile(n, user, items[user][-MAX_EVENTS:]) for n, user in enumerate(order)]
    before = [user_profile(10**6 + n, user, items[user][-MAX_EVENTS - 1 : -1]) for n, user in enumerate(order)]
    mine, others = tuple(now[:tested]), tuple(now[tested : tested + earlier])
    return {
        "new_users": Scenario("new_users", "user", mine, others),
        "refresh": Scenario("refresh", "user", mine, (*others, *before[:tested])),
    }


def user_profile(row: int, user: UserId, items: Iterable[ItemId]) -> Profile:
    return Profile(row, user, tuple(Event(item) for item in items))


def knowledge_scenarios(tested: int, earlier: int) -> dict[str, Scenario]:
    """Items of the knowledge texts, by title and what was said of them; the pools hold the set's summaries as well.

    `knowledge`: by the first thing that was said; the pool holds answers about other items. `knowledge_refresh`: items
    of which more was said; the pool holds, besides, the answer about each before the latest was said.
    """
    path = SHARED / "knowledge" / "xrec_amazon_tst.jsonl"
    if not path.exists():
        return {}
    said: dict[str, list[str]] = defaultdict(list)
    summaries: dict[str, str] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        name = str(row["iid"])
        said[name].append(row["explanation"] if said[name] else f"{row['title']}\n{row['explanation']}")
        summaries.setdefault(name, row["item_summary"])

    def profile(row: int, name: str, count: int) -> Profile:
        return Profile(row, name, tuple(Event(text=text) for text in said[name][:count]))

    first = [profile(row, name, 1) for row, name in enumerate(said)]
    more = [name for name, texts in said.items() if len(texts) > 1][:tested]
    after = tuple(profile(2 * 10**6 + row, name, len(said[name])) for row, name in enumerate(more))
    before = tuple(profile(3 * 10**6 + row, name, len(said[name]) - 1) for row, name in enumerate(more))
    others = tuple(first[tested : tested + earlier])

    def scenario(name: str, mine: tuple[Profile, ...], answers: tuple[Profile, ...]) -> Scenario:
        own = {each.name for each in mine}
        return Scenario(name, "item", mine, answers, tuple(text for item, text in summaries.items() if item not in own))

    mixed = tuple(each for each in others if each.name not in more)
    return {
        "knowledge": scenario("knowledge", tuple(first[:tested]), others),
        "knowledge_refresh": scenario("knowledge_refresh", after, (*mixed, *before)),
    }
