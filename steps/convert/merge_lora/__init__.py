"""LoRA adapter and base in, merged Hugging Face checkpoint out."""
