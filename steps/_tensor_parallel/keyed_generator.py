"""Random numbers that depend only on a name, and not on the layout or the order of construction."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(key: str, device: torch.device) -> torch.Generator:
    """Return a generator on ``device``, seeded with 63 bits of the key's BLAKE2b."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
