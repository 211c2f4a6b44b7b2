"""The fused-collective tensor-parallel LoRA core: frozen base + LoRA, one collective per linear."""
