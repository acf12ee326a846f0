"""Hugging Face folders, read and written: `checkpoint` for models, `peft` for LoRA adapters.

Both rest on `safetensors_files`, the weights on disk, and `loading`, which puts them on devices.
"""
