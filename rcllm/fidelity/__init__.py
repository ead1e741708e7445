"""How close reuse comes to full recompute, and what that does to the ranking."""
