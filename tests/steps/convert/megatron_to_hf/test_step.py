"""The step end to end: bitwise, with what goes along, from our checkpoints and foreign ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron.artifacts import Producer, read_artifact, verify_files
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.huggingface import read_config
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import torch_dist_writer
from nemotron.steps._models.families import in_both_spellings
from nemotron.steps.convert.megatron_to_hf.schema import Config
from nemotron.steps.convert.megatron_to_hf.step import run

PRODUCER = Producer(step="convert/megatron_to_hf", config_sha256="0" * 64, code_version="0")


def convert(base: Path, output: Path, **changes: Any) -> None:
    values = {"megatron_path": base, "output_dir": output, "show_progress": False}
    run(Config.model_validate(values | changes), PRODUCER)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def assert_same_weights(got: Path, wanted: Path) -> None:
    one, other = tensors(got), tensors(wanted)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def foreign(base: Path) -> Path:
    """Make of our checkpoint one as Megatron-Bridge leaves it, its vocabulary padded."""
    shutil.rmtree(base / "hf")
    (base / "artifact.json").unlink()
    directory = base / "iter_0000000"
    reader = TorchDistReader(directory)
    weights = {name: reader.read(name).clone() for name in reader.names}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(3, weights[name].shape[1])])
    with torch_dist_writer(directory) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    return base


def test_there_and_back_gives_the_same_bytes_and_all_that_goes_along(
    tmp_path: Path, base_hf: Path, base_megatron: Path
) -> None:
    output = tmp_path / "back"
    convert(base_megatron, output)
    assert_same_weights(output, base_hf)
    assert read_config(output) == in_both_spellings(read_config(base_hf))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (base_hf / name).read_bytes()
    artifact = read_artifact(output, "checkpoint_hf")
    verify_files(output, artifact)
    of_base = read_artifact(base_megatron, "checkpoint_megatron").properties
    assert artifact.properties["base_fingerprint"] == of_base["base_fingerprint"]
    assert [each.type for each in artifact.inputs] == ["checkpoint_megatron"]


def test_a_foreign_checkpoint_gets_a_config_from_its_run_config(
    tmp_path: Path, base_hf: Path, base_megatron: Path
) -> None:
    output = tmp_path / "back"
    convert(foreign(base_megatron), output)
    assert_same_weights(output, base_hf)
    model, wanted = (AutoModelForCausalLM.from_pretrained(path) for path in (output, base_hf))
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert AutoTokenizer.from_pretrained(output).get_vocab()["a"] == 1


def test_hf_model_path_gives_a_foreign_checkpoint_its_files(
    tmp_path: Path, base_hf: Path, base_megatron: Path
) -> None:
    output = tmp_path / "back"
    convert(foreign(base_megatron), output, hf_model_path=base_hf)
    assert_same_weights(output, base_hf)
    assert (output / "generation_config.json").is_file()


def test_a_config_of_another_model_is_refused(
    tmp_path: Path, base_hf: Path, base_megatron: Path
) -> None:
    path = base_hf / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-3}
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(NemotronError) as caught:
        convert(base_megatron, tmp_path / "out" / "hf", hf_model_path=base_hf)
    assert (caught.value.code, caught.value.exit_code) == ("other_model", ExitCode.DATA)
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_found_by_its_digest(tmp_path: Path, base_megatron: Path) -> None:
    path = base_megatron / "iter_0000000" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(NemotronError, match=r"__0_0\.distcp does not have the BLAKE3"):
        convert(base_megatron, tmp_path / "out")


def test_missing_and_overlapping_paths_are_named(tmp_path: Path, base_megatron: Path) -> None:
    with pytest.raises(NemotronError) as caught:
        convert(tmp_path / "no", tmp_path / "out")
    assert caught.value.code == "missing_megatron_checkpoint"
    with pytest.raises(NemotronError) as caught:
        convert(base_megatron, base_megatron / "hf2")
    assert caught.value.code == "output_path_overlaps_inputs"
