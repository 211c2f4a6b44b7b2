"""A small random Llama as base, random packed rows, and the step itself in ranks of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.artifacts import Producer, publish, write_artifact
from nemotron.steps._entry import run_step
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron_writer import publish_megatron
from nemotron.steps.peft.megatron_bridge import step
from nemotron.steps.peft.megatron_bridge.checks import STEP
from nemotron.steps.peft.megatron_bridge.schema import Config
from tests.conftest import Fork

PACK_SIZE, VOCABULARY, NUM_TRAIN, NUM_VALID = 64, 97, 12, 3
PRODUCER = Producer(step="test", config_sha256="0" * 64, code_version="0")


@dataclass(frozen=True)
class World:
    """Inputs of a run: the Hugging Face base, the same in Megatron's layout, the packs."""

    hf: Path
    base: Path
    packs: Path


@dataclass(frozen=True)
class Run:
    """What a run left behind; ``error`` is what it told its launcher."""

    exit_code: int
    stderr: str
    error: dict[str, Any]
    output: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        text = (self.output / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def losses(self) -> list[float]:
        """The loss of every iteration."""
        return [event["lm_loss"] for event in self.events if event["event"] == "step"]

    @property
    def valid_losses(self) -> list[float]:
        """The loss of every evaluation."""
        return [event["lm_loss"] for event in self.events if event["event"] == "validation"]

    @property
    def adapter(self) -> Path:
        """The last adapter."""
        return sorted(self.output.glob("iter_*"))[-1]


@dataclass(frozen=True)
class Launched:
    """A job that runs."""

    process: BaseProcess
    directory: Path

    def ranks(self, after_steps: int) -> list[int]:
        """Return the processes of the ranks, in order, once so many steps are recorded."""
        config = yaml.safe_load((self.directory / "train.yaml").read_text(encoding="utf-8"))
        metrics = Path(config["checkpoint"]["save"]) / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"step"') >= after_steps):
            assert self.process.is_alive(), self.printed
            time.sleep(0.01)
        return ranks_of(self.process)

    def end(self) -> Run:
        """Wait for the end."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.printed
        return finished(self.directory, self.process.exitcode, self.printed)

    @property
    def printed(self) -> str:
        """What it and its ranks have printed so far."""
        return (self.directory / "output").read_text(encoding="utf-8", errors="replace")


def ranks_of(process: BaseProcess) -> list[int]:
    """Return the children of a torchrun; it starts them in the order of their ranks."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    return sorted(int(pid) for pid in listed.stdout.split())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(root / "hf")
    convert(root / "hf", root / "base")
    write_packs(root / "packs")
    return World(hf=root / "hf", base=root / "base", packs=root / "packs")


def convert(hf: Path, base: Path) -> None:
    publish_megatron(
        base,
        HuggingFaceCheckpoint(hf),
        source=hf,
        source_name="random",
        produced_by=PRODUCER,
        inputs=[],
    )


def write_packs(
    root: Path,
    *,
    pack_size: int = PACK_SIZE,
    tokenizer: str | None = None,
    num_valid: int = NUM_VALID,
    rare: int | None = None,
) -> None:
    """Write random rows of two to five documents; some documents have nothing to train.

    A token ``rare`` is in the first train row only.
    """
    generator = np.random.default_rng(0)
    with publish(root, step="test") as directory:
        for split, num_rows in (("train", NUM_TRAIN), ("valid", num_valid)):
            rows = [random_row(generator) for _ in range(num_rows)]
            if rare is not None:
                for ids, _, _ in rows:
                    ids[:] = [0 if each == rare else each for each in ids]
                rows[0][0][0] = rare if split == "train" else 0
            columns = list(zip(*rows, strict=True))
            types = (pa.int32(), pa.uint8(), pa.int32())
            table = pa.table(
                [pa.array(c, pa.list_(t)) for c, t in zip(columns, types, strict=True)],
                names=["input_ids", "loss_mask", "seq_start_id"],
            )
            (directory / "splits" / split).mkdir(parents=True)
            shard = directory / "splits" / split / "shard-00000-of-00001.parquet"
            pq.write_table(table, shard, row_group_size=4, write_page_checksum=True)
        (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        write_artifact(
            directory,
            artifact_type="packed_parquet",
            produced_by=PRODUCER,
            properties={
                "pack_size": pack_size,
                "tokenizer_blake3": tokenizer,
                "chat_template_sha256": None,
                "splits": {"train": {"rows": NUM_TRAIN}, "valid": {"rows": num_valid}},
            },
        )


def random_row(generator: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    starts: list[int] = []
    for document in range(int(generator.integers(2, 6))):
        length = int(generator.integers(3, 13))
        starts.append(len(ids))
        ids += generator.integers(0, VOCABULARY, length).tolist()
        trained = generator.integers(0, 2, length - 1).tolist() if document else [0] * (length - 1)
        mask += [*trained, 0]
    return ids, mask, starts


@pytest.fixture(scope="session")
def train(
    world: World, start_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Return a function that runs the step with some config values changed (dotted keys)."""

    def run(**changes: Any) -> Run:
        directory = tmp_path_factory.mktemp("run")
        path = write_config(world, directory, changes)
        ranks = start_ranks(
            Path(step.__file__),
            num_ranks_of(path),
            ["--config", str(path)],
            output=directory / "output",
            NEMOTRON_ERROR_FILE=str(directory / "error.json"),
        )
        return finished(directory, *ranks.end(300))

    return run


@pytest.fixture
def launch(world: World, fork: Fork, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Return a function that starts the step under the launcher's torchrun; killed at the end.

    It takes another program to run in the step's place, with arguments, and config values.
    """
    started: list[BaseProcess] = []

    def run(*program: str, **changes: Any) -> Launched:
        directory = tmp_path / f"launched{len(started)}"
        directory.mkdir()
        path = write_config(world, directory, changes)
        arguments = ["--standalone", f"--nproc-per-node={num_ranks_of(path)}"]
        arguments += [*(program or STEP_MODULE), "--config", str(path)]
        error = {"NEMOTRON_ERROR_FILE": str(directory / "error.json")}
        output = directory / "output"
        started.append(fork("nemotron.steps._torchrun", arguments, output=output, **error))
        return Launched(started[-1], directory)

    yield run
    for process in started:
        for rank in ranks_of(process):
            os.kill(rank, signal.SIGKILL)
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def train_here(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return a function that runs the step in this process, as its only rank."""

    def run(**changes: Any) -> Run:
        directory = tmp_path_factory.mktemp("run")
        path = write_config(world, directory, changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NEMOTRON_ERROR_FILE", str(directory / "error.json"))
            code = run_step(STEP, Config, step.run, ["--config", str(path)])
        return finished(directory, code, "")

    return run


STEP_MODULE = ("-m", "nemotron.steps.peft.megatron_bridge.step")


def num_ranks_of(config: Path) -> int:
    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))["recipe"]
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    return math.prod(recipe[size] for size in sizes)


def write_config(world: World, directory: Path, changes: dict[str, Any]) -> Path:
    config = base_config(world, directory / "out")
    for key, value in changes.items():
        section = config
        *parents, last = key.split(".")
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def finished(directory: Path, exit_code: int, stderr: str) -> Run:
    config = yaml.safe_load((directory / "train.yaml").read_text(encoding="utf-8"))
    error = directory / "error.json"
    told = json.loads(error.read_text(encoding="utf-8")) if error.exists() else {}
    return Run(exit_code, stderr, told, Path(config["checkpoint"]["save"]))


def base_config(world: World, output: Path) -> dict[str, Any]:
    return {
        "recipe": {
            "seq_length": PACK_SIZE,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "data_parallel_size": 1,
        },
        "dataset": {"nano3_packed_sft_dir": str(world.packs)},
        "train": {"train_iters": 8, "global_batch_size": 4, "eval_interval": 4},
        "peft": {
            "dim": 4,
            "alpha": 8.0,
            "dropout": 0.1,
            "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        },
        "optimizer": {"lr": 0.01, "clip_grad": 0.5},
        "scheduler": {"lr_warmup_iters": 1},
        "checkpoint": {"save": str(output), "pretrained_checkpoint": str(world.base)},
        "logger": {"log_interval": 1},
    }
