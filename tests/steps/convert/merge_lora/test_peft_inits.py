"""PEFT's initialisations: merged where the base stays as it is, refused where it was changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.artifacts import Producer
from nemotron.errors import NemotronError
from nemotron.steps._adapter import verify
from nemotron.steps._adapter.schema import VerifyConfig
from nemotron.steps.convert.merge_lora.schema import Config
from nemotron.steps.convert.merge_lora.step import run

PRODUCER = Producer(step="convert/merge_lora", config_sha256="0" * 64, code_version="0")
IDS = torch.arange(60).reshape(3, 20)
SaveBase = Callable[..., LlamaForCausalLM]


def _merge(adapter: Path, base: Path, output: Path) -> None:
    values = {"lora_checkpoint": adapter, "base_hf_path": base, "output_hf_path": output}
    run(Config.model_validate({**values, "allow_unverified_base": True}), PRODUCER)


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _start(base: Path, init: Any, **values: Any) -> Any:
    """Return a model of PEFT's, fresh from its initialisation."""
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, **values)
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)


def _train(model: Any) -> Tensor:
    """Take three steps and return the logits then."""
    factors = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return _logits(model.eval())


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_to_a_changed_base_is_refused_until_peft_made_it_plain(
    tmp_path: Path, save_base: SaveBase, init: str
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    before = _logits(save_base(base))
    model = _start(base, init)
    model.save_pretrained(tmp_path / "initial")
    wanted = _train(model)
    model.save_pretrained(tmp_path / "adapter")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    for refuse in (
        lambda adapter: _merge(adapter, base, output),
        lambda adapter: verify.run(VerifyConfig(adapter=adapter, base=base), PRODUCER),
    ):
        with pytest.raises(NemotronError) as caught:
            refuse(tmp_path / "adapter")
        assert caught.value.code == "adapter_config"
        assert f"init_lora_weights is {init!r}" in caught.value.problem
        assert "path_initial_model_for_weight_conversion" in caught.value.fix
    assert not output.exists()
    _merge(tmp_path / "plain", base, output)
    got = _logits(LlamaForCausalLM.from_pretrained(output))
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "plain")
    assert (wanted - before).abs().max() > 0.1
    # fp32; PEFT computes with the changed base and rounds it, then with base and adapter apart.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, _logits(peft), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning")
@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_to_the_base_as_it_is_is_merged_as_peft_computes_it(
    tmp_path: Path, save_base: SaveBase, init: Any
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    before = _logits(save_base(base))
    model = _start(base, init, **({"eva_config": EvaConfig()} if init == "eva" else {}))
    wanted = _train(model)
    model.save_pretrained(tmp_path / "adapter")
    _merge(tmp_path / "adapter", base, output)
    assert (wanted - before).abs().max() > 0.1
    # As above.
    got = _logits(LlamaForCausalLM.from_pretrained(output))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
