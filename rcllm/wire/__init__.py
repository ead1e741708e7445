"""Requests and answers as JSON lines. Knows nothing of engines, and never imports torch."""
