"""Which KV do we have: the index, the pool on the device, and the tiers below it."""
