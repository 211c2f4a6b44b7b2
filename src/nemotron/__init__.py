"""LoRA post-training from chat data to a deployable checkpoint."""

__version__ = "0.1.0"
