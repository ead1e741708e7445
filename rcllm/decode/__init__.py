"""From hidden states to answers: scores, beams and tokens."""
