"""Training over the two nodes of a real Slurm, against the same training on this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread everywhere: a rank that has a node to itself would use more, and add in another order.
TRAIN = (
    *("steps", "run", "peft/megatron_bridge", "-c", "tiny"),
    *("train.train_iters=12", "train.global_batch_size=4"),
    "run.env.env_vars.OMP_NUM_THREADS=1",
)


def losses(directory: Path) -> dict[int, float]:
    """Return the training loss of every iteration that a run has done so far."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines]
    return {e["iteration"]: e["lm_loss"] for e in events if e["event"] == "step"}


def test_a_run_stopped_on_two_nodes_and_queued_again_equals_one_on_this_machine(
    cluster: Path, nemotron: Callable[..., Any], until: Callable[..., Any]
) -> None:
    for step in ("data_prep/sft_packing", "convert/hf_to_megatron"):
        assert nemotron("steps", "run", step, "-c", "tiny").code == 0
    options = ("run.env.nodes=2", "run.env.requeue=true", "checkpoint.save=remote")
    # A GPU that Slurm gives and torch is not to use.
    options += ("run.env.gpus_per_node=1", "run.env.env_vars.CUDA_VISIBLE_DEVICES=-1")
    job_id = nemotron(*TRAIN, "-b", "rig", *options).out.strip()
    number = nemotron("jobs", "status", job_id, "--json").data["placement"]["id"]
    until(lambda: losses(cluster / "remote"), 120)
    # What Slurm sends ahead of a time limit or a preemption.
    subprocess.run(["scancel", "--signal=TERM", number], check=True)
    until(lambda: nemotron("jobs", "status", job_id, "--json").data["restarts"] == 1, 60)
    assert not (cluster / "remote" / "iter_0000012").exists()
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now+3"], check=True)
    # While it waits, the same on this machine.
    local = nemotron(*TRAIN, "checkpoint.save=local")
    assert local.code == 0, local.err
    code = nemotron("jobs", "wait", job_id).code
    log = nemotron("jobs", "logs", job_id).out
    assert code == 0, log
    assert "resuming from remote/iter_" in log
    assert "Traceback" not in log
    # The same two ranks in the same order: not only close, but the same bytes.
    assert losses(cluster / "remote") == losses(cluster / "local")
    adapters = [cluster / name / "iter_0000012/adapter_model.safetensors" for name in TWO]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


TWO = ("local", "remote")
