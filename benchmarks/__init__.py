"""One file per question. `python -m benchmarks.NAME [--quick] [--out FILE]` prints a table, then one JSON line."""
