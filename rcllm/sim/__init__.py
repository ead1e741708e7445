"""The cluster under a virtual clock: the same policies as in production, with times from a cost model."""
