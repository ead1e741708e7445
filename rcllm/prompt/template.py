"""Templates: the fixed text of a prompt and how items and events are written, as versioned data files.

Knows nothing of tokens. Invariant: a template is a value whose fingerprint changes with any byte of its text or of the
chat format around it, and the fingerprint is part of every content key.
"""

from __future__ import annotations

import string
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from blake3 import blake3

from rcllm.annotated import Ge
from rcllm.config import PromptConfig, nearest
from rcllm.errors import ConfigError
from rcllm.fields import parse

Parts = tuple[str, ...]  # rendered one after another; a part whose fields are not all there is left out
_RANKING: Parts = (  # what templates for open prompts leave out
    "items_head",
    "item",
    "volatile",
    "label_before",
    "label_after",
    "answer",
    "pointwise_question",
    "pointwise_answers",
    "likelihood_head",
    "likelihood_item",
    "max_item_tokens",
)
LIMITS = ("max_item_tokens", "max_event_tokens", "max_volatile_tokens")  # that a configuration may set
_RENDERED = ("event", "item", "volatile", "likelihood_item", "pointwise_echo")  # these hold placeholders
_FOLDER = resources.files("rcllm.prompt") / "templates"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What stands around the turns of a conversation; may hold control tokens."""

    system: str
    user: str
    assistant: str

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with any of its texts."""
        return blake3(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Template:
    """All text of a prompt that is not data. Placeholders such as {title} name fields of items.

    A template for open prompts (`open = true`), which decoding continues, leaves out what only rankings have.
    """

    name: str
    version: int
    system: str
    instruction: str
    history_head: str
    event: Parts
    event_text: str  # for events in the user's own words: {text}
    question: str
    max_event_tokens: Annotated[int, Ge(1)]
    open: bool = False
    items_head: str = ""
    item: Parts = ()
    volatile: Parts = ()  # rendered fresh, never cached
    label_before: Parts = ()  # two: what precedes and what follows the label, when it stands before its item
    label_after: Parts = ()
    answer: str = ""  # the answer's beginning; the label follows it
    pointwise_question: str = ""
    pointwise_answers: Parts = ()  # the first counts for the item, the others against it
    pointwise_echo: Parts = ()  # of the candidate, before its question: fresh tokens that see item and history
    max_echo_tokens: Annotated[int, Ge(1)] = 10
    likelihood_head: str = ""
    likelihood_item: Parts = ()
    max_item_tokens: Annotated[int, Ge(1)] = 1
    # of one candidate: fresh in every request; a price and a stock take 20
    max_volatile_tokens: Annotated[int, Ge(1)] = 32
    fingerprint: bytes = b""  # 32 bytes, of all that is above
    text_fingerprint: bytes = b""  # 32 bytes, of the file alone, whatever limits were set over it

    @classmethod
    def of(cls, config: PromptConfig) -> Template:
        """The template that a configuration names, with the limits that it sets. Raises ConfigError."""
        return cls.load(config.template).limited({name: getattr(config, name) for name in LIMITS})

    @classmethod
    def load(cls, name_or_path: str) -> Template:
        """Reads a bundled template by name, or any TOML file by path. Raises ConfigError."""
        source = Path(name_or_path) if name_or_path.endswith(".toml") else _FOLDER / f"{name_or_path}.toml"
        if not source.is_file():
            known = bundled()
            raise ConfigError(f"no template {name_or_path!r}; {nearest(name_or_path, known)}, or give a .toml file")
        try:
            text = source.read_text(encoding="utf-8")
            values = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"template {name_or_path}: {error}") from error
        made = [name for name in values if name.endswith("fingerprint")]
        if made:
            raise ConfigError(f"template {name_or_path}: {made[0]} is made of the file, not written in it")
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := sorted({*needed, *(() if values.get("open") else _RANKING)} - values.keys()):
            raise ConfigError(f"template {name_or_path}: missing {', '.join(missing)}")
        template = parse(cls, values, f"template {name_or_path}")
        _check(name_or_path, template)
        digest = blake3(text.encode()).digest()
        return replace(template, fingerprint=digest, text_fingerprint=digest)

    @property
    def limits(self) -> Mapping[str, int]:
        """After how many tokens texts are cut, by name."""
        return {name: getattr(self, name) for name in LIMITS}

    def limited(self, limits: Mapping[str, int]) -> Template:
        """The template with other limits; 0 keeps its own."""
        changed = {name: value for name, value in limits.items() if value and value != getattr(self, name)}
        if not changed:
            return self
        fingerprint = blake3(self.fingerprint + repr(sorted(changed.items())).encode()).digest()
        return replace(self, **changed, fingerprint=fingerprint)  # type: ignore[arg-type]

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the fields that the text of an item is made of."""
        return _names(self.event if self.open else self.item)

    @property
    def shown_fresh(self) -> tuple[str, ...]:
        """Names of the volatile fields that stand after an item."""
        return _names(self.volatile)


def bundled() -> tuple[str, ...]:
    """Names of the templates that come with rcllm."""
    return tuple(
        sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))
    )


def chat_format(name: str) -> ChatFormat:
    """One of the formats of `chat_formats.toml`. Raises ConfigError."""
    formats = _chat_formats()
    if name not in formats:
        raise ConfigError(f"no chat format {name!r}; {nearest(name, formats)}")
    return ChatFormat(**{turn.name: formats[name][turn.name] for turn in fields(ChatFormat)})


def told_format(template: str | None, token_id: Callable[[str], int | None]) -> str | None:
    """The name of the format that a model's own chat template writes; None where that is none that we know.

    A model without a chat template is told by its vocabulary (`token_id`: of a token, if it is one), else `plain`.
    """
    formats = {name: each for name, each in _chat_formats().items() if each["marks"]}
    if template is None:
        known = (name for name, each in formats.items() if all(token_id(mark) is not None for mark in each["marks"]))
        return next(known, "plain")
    fitting = [
        name
        for name, each in formats.items()
        if all(mark in template for mark in each["marks"]) and not any(mark in template for mark in each["foreign"])
    ]
    return fitting[0] if len(fitting) == 1 else None


def _chat_formats() -> dict[str, dict[str, Any]]:
    return tomllib.loads((resources.files("rcllm.prompt") / "chat_formats.toml").read_text(encoding="utf-8"))


def render(parts: Parts, values: Mapping[str, str]) -> str:
    """Joins the parts all of whose placeholders have a value that is not empty."""
    return "".join([part.format_map(values) for part in parts if all(map(values.get, placeholders(part)))])


def _names(parts: Parts) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in placeholders(part)))


@lru_cache(maxsize=1024)  # templates have few parts, and each is rendered for every item
def placeholders(part: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(part) if name)


def _check(source: str, template: Template) -> None:
    """How the fields go together; what each may hold is checked before."""
    for name in _RENDERED:
        _check_parts(f"template {source}: {name}", getattr(template, name))
    if "{text}" not in template.event_text:
        raise ConfigError(f"template {source}: event_text must hold {{text}}, got {template.event_text!r}")
    if not template.open:
        _check_ranking(source, template)


def _check_ranking(source: str, template: Template) -> None:
    _check_read_from(source, template)
    for name in ("item", "likelihood_item"):
        if not _names(getattr(template, name)):
            raise ConfigError(
                f"template {source}: {name} shows no {{field}}, so that all candidates would read the same"
            )
    if len(template.label_before) != 2 or len(template.label_after) != 2:
        raise ConfigError(
            f"template {source}: label_before and label_after are [what precedes the label, what follows it]"
        )
    if len(template.pointwise_answers) < 2:
        raise ConfigError(f"template {source}: pointwise_answers needs an answer for the item and one against it")
    if not all(template.pointwise_answers):
        raise ConfigError(
            f"template {source}: an answer of pointwise_answers is empty; its first token is what is scored"
        )


def _check_parts(where: str, parts: Parts) -> None:
    for part in parts:
        try:
            part.format_map(dict.fromkeys(placeholders(part), ""))
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"{where}: {part!r} has a placeholder that is not a plain {{field}}: {error}") from error


def _check_read_from(source: str, template: Template) -> None:
    """What scores are read after must hold at least one token."""
    for names in (("question", "answer"), ("pointwise_question",), ("likelihood_head",)):
        if not any(getattr(template, name) for name in names):
            raise ConfigError(f"template {source}: {' and '.join(names)} must not be empty; scores are read at its end")
