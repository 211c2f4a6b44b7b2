"""The model and the adapter against transformers and PEFT: logits, losses and every gradient."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron import open_megatron
from nemotron.steps._formats.megatron_writer import write_megatron
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._models.layouts import lora_to_hf
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model
from tests.peers.families import LLAMA31_ROPE, spelt_as_installed

SPEC = LoraSpec(dim=4, alpha=8.0)
TARGETS = LoraTargets(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), SPEC)
VARIANTS = LoraTargets(
    ("*.layers.0.self_attention.*", "linear_fc1"),
    LoraSpec(dim=4, alpha=3.0, use_rslora=True),
    rank_pattern={"linear_qkv": 2, "*.layers.1.*": 3},
    alpha_pattern={"*.mlp.linear_fc1": 5.0},
)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CU_SEQLENS = (0, 11, 12, 40)


@pytest.fixture(scope="module", params=["tied", "untied", "llama-3.1 rope", "variants"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPTModel, PeftModel]:
    """Our model with a random adapter, and PEFT's around transformers' with the same."""
    root = tmp_path_factory.mktemp("pair")
    base = random_llama(
        root / "hf",
        is_tied=request.param == "tied",
        rope=LLAMA31_ROPE if request.param == "llama-3.1 rope" else DEFAULT_ROPE,
    )
    ours = our_model_of(root, VARIANTS if request.param == "variants" else TARGETS)
    for linear in ours.adapted_linears():
        linear.load_lora(
            torch.randn_like(linear.lora_a) * 0.1, torch.randn_like(linear.lora_b) * 0.1
        )
    save_adapter_of(ours, root / "adapter")
    return ours, PeftModel.from_pretrained(base, root / "adapter", is_trainable=True)


def random_llama(directory: Path, *, is_tied: bool, rope: dict[str, Any]) -> LlamaForCausalLM:
    """Return a random Llama that is saved in ``directory``."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": is_tied,
        "initializer_range": 0.2,
        "rope_parameters": rope,
    }
    model = LlamaForCausalLM(LlamaConfig(**spelt_as_installed(sizes)))
    model.save_pretrained(directory)
    return model


def our_model_of(root: Path, targets: LoraTargets) -> GPTModel:
    """Return our model of the checkpoint in ``root/hf``, by way of a Megatron checkpoint."""
    (root / "base").mkdir()
    write_megatron(
        root / "base", HuggingFaceCheckpoint(root / "hf"), source=root / "hf", source_name="x"
    )
    return load_base_model(
        open_megatron(root / "base"),
        lora=targets,
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def save_adapter_of(ours: GPTModel, directory: Path) -> None:
    assert ours.lora is not None
    spec = ours.lora.spec
    directory.mkdir()
    write_adapter(
        directory,
        {
            each.name: (each.lora_a.detach(), each.lora_b.detach())
            for each in ours.adapted_linears()
        },
        config=ours.config,
        dim=spec.dim,
        alpha=spec.alpha,
        dropout=0.0,
        base_model_name_or_path="x",
        use_rslora=spec.use_rslora,
        alphas={each.name: each.lora.alpha for each in ours.adapted_linears() if each.lora},
    )


def tokens() -> Tensor:
    return torch.randint(0, 97, (CU_SEQLENS[-1],), generator=torch.Generator().manual_seed(1))


def test_packed_logits_equal_peft_on_each_document_alone(
    pair: tuple[GPTModel, PeftModel],
) -> None:
    ours, peer = pair
    with torch.no_grad():
        got = ours.logits(ours(tokens(), CU_SEQLENS))
        for start, stop in pairwise(CU_SEQLENS):
            wanted = peer(tokens()[start:stop].unsqueeze(0)).logits[0]
            # fp32 logits of size about 5: a few ulps of 5e-7.
            assert (got[start:stop] - wanted).abs().max() < 1e-5


def test_changing_one_document_leaves_the_logits_of_the_others_alone(
    pair: tuple[GPTModel, PeftModel],
) -> None:
    ours, _ = pair
    changed = tokens()
    changed[:11] = changed[:11].flip(0)
    with torch.no_grad():
        before, after = (ours.logits(ours(each, CU_SEQLENS)) for each in (tokens(), changed))
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[:11], after[:11])


def test_loss_and_every_adapter_gradient_equal_pefts(pair: tuple[GPTModel, PeftModel]) -> None:
    ours, peer = pair
    document = tokens()[:30]
    supervised = torch.tensor([3, 4, 9, 20, 28])
    labels = document[supervised + 1]
    loss = ours.loss(ours(document, (0, 30))[supervised], labels).mean()
    loss.backward()
    peer.zero_grad()
    logits = peer(document.unsqueeze(0)).logits[0, supervised]
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    compared = 0
    for linear in ours.adapted_linears():
        assert linear.lora_a.grad is not None
        assert linear.lora_b.grad is not None
        got = lora_to_hf(linear.name, linear.lora_a.grad, linear.lora_b.grad, ours.config)
        # A fused linear has one lora_a where PEFT has one per part: their gradients add up.
        a_names = [name for name in got if name.endswith("lora_A.weight")]
        total_a = sum(gradients[peft_name(name)] for name in a_names)
        assert isinstance(total_a, Tensor)
        torch.testing.assert_close(linear.lora_a.grad, total_a, rtol=1e-4, atol=1e-6)
        for name in got.keys() - set(a_names):
            # Sums of 30 fp32 products in another order, relative to gradients of size 0.01 to 1.
            torch.testing.assert_close(got[name], gradients[peft_name(name)], rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == len(gradients) // 2 == (8 if ours.lora is VARIANTS else 14)


def peft_name(name: str) -> str:
    return name.replace(".weight", ".default.weight")
