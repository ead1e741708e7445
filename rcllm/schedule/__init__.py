"""What runs next and what may run: pure decisions under a clock that is given. Never imports torch."""
