"""Many machines: which node holds which KV (placement), and which node answers a request (routing).

Knows nothing of how nodes talk to each other, of tensors or of prompts. Invariant: what decides here is a pure function
of what it is given, so that a live cluster and a simulation run the same objects.
"""
