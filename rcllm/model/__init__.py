"""The decoder and attention over segments. Knows nothing of caches, prompts or servers."""
