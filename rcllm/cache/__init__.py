"""Which KV do we have, and where: look-up over all tiers, and the pool on the device."""
