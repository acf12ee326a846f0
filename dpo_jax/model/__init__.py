"""Decoders: configuration, layers, attention, LoRA, and the families they come from."""
