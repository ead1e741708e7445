"""The nouns that pass between stages, as frozen dataclasses: what users ask, what was decided, what they get back."""
