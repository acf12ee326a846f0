"""Hugging Face folders: models, LoRA adapters, safetensors files."""
