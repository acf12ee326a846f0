"""What a TPU's own compiler makes of a small step, in every mode: attention, types, collectives."""
