"""What people call: the command line."""

import os

# Threads that wait spin this often before they sleep. The OpenMP runtime's own 300,000 halves the speed as soon as
# another process shares the cores; this costs nothing on quiet ones (docs/log.md). It is read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
