"""Many runs at once: ids of their own, and one writer per output directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemotron import jobs
from nemotron.launch import lepton


def test_fifty_jobs_of_one_second_have_fifty_ids_and_names(here: Path) -> None:
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(jobs.new_directory, ["peft/megatron_bridge"] * 50))
    assert len({path.name for path in made}) == 50
    assert len({lepton.job_name(path.name) for path in made}) == 50


def test_of_eight_runs_into_one_directory_one_runs_and_seven_name_it(
    demo: Path, nemotron: Callable[..., Any], until: Callable[..., Any]
) -> None:
    (demo / "out").mkdir()
    words = ("steps", "run", "demo/make", "-b", "local", "behaviour=hold")
    ids = [nemotron(*words).out.strip() for _ in range(8)]

    def records() -> list[dict[str, Any]]:
        paths = (Path(".nemotron") / "jobs" / job_id / "job.json" for job_id in ids)
        return [json.loads(path.read_text()) for path in paths]

    until(lambda: sum(record["status"] == "failed" for record in records()) == 7, 120)
    (holder,) = [record["id"] for record in records() if record["status"] == "running"]
    for record in records():
        if record["id"] != holder:
            assert record["exit_code"] == 7
            assert record["error"]["code"] == "output_locked"
            assert f"job {holder}, pid " in record["error"]["problem"]
    (demo / "release").touch()
    assert nemotron("jobs", "wait", holder).code == 0
