"""rcllm: serve language models that recommend, with KV reuse beyond the prefix."""
