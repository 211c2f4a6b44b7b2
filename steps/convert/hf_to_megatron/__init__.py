"""Hugging Face checkpoint in, Megatron checkpoint out."""
