"""Drafts of text from earlier answers: trees, suffix indexes and pools per group. Never imports torch."""
