"""Architectures in plain torch, their configs, and the names and layouts of their weights."""
