"""Megatron checkpoint in, Hugging Face checkpoint out."""
