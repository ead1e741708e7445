"""Make a language model rank: LoRA with a listwise objective on interaction data, under the mask it is served with."""
