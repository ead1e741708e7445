"""The HTTP server: bodies, limits and sight around the engine's loop."""
