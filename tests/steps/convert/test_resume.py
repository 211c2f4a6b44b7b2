"""A conversion that was stopped goes on with what it had finished, or starts anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from nemotron.artifacts import Producer, blake3_file, read_artifact
from nemotron.errors import NemotronError
from nemotron.steps._formats import megatron_writer
from nemotron.steps._formats.torch_dist_writer import TorchDistFile
from nemotron.steps.convert.hf_to_megatron.schema import Config
from nemotron.steps.convert.hf_to_megatron.step import run
from tests.conftest import RunForked

SCRIPT = Path(__file__).parent / "kill_conversions.py"
PRODUCER = Producer(step="convert/hf_to_megatron", config_sha256="0", code_version="0")
Written = list[str]


def test_killed_conversions_go_on_and_give_the_bytes_of_one_left_alone(
    tmp_path: Path, base_hf: Path, base_megatron: Path, run_forked: RunForked
) -> None:
    configs: dict[str, dict[str, Any]] = {
        "hf_to_megatron": {"hf_model_path": base_hf, "output_dir": tmp_path / "there"},
        "megatron_to_hf": {"megatron_path": base_megatron, "output_dir": tmp_path / "back"},
    }
    for step, values in configs.items():
        (tmp_path / f"{step}.json").write_text(json.dumps(values, default=str), encoding="utf-8")
    conversions = [f"{step}={tmp_path / step}.json" for step in configs]
    code, printed = run_forked(str(SCRIPT), *conversions, "--kills", "2", "--seed", "7")
    assert code == 0, printed
    assert printed.count("2 kills") == 2


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Return a list that gets the name of every data file that is written, of which there are many.

    Ctrl-C comes when the list has five names.
    """
    names: Written = []
    begin = TorchDistFile.__init__

    def note(file: TorchDistFile, path: Path) -> None:
        names.append(path.name)
        if len(names) == 5:
            raise KeyboardInterrupt
        begin(file, path)

    monkeypatch.setattr(megatron_writer, "MAX_FILE_BYTES", 2_000)
    monkeypatch.setattr(TorchDistFile, "__init__", note)
    return names


def _interrupted(tmp_path: Path, base_hf: Path) -> Config:
    config = Config(hf_model_path=base_hf, output_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(config, PRODUCER)
    assert (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    return config


def _hidden(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.glob(".out.*")}


def test_files_that_were_finished_are_not_written_again(
    tmp_path: Path, base_hf: Path, written: Written
) -> None:
    config = _interrupted(tmp_path, base_hf)
    receipts = (tmp_path / ".out.partial" / ".resume").glob("*.json")
    finished = {path.stem for path in receipts}
    assert finished
    damaged = sorted(finished)[0]
    path = next((tmp_path / ".out.partial").glob(f"*/{damaged}"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    written.clear()
    written += ["counted"] * 5
    run(config, PRODUCER)
    assert finished.isdisjoint(set(written) - {damaged})
    assert damaged in written, "a file that is not what its receipt says is written again"
    assert _hidden(tmp_path) == {".out.lock"}


def test_a_changed_source_starts_anew(
    tmp_path: Path,
    base_hf: Path,
    written: Written,
    save_base: Callable[..., LlamaForCausalLM],
) -> None:
    config = _interrupted(tmp_path, base_hf)
    save_base(base_hf, seed=1)
    written += ["counted"] * 5
    run(config, PRODUCER)
    resumed = read_artifact(tmp_path / "out", "checkpoint_megatron")
    run(Config(hf_model_path=base_hf, output_dir=tmp_path / "fresh"), PRODUCER)
    assert resumed.files == read_artifact(tmp_path / "fresh", "checkpoint_megatron").files
    assert _hidden(tmp_path) == {".out.lock"}


def test_what_is_wrong_is_not_gone_on_with(
    tmp_path: Path, base_hf: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _interrupted(tmp_path, base_hf)
    written += ["counted"] * 5
    with monkeypatch.context() as patch:
        patch.setattr(
            "nemotron.steps._formats.fingerprint.TensorDigests.first_difference", lambda *_: "x"
        )
        with pytest.raises(NemotronError, match="differs from what was written"):
            run(config, PRODUCER)
    assert _hidden(tmp_path) == {".out.lock"}
    run(config, PRODUCER)
    assert blake3_file(tmp_path / "out" / "latest_checkpointed_iteration.txt")
