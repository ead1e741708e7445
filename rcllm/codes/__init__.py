"""Semantic IDs that can be recommended: the index of a catalogue's codes, live under traffic. Never imports torch."""
