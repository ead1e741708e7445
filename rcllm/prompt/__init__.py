"""A request becomes typed blocks: template, tokenizer, content keys. Never imports torch."""
