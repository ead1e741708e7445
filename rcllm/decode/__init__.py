"""From context to answer: the read-outs."""
