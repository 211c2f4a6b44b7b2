"""One worker of a job array, which does every N-th task of a stage and nothing else.

    python -m nemotron.steps.data_prep.sft_packing.worker --config train.yaml \\
        --stage tokenize --index $SLURM_ARRAY_TASK_ID --count $SLURM_ARRAY_TASK_COUNT

Run all workers of ``tokenize``, then all of ``pack``, then the step itself, which finds every task
done and publishes. The workers agree on the tasks because each plans them from the same config and
files. A worker that dies is simply run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemotron.artifacts import Producer
from nemotron.steps._entry import run_step, step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.checks import check, datasets_of
from nemotron.steps.data_prep.sft_packing.executors import Task
from nemotron.steps.data_prep.sft_packing.job import Job, plan_job
from nemotron.steps.data_prep.sft_packing.receipts import find_receipt
from nemotron.steps.data_prep.sft_packing.run import clear_write_errors, packing_of, run_stage
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.stages import tokenize_tasks
from nemotron.steps.data_prep.sft_packing.team import Stage


def work(config: Config, *, stage: Stage, index: int, count: int) -> None:
    """Run the tasks ``index``, ``index + count``, ... of a stage.

    Raises:
        NemotronError: As the step; ``stage_unfinished``: tasks of ``tokenize`` are not done yet.
    """
    for error in check(config):
        raise error
    with clear_write_errors(config.output_dir):
        job = plan_job(config, datasets_of(config))
        tasks = tokenize_tasks(job) if stage == "tokenize" else _pack_tasks(config, job)
        run_stage(config, stage, tasks[index::count], job)


def _pack_tasks(config: Config, job: Job) -> Sequence[Task]:
    tasks = tokenize_tasks(job)
    found = [find_receipt(task.directory, task.key) for task in tasks]
    receipts = [receipt for receipt in found if receipt is not None]
    if len(receipts) < len(tasks):
        problem = f"tokenized parts: {len(receipts)} of {len(tasks)}"
        raise step_error(STEP, "stage_unfinished", problem, where=str(job.workspace.tokens))
    return packing_of(config, job, receipts).tasks


def main() -> None:
    """Run one worker from its command line."""
    parser = argparse.ArgumentParser(prog="worker", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="config of the step")
    parser.add_argument("--stage", choices=("tokenize", "pack"), required=True)
    parser.add_argument("--index", type=int, required=True, help="number of this worker, from 0")
    parser.add_argument("--count", type=int, required=True, help="how many workers there are")
    arguments = parser.parse_args()
    if not 0 <= arguments.index < arguments.count:
        parser.error(f"--index {arguments.index} is not in 0..{arguments.count - 1}")

    def run(config: Config, producer: Producer) -> None:
        work(config, stage=arguments.stage, index=arguments.index, count=arguments.count)

    raise SystemExit(run_step(STEP, Config, run, ["--config", str(arguments.config)]))


if __name__ == "__main__":
    main()
