"""Use cached blocks at other positions: decide what is fresh, and build the pass that computes it."""
