"""Semantic IDs: codes of items from their texts, and a small decoder that generates them."""
