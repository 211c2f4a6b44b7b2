"""The fingerprint of a base model: one digest over its weights, whatever format they lie in.

It is the sha256 of the JSON list, sorted by Hugging Face name, of [name, safetensors name of the
type, shape, sha256 of the little-endian bytes]. A tied ``lm_head.weight`` is left out, so the value
is the same from a Hugging Face directory and from the Megatron checkpoint made of it.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from nemotron.artifacts import sha256_json
from nemotron.steps._formats.safetensors_file import raw_bytes
from nemotron.steps._formats.weights import DTYPE_NAMES, Weights


class Fingerprint:
    """The fingerprint of weights that pass by one at a time, in any order."""

    def __init__(self) -> None:
        self._entries: list[list[object]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor."""
        digest = hashlib.sha256(raw_bytes(tensor)).hexdigest()
        self._entries.append([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), digest])

    def hexdigest(self) -> str:
        """Return the fingerprint of the tensors taken in so far."""
        return sha256_json(sorted(self._entries, key=lambda entry: str(entry[0])))


def base_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of a model's weights, reading one tensor at a time."""
    fingerprint = Fingerprint()
    for name in weights.names:
        fingerprint.add(name, weights.read(name))
    return fingerprint.hexdigest()
