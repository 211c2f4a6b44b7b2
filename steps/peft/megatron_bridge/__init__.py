"""LoRA training of a Megatron checkpoint under tensor and data parallelism."""
