"""Checkpoint and adapter formats: one module per format, reading, writing and checking it."""
