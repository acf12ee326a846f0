"""Decoders of all families as one transformer, from their configuration to hidden states.

`config` describes a model, and `families` reads it from the fields of a Hugging Face folder.
`transformer` is built of `layers`, `rope`, `moe` and one attention: `attention` (blocks of
queries), `attention_tiled` (CPUs) or `attention_kernels` (accelerators); `head_shares` divides the
heads of an attention among devices. `kv_cache` computes the same model token by token; `lora` adds
adapters to it.
"""
