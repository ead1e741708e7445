"""The offline job that describes users and items in text, and what that text is worth to a model of clicks."""
