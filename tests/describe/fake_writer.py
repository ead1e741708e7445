"""A writer that needs no model, and whose answers depend on all that it wrote before, as relaxed verification's do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rcllm.describe.job import Answer
from rcllm.describe.profiles import Profile
from rcllm.errors import RequestError


class FakeWriter:
    """Its pool is a number that every answer goes into."""

    def __init__(self) -> None:
        self.state = 0
        self.written: list[str] = []

    def num_prompt_tokens(self, profile: Profile) -> int:
        if profile.name.startswith("long"):
            raise RequestError(f"profile {profile.name!r} needs 99 positions, the limit is 9")
        return 10 + len(profile.events)

    def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """The last of each three is complete first."""
        order = sorted(range(len(profiles)), key=lambda place: (place // 3, -place))
        for place in order:
            profile, seed = profiles[place], seeds[place]
            text = f"{profile.name} likes {len(profile.events)} things, {self.state} {seed % 1000}"
            self.written.append(profile.name)
            answer = Answer(text, "length", 12, self.num_prompt_tokens(profile), 4, self.state % 3)
            self.state = (self.state * 31 + len(answer.text) + 1) % 99991
            yield place, answer

    def save(self, path: Path) -> None:
        path.mkdir()
        (path / "state.json").write_text(json.dumps(self.state), encoding="utf-8")

    def load(self, path: Path) -> None:
        self.state = json.loads((path / "state.json").read_text(encoding="utf-8"))
