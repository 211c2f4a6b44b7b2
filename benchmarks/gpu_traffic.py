"""Bytes that a training step moves through a GPU's memory, with Triton's kernels and without.

Counted, not timed, so that no GPU is needed: every operation counts the bytes of its inputs and
outputs, as if nothing were cached, forward and backward. Left out are attention and the products
with base weights: both are the same on either side, and limited by arithmetic. The tensors have
shapes and no values.

    python benchmarks/gpu_traffic.py [--shape 1b|8b]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from lora.case import Shape
from lora_gpu import ROW_TOKENS, SHAPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemotron.steps._models import attention
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets, SelfAttention
from nemotron.steps._models.layouts import LORA_TARGETS
from nemotron.steps._tensor_parallel import prologue, triton_kernels, vocabulary
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec

# Operations that move nothing, or only a few elements of their largest input.
_FREE = {"empty", "empty_like", "new_empty", "detach", "index", "gather", "scatter_add_"}
_RANKS = 64  # a product with no dimension as small as a LoRA rank is by a base weight


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes that a step moves on a GPU")
    parser.add_argument("--shape", choices=["1b", "8b"], action="append")
    for name in parser.parse_args().shape or ["1b", "8b"]:
        shape = SHAPES[name]
        print(f"{name}: {ROW_TOKENS} tokens in bf16, LoRA rank {shape.dim}; GB moved by")
        totals = []
        for side, kernels in (("torch", None), ("Triton", triton_kernels)):
            two, three = (count(shape, num_layers, kernels) for num_layers in (2, 3))
            # The first layer needs no dx, so a layer is what a third one adds.
            layer, loss = three["layers"] - two["layers"], three["loss"]
            total = three["layers"] + (shape.num_hidden_layers - 3) * layer + loss
            totals.append(total)
            print(
                f"  {side:8}a layer {layer / 1e9:6.2f}   the loss {loss / 1e9:6.2f}   "
                f"the model {total / 1e9:7.1f}"
            )
        print(f"  {totals[0] / totals[1]:.2f}x less with Triton's kernels")


def count(shape: Shape, num_layers: int, kernels: ModuleType | None) -> Counter[str]:
    """Return the bytes that the layers of a model move, and those that its loss moves."""
    config = DecoderConfig(
        num_layers=num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.hidden_size // shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        layernorm_epsilon=1e-5,
        rotary_base=5e5,
        rope_scaling=None,
        max_position_embeddings=8192,
        share_embeddings_and_output_weights=False,
    )
    lora = LoraTargets(tuple(LORA_TARGETS), LoraSpec(shape.dim, 2.0 * shape.dim))
    with torch.device("meta"), _Moved() as moved, using(kernels, moved):
        model = GPTModel(config, lora=lora, group=ProcessGroup(), dtype=torch.bfloat16)
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.attend = _Attention.apply
        tokens = torch.empty(ROW_TOKENS, dtype=torch.int64)
        moved.num_bytes.clear()
        hidden = model(tokens, [0, ROW_TOKENS])
        moved.part = "loss"
        loss = model.loss(hidden, tokens).sum()
        moved.part = "layers"
        loss.backward()
    return moved.num_bytes


class _Moved(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of torch's operations, by part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.part = "layers"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        is_base = name.endswith("mm") and min(min(each.shape) for each in read) > _RANKS
        if not (func.is_view or name in _FREE or is_base):
            # What is passed as 'out' is among both, and is only written.
            read = [each for each in read if name[-1] == "_" or not any(each is w for w in written)]
            self.num_bytes[self.part] += sum(map(_size, (*read, *written)))
        return result


@contextmanager
def using(kernels: ModuleType | None, moved: _Moved) -> Iterator[None]:
    """Have the model use Triton's kernels, whose bytes are counted too, or none."""

    def count_only(kernel: Any, grid: Any, *arguments: Any, **sizes: int) -> None:
        read = [each for each in arguments if isinstance(each, Tensor)]
        if sizes.get("HAS_ADDED") == 0:
            del read[4]  # stands in for what is not there
        in_place = read[:1] if kernel is triton_kernels._softmax_minus_onehot else []
        moved.num_bytes[moved.part] += sum(map(_size, (*read, *in_place)))

    triton_kernels._launch = count_only
    vocabulary._LOGITS_AT_ONCE = vocabulary._LOGITS_AT_ONCE_ON_GPU
    for module in (attention, prologue, vocabulary):
        vars(module)["kernels_for"] = lambda _: kernels
    yield


class _Attention(torch.autograd.Function):
    """Has the shapes of attention, and moves nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Any) -> Tensor:
        ctx.shapes = query.shape, key.shape, value.shape
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad_outputs[0].new_empty(shape) for shape in ctx.shapes), None


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
