"""Decoders: configuration, layers, attention, key/value cache, LoRA and the model families."""
