"""Writes answers with the engine's generator, drafting from pools of earlier answers.

Knows nothing of files of rows or of how a job resumes. Invariant: without sharing, no token of one profile's answer is
drafted for another; without speculation there are no pools at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from rcllm.core.decoding import Generated, GenerateRequest
from rcllm.core.ranking import Item, ItemId, TokenIds, UserId
from rcllm.describe.job import Answer, Provenance
from rcllm.describe.options import DescribeOptions, Kind, generation
from rcllm.describe.profiles import Profile
from rcllm.drafts.draft import Drafter
from rcllm.drafts.folder import DraftPools, read_manifest
from rcllm.drafts.groups import GroupOptions, Member, Router, build_router, one_group
from rcllm.drafts.suffix_pool import Sharing
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import ConfigError, RcllmError
from rcllm.version import __version__

KIND_FIELDS = ("genres", "categories")  # of an item: what it is
_WHOM = {"all": "all", "own": "their own users alone"}


class GeneratorWriter:
    """A `Writer` for profiles, on an engine whose template is open."""

    def __init__(self, engine: Engine, options: DescribeOptions, router: Router | None = None) -> None:
        """router: which pool an answer is drafted from; None: all of a kind share one. `load` brings another."""
        self.engine, self.options = engine, options
        self.pools: DraftPools | None = None
        if options.speculation.name != "none":
            self.pools = DraftPools.create(router or one_group(), pool_fingerprint(engine), self._sharing)
        self.generator = Generator(engine, self._drafter, batch_size=options.batch)
        self._writing: dict[str, Profile] = {}  # by request id

    @property
    def identity(self) -> str:
        """Digest of all that makes a prompt and its answer beside row and options: model, template, chat, dtypes."""
        return blake3(self.engine.prompter.namespace + str(self.engine.identity).encode()).hexdigest()[:16]

    def num_prompt_tokens(self, profile: Profile) -> int:
        """Raises RequestError for a profile that cannot be answered."""
        return len(self.prompt_ids(profile))

    def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        places = {str(profile.row): place for place, profile in enumerate(profiles)}
        for request, generated in self.generator.stream(self.requests(profiles, seeds)):
            if isinstance(generated, RcllmError):
                raise generated
            yield places[request.request_id], answer_of(generated)

    def requests(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> list[GenerateRequest]:
        """What `generator` is asked; until the next call, it drafts for these profiles."""
        self._writing = {str(profile.row): profile for profile in profiles}
        return [self._request(profile, seed) for profile, seed in zip(profiles, seeds, strict=True)]

    def prompt_ids(self, profile: Profile) -> TokenIds:
        """Raises RequestError for a profile that cannot be answered."""
        return self.engine.prompter.build_open(self._request(profile, 0).opening).token_ids

    def save(self, path: Path) -> None:
        if self.pools is not None:
            self.pools.save(path)

    def load(self, path: Path) -> None:
        """Raises ConfigError for pools of another model or of texts shared otherwise, DataError for broken ones."""
        if self.pools is None:
            return
        if (sharing := read_manifest(path).sharing) != self._sharing:
            raise ConfigError(
                f"{path} holds texts that draft for {_WHOM[sharing]}, this job's are for {_WHOM[self._sharing]}; give "
                "another folder, or change --share-text"
            )
        self.pools = DraftPools.open(path, pool_fingerprint(self.engine))

    @property
    def _sharing(self) -> Sharing:
        return "all" if self.options.share_text or self.options.kind == "item" else "own"

    def _request(self, profile: Profile, seed: int) -> GenerateRequest:
        user = UserId(profile.name) if self.options.kind == "user" else None
        return GenerateRequest(str(profile.row), profile.events, user, generation(self.options, seed))

    def _drafter(self, request: GenerateRequest, prompt: TokenIds) -> Drafter | None:
        if self.pools is None:
            return None
        profile = to_route(self._writing[request.request_id], self.options.kind, self.engine.prompter.catalogue)
        private = self._sharing == "own"
        return self.pools.drafter_for(profile, prompt, private=private)


def to_route(profile: Profile, kind: Kind, catalogue: Mapping[ItemId, Item]) -> Member:
    """What grouping needs of a profile: a user's items, and the words for the kinds of these items."""
    item_ids = tuple(event.item_id for event in profile.events if event.item_id is not None)
    words = (
        word
        for item_id in item_ids
        for name in KIND_FIELDS
        for word in catalogue[item_id].fields.get(name, "").replace(",", " ").split()
    )
    return Member(kind, profile.name, item_ids, tuple(words))


def make_router(profiles: Iterable[Profile], catalogue: Mapping[ItemId, Item], num_groups: int, seed: int) -> Router:
    """Groups users by what they chose, for one pool each; new users go by the kinds of their items."""
    placed = [to_route(profile, "user", catalogue) for profile in profiles]
    histories = {each.profile_id: each.item_ids for each in placed if each.item_ids}
    if num_groups == 1 or not histories:
        return one_group()
    return build_router(histories, placed, GroupOptions(num_groups=num_groups, seed=seed))


def answer_of(generated: Generated) -> Answer:
    receipt = generated.receipt
    return Answer(
        generated.text,
        generated.finish_reason,
        len(generated.token_ids),
        receipt.num_tokens,
        receipt.passes + 1,
        len(receipt.divergences),
    )


def provenance_of(engine: Engine) -> Provenance:
    template = engine.prompter.template
    name = f"{template.name} v{template.version} {template.fingerprint.hex()[:12]}"
    return Provenance(engine.model_id, name, __version__)


def pool_fingerprint(engine: Engine) -> str:
    """Names the model and the tokenizer whose answers a pool holds."""
    return f"{engine.model_id} {engine.prompter.tokenizer.fingerprint.hex()[:12]}"
