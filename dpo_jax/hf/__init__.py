"""Reading and writing Hugging Face folders: models, LoRA adapters, safetensors files."""
