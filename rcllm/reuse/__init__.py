"""Use cached blocks at other positions: decide (plan) and build the pass (assemble)."""
