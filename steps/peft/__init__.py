"""Parameter-efficient training steps."""
