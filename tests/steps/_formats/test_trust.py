"""Nothing in a checkpoint runs: every file that could carry code carries some, and is read."""

from __future__ import annotations

import contextlib
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import LlamaForCausalLM

from nemotron.errors import NemotronError
from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.any_adapter import find_any_adapter, open_any_adapter
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps._formats.megatron_adapter_writer import write_megatron_adapter
from nemotron.steps._formats.megatron_writer import write_megatron
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import torch_dist_writer
from nemotron.steps._models.config import DecoderConfig
from tests.steps._formats.conftest import save_peft_adapter

SaveLlama = Callable[..., LlamaForCausalLM]
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")
_DANGEROUS = {"os", "posix", "nt", "subprocess", "builtins", "sys", "importlib", "runpy"}
_watching: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    is_name = event == "pickle.find_class" and arguments[0].split(".")[0] in _DANGEROUS
    if is_name or event in _STARTS:
        _watching.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(_audit)  # for good: hooks cannot be taken off


@pytest.fixture
def events() -> Iterator[list[tuple[str, Any]]]:
    """Watch this test; what a pickle starts or asks for is in the list."""
    global _watching  # noqa: PLW0603 - the hook has no other way to know
    _watching = []
    yield _watching
    _watching = None


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


@pytest.fixture
def checkpoint(tmp_path: Path, save_llama: SaveLlama) -> Path:
    save_llama(tmp_path / "hf")
    (tmp_path / "base").mkdir()
    weights = HuggingFaceCheckpoint(tmp_path / "hf")
    write_megatron(tmp_path / "base", weights, source=tmp_path / "hf", source_name="x")
    shutil.rmtree(tmp_path / "base" / "hf")  # as Megatron-Bridge leaves it
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, checkpoint: Path) -> Path:
    config = open_megatron(checkpoint).config
    save_peft_adapter(tmp_path / "peft", config, ranks={0: 3, 1: 3})
    (tmp_path / "adapter").mkdir()
    opened = open_adapter(tmp_path / "peft", config=config)
    write_megatron_adapter(tmp_path / "adapter", opened, pretrained_checkpoint="x")
    return tmp_path / "adapter"


def read_base(root: Path, config: DecoderConfig) -> None:
    base_fingerprint(MegatronWeights(open_megatron(root)))


def read_adapter(root: Path, config: DecoderConfig) -> None:
    found = find_any_adapter(root)
    assert found is not None
    adapter = open_any_adapter(found, config=config)
    for module in adapter.modules:
        adapter.read(module)


def poison(root: Path, where: str, payload: Payload) -> None:
    """Put a payload into one place of a checkpoint, all else as it was."""
    directory = next(root.glob("iter_*"))
    if where == ".metadata":
        (directory / where).write_bytes(pickle.dumps(payload))
    elif where == "a nested .metadata":
        # As a value inside of what is otherwise a checkpoint's own metadata.
        with (directory / ".metadata").open("rb") as stream:
            metadata = pickle.load(stream)  # noqa: S301 - written above
        metadata.storage_meta = payload
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where in ("a tensor", "common_state"):
        reader = TorchDistReader(directory)
        tensors = {name: reader.read(name).clone() for name in reader.names}
        first = next(iter(tensors))
        with torch_dist_writer(directory) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.write_object("common_state/shard_0_1", [payload])
            if where == "a tensor":
                writer.write_object(first, payload)
                hostile = writer.items.pop()
                place = {"start": hostile.start, "length_bytes": hostile.length_bytes}
                writer.items[:1] = [replace(writer.items[0], **place)]
    else:
        path = root / where if (root / where).exists() else directory / where
        torch.save({"step": payload}, path)


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize(
    ("where", "code"),
    [
        (".metadata", "unsafe_pickle"),
        ("a nested .metadata", "unsafe_pickle"),
        ("a tensor", "artifact_damaged"),
        ("latest_train_state.pt", "artifact_damaged"),
        ("train_state.pt", None),  # these three are never opened
        ("common.pt", None),
        ("common_state", None),
    ],
)
def test_code_in_a_megatron_checkpoint_does_not_run(
    tmp_path: Path,
    checkpoint: Path,
    adapter: Path,
    events: list[tuple[str, Any]],
    kind: str,
    where: str,
    code: str | None,
) -> None:
    config = open_megatron(checkpoint).config
    root = checkpoint if kind == "base" else adapter
    poison(root, where, Payload(tmp_path / "canary"))
    events.clear()
    read = read_base if kind == "base" else read_adapter
    if code is None:
        read(root, config)
    else:
        with pytest.raises(NemotronError) as caught:
            read(root, config)
        assert caught.value.code == code
    assert events == []
    assert not (tmp_path / "canary").exists()


def test_the_audit_hook_sees_what_torchs_own_reader_does(
    tmp_path: Path, checkpoint: Path, events: list[tuple[str, Any]]
) -> None:
    poison(checkpoint, ".metadata", Payload(tmp_path / "canary"))
    with contextlib.suppress(Exception):  # whatever it makes of what the payload returns
        FileSystemReader(checkpoint / "iter_0000000").read_metadata()
    assert "os.system" in {event for event, _ in events}
    assert (tmp_path / "canary").exists()


def test_a_pickled_base_is_refused_unread(
    tmp_path: Path, checkpoint: Path, events: list[tuple[str, Any]]
) -> None:
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "canary")}, tmp_path / "hf" / "pytorch_model.bin")
    events.clear()
    with pytest.raises(NemotronError) as caught:
        HuggingFaceCheckpoint(tmp_path / "hf")
    assert caught.value.code == "pickled_weights"
    assert events == []


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, adapter: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, peft = open_megatron(checkpoint).config, tmp_path / "peft"
    wanted = load_file(peft / "adapter_model.safetensors")
    torch.save(wanted, peft / "adapter_model.bin")
    (peft / "adapter_model.safetensors").unlink()
    with pytest.raises(NemotronError) as caught:
        open_adapter(peft, config=config)
    assert caught.value.code == "pickled_weights"
    python, option, script, *arguments = shlex.split(caught.value.fix.split(": ", 1)[1])
    assert (python, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(script, {})  # noqa: S102 - as that command does, without importing torch again
    again = open_adapter(tmp_path / "peft-safetensors", config=config)
    assert again.modules
    got = load_file(tmp_path / "peft-safetensors" / "adapter_model.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
