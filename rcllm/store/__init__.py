"""The tiers below the pool: one contract, and its keepers."""
