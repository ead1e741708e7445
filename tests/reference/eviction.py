"""GreedyDual-Size within a budget of bytes, as plain as can be: every block is looked at for each victim."""

from __future__ import annotations

from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey


@dataclass
class SlowCache:
    budget: int
    clock: float = 0.0
    uses: int = 0
    blocks: dict[ContentKey, tuple[int, float]] = field(default_factory=dict)  # bytes, cost
    ranks: dict[ContentKey, tuple[float, int]] = field(default_factory=dict)  # priority, number of the last use

    def use(self, key: ContentKey) -> None:
        if key in self.blocks:
            num_bytes, cost = self.blocks[key]
            self.uses += 1
            self.ranks[key] = (self.clock + cost / num_bytes, self.uses)

    def put(self, key: ContentKey, num_bytes: int, cost: float) -> None:
        self.remove(key)
        if num_bytes > self.budget:
            return
        while sum(size for size, _ in self.blocks.values()) + num_bytes > self.budget:
            victim = min(self.ranks, key=lambda each: self.ranks[each])
            self.clock = self.ranks[victim][0]
            self.remove(victim)
        self.blocks[key] = (num_bytes, cost)
        self.use(key)

    def remove(self, key: ContentKey) -> None:
        self.blocks.pop(key, None)
        self.ranks.pop(key, None)
