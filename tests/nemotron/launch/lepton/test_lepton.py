"""nemotron on a Lepton workspace on loopback, through nemo-run and the real client."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nemotron as nemotron_package
from nemotron import catalog
from nemotron.catalog import find_step
from nemotron.errors import NemotronError
from nemotron.executors import LeptonExecution
from nemotron.launch import lepton, lepton_jobs
from nemotron.plan import build
from nemotron.profile import load_profile
from tests.nemotron.launch.conftest import plan_of

Nemotron = Callable[..., Any]
RUN = ("steps", "run", "demo/make")


def record(job_id: str) -> dict[str, Any]:
    return json.loads((Path(".nemotron") / "jobs" / job_id / "job.json").read_text())


def test_an_attached_job_streams_its_log_and_writes_to_the_storage(
    workspace: Any, nemotron: Nemotron
) -> None:
    done = nemotron(*RUN, "-r", "lepton", "run.env.env_vars.COLOUR=dark 'red' $x")
    assert done.code == 0, done.err + done.out
    assert "making\n" in done.out
    made = workspace.root / "volumes" / "work" / "out" / "make" / "made.txt"
    assert made.read_text().startswith("dark 'red' $x\n")
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"], job["executor"]) == ("succeeded", 0, "lepton")


def test_a_failing_job_gives_its_own_exit_code_and_error_also_later(
    workspace: Any, nemotron: Nemotron
) -> None:
    started = nemotron(*RUN, "-b", "lepton", "behaviour=refuse")
    assert started.code == 0, started.err
    job_id = started.out.strip()
    assert nemotron("jobs", "wait", job_id).code == 4
    assert record(job_id)["error"]["code"] == "too_odd"
    # nemo-run waits for ever for the log of a job that has ended.
    assert "making\n" in nemotron("jobs", "logs", job_id).out
    assert nemotron(*RUN, "-r", "lepton", "behaviour=crash").code == 3


def test_a_job_that_is_cancelled_keeps_its_record_and_log(
    workspace: Any, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    job_id = nemotron(*RUN, "-b", "lepton", "behaviour=sleep").out.strip()
    until(lambda: "making" in next(workspace.root.glob("n-*.log")).read_text())
    assert nemotron("jobs", "cancel", job_id).code == 0
    assert nemotron("jobs", "wait", job_id).code == 130
    assert record(job_id)["status"] == "cancelled"
    assert "making\n" in nemotron("jobs", "logs", job_id).out


def test_a_record_says_where_the_job_is_also_where_the_profile_does_not(
    workspace: Any, nemotron: Nemotron
) -> None:
    text = Path("env.toml").read_text().replace('nemo_run_dir = "/store/nemo-run"\n', "")
    Path("env.toml").write_text(text)
    job_id = nemotron(*RUN, "-b", "lepton").out.strip()
    directory = record(job_id)["placement"]["directory"]
    assert directory == f"/store/work/nemo-run/experiments/nemotron/nemotron_{job_id}"
    assert (workspace.root / "volumes" / Path(directory).relative_to("/store")).is_dir()
    assert nemotron("jobs", "wait", job_id).code == 0


def test_two_nodes_share_one_job(workspace: Any, nemotron: Nemotron) -> None:
    storage = workspace.root / "volumes" / "work" / "out" / "make"
    storage.mkdir(parents=True)
    (storage / "made.txt").write_text("packs")
    done = nemotron("steps", "run", "demo/train", "-r", "lepton", "run.env.nodes=2")
    assert done.code == 0, done.err + done.out
    assert (storage.parent / "train" / "rank0.txt").is_file()
    assert (storage.parent / "train" / "rank1.txt").is_file()


def test_secrets_are_names_of_the_workspace_and_nothing_else(
    workspace: Any, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    with Path("env.toml").open("a") as file:
        file.write('[p]\nextends = "lepton"\nsecrets = ["HF_TOKEN"]\n')
        file.write('secret_vars = { WANDB_API_KEY = "my-key" }\n')
        file.write('startup_commands = ["echo got $HF_TOKEN and $WANDB_API_KEY"]\n')
    done = nemotron(*RUN, "-r", "p", "run.env.container_image=x")
    assert "got secret HF_TOKEN and secret my-key\n" in done.out
    assert "hunter2" not in "".join(workspace.bodies)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("GET /dedicated-node-groups", 401, "workspace_refused"),
        ("POST /jobs", 409, "submission_failed"),
        ("POST /jobs", 429, "submission_failed"),
        ("POST /jobs", 500, "submission_failed"),
    ],
)
def test_what_the_workspace_refuses_is_an_error_with_its_words(
    workspace: Any,
    nemotron: Nemotron,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    status: int,
    code: str,
) -> None:
    monkeypatch.setattr(lepton, "_MOVER_TRIES", 1)
    workspace.faults[fault] = status
    done = nemotron(*RUN, "-r", "lepton")
    assert done.code == 9
    assert f"error[{code}]" in done.err
    assert f"{status} " in done.err
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"]) == ("failed", 9)


@pytest.mark.parametrize(
    ("stalled", "code", "unknown"),
    [
        (".*", "workspace_silent", False),
        ("GET /dedicated-node-groups/.*", "submission_failed", False),
        ("GET /jobs/data-mover.*", "submission_failed", False),
        ("DELETE /jobs/data-mover.*", "submission_failed", False),
        ("POST /jobs|GET /jobs/n-.*", "submission_failed", True),
    ],
)
def test_a_workspace_that_does_not_answer_is_left_soon(
    workspace: Any,
    nemotron: Nemotron,
    monkeypatch: pytest.MonkeyPatch,
    stalled: str,
    code: str,
    unknown: bool,
) -> None:
    monkeypatch.setattr(lepton_jobs, "_TIMEOUT_SECONDS", 0.3)
    workspace.stalls[stalled] = 60
    started = time.monotonic()
    done = nemotron(*RUN, "-r", "lepton")
    assert time.monotonic() - started < 50  # no answer was waited for
    assert done.code == 9
    assert f"error[{code}]" in done.err
    assert "timed out" in done.err
    assert ("in the workspace before you submit again" in done.err) == unknown
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"]) == ("failed", 9)


def test_a_job_that_was_taken_without_an_answer_is_followed_and_a_lost_cancel_is_said(
    workspace: Any, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = workspace.answer

    def late(method: str, path: str, body: Any) -> tuple[int, Any]:
        said = answer(method, path, body)
        is_job = method == "POST" and body["metadata"]["id"].startswith("n-")
        # The helper job takes its time; what comes after it has a second.
        seconds = {"DELETE": 1, "POST": 30}.get(method)
        if seconds and (is_job or method == "DELETE"):
            monkeypatch.setattr(lepton_jobs, "_TIMEOUT_SECONDS", seconds)
            time.sleep(2 * is_job)
        return said

    monkeypatch.setattr(workspace, "answer", late)
    started = nemotron(*RUN, "-b", "lepton", "behaviour=sleep")
    assert started.code == 0, started.err
    job_id = started.out.strip()
    assert len([name for name in workspace.jobs if name.startswith("n-")]) == 1
    monkeypatch.setattr(lepton_jobs, "_TIMEOUT_SECONDS", 0.3)
    workspace.stalls["PATCH .*"] = 60
    cancelled = nemotron("jobs", "cancel", job_id)
    assert (cancelled.code, "error[workspace_silent]" in cancelled.err) == (9, True)
    workspace.stalls.clear()
    monkeypatch.setattr(lepton_jobs, "_TIMEOUT_SECONDS", 30)
    assert nemotron("jobs", "cancel", job_id).code == 0
    assert nemotron("jobs", "wait", job_id).code == 130


def test_who_follows_outlives_a_workspace_that_stumbles_but_not_one_that_refuses(
    workspace: Any, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = nemotron(*RUN, "-b", "lepton").out.strip()
    monkeypatch.setattr(lepton_jobs, "_TIMEOUT_SECONDS", 0.3)
    workspace.faults["GET /jobs/[^/]+"] = 401
    refused = nemotron("jobs", "wait", job_id)
    assert refused.code == 9
    assert "error[workspace_refused]" in refused.err
    assert record(job_id)["exit_code"] is None  # of the job nothing is known yet
    workspace.faults.clear()
    ask, answers = workspace.answer, [503, 429, 500, 0]

    def failing(method: str, path: str, body: Any) -> tuple[int, Any]:
        if not answers:
            return ask(method, path, body)
        status = answers.pop()
        time.sleep(0 if status else 0.5)  # no answer in time
        return status or 200, {}

    monkeypatch.setattr(workspace, "answer", failing)
    followed = nemotron("jobs", "logs", "-f", job_id)
    assert followed.code == 0, followed.err
    assert not answers
    assert "trying again" in followed.err
    assert "making\n" in followed.out


def test_the_tiny_example_does_not_fit_and_what_is_not_on_the_storage_is_named(
    workspace: Any, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = Path(nemotron_package.__file__).parent / "steps"
    monkeypatch.setattr(catalog, "steps_root", lambda: packaged)
    pack = ("steps", "run", "data_prep/sft_packing", "-c", "tiny", "-r", "lepton")
    unfit = nemotron(*pack)
    assert unfit.code == 3
    assert "error[code_too_large]" in unfit.err
    assert "point the config at files of that storage" in unfit.err
    assert not workspace.jobs
    done = nemotron(*pack, "blend_path=chats.jsonl", "tokenizer.model=base")
    assert done.code == 3, done.out + done.err
    assert "job failed: [missing_" in done.err
    assert "fix: " in done.err


def test_a_job_that_the_workspace_has_forgotten_is_lost(workspace: Any, nemotron: Nemotron) -> None:
    job_id = nemotron(*RUN, "-b", "lepton").out.strip()
    nemotron("jobs", "wait", job_id)
    path = Path(".nemotron") / "jobs" / job_id / "job.json"
    text = record(job_id) | {"status": "running", "exit_code": None}
    path.write_text(json.dumps(text))
    workspace.jobs.clear()
    assert nemotron("jobs", "wait", job_id).code == 8
    said = nemotron("jobs", "status", job_id, "--json").data
    assert (said["status"], said["exit_code"], said["error"]["code"]) == ("lost", 8, "job_gone")


def test_a_job_that_was_deleted_has_not_succeeded(
    workspace: Any, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    job_id = nemotron(*RUN, "-b", "lepton", "behaviour=sleep").out.strip()
    until(lambda: "making" in next(workspace.root.glob("n-*.log")).read_text())
    lepton_jobs.open_client().job.delete(record(job_id)["placement"]["id"])
    assert nemotron("jobs", "wait", job_id).code == 130
    assert (record(job_id)["status"], record(job_id)["error"]["code"]) == (
        "cancelled",
        "job_deleted",
    )


def test_a_job_that_was_deleted_after_its_end_ended_as_it_did(
    workspace: Any, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    job_id = nemotron(*RUN, "-b", "lepton").out.strip()
    name = record(job_id)["placement"]["id"]
    until(lambda: workspace.jobs[name].state == "Completed")
    lepton_jobs.open_client().job.delete(name)
    assert nemotron("jobs", "wait", job_id).code == 0


def test_an_extra_that_lepton_has_no_field_for_is_refused_before_a_job_is_made(demo: Path) -> None:
    plan = plan_of("lepton", demo)

    def previewed(extra: dict[str, object]) -> str:
        execution = LeptonExecution.model_validate({"code_path": "/code", "extra": extra})
        run = dataclasses.replace(plan, execution=execution)
        return lepton.preview(run)["LeptonExecutor"]

    assert "retries: 0" in previewed({"retries": 0})
    for name in ("foo", "nodes", "packager"):
        with pytest.raises(NemotronError, match=f"{name} is not a field") as caught:
            previewed({name: 1})
        assert caught.value.code == "unknown_key"


def test_a_key_of_lepton_that_does_nothing_is_said_to(demo: Path) -> None:
    plan_of("lepton", demo)
    words = ["run.env.nprocs_per_node=8"]
    plan = build(find_step("demo/make"), overrides=words, profile=load_profile("p"))
    assert any("the profile's nprocs_per_node has no effect" in note for note in plan.notes)
    words = ["run.env.queue_priority=high-7000"]
    plan = build(find_step("demo/make"), overrides=words, profile=load_profile("p"))
    assert any("queue_priority has no effect without" in note for note in plan.notes)
    plan = build(
        find_step("demo/make"),
        overrides=[*words, "run.env.can_preempt=true"],
        profile=load_profile("p"),
    )
    assert not plan.notes


def test_a_name_is_one_that_lepton_takes() -> None:
    for step in ("peft/megatron_bridge", "data_prep/sft_packing", "x/_y_"):
        slug = step.replace("/", "-").replace("_", "-")
        name = lepton.job_name(f"20261122-024158-{slug}-508b4f")
        assert len(name) <= 34
        assert name[0].isalpha()
        assert name[-1].isalnum()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_what_does_not_fit_into_a_job_is_refused_before_anything_is_sent(
    workspace: Any, nemotron: Nemotron
) -> None:
    digits = random.Random(1).randbytes(120_000).hex()
    long = [f"run.env.env_vars.LONG{i}=x{digits[i * 60_000 : (i + 1) * 60_000]}" for i in range(4)]
    done = nemotron(*RUN, "-r", "lepton", *long)
    assert done.code == 3
    assert "error[config_too_large]" in done.err
    assert not workspace.jobs


def test_check_asks_the_workspace_for_the_secrets(workspace: Any, nemotron: Nemotron) -> None:
    with Path("env.toml").open("a") as file:
        file.write('[p]\nextends = "lepton"\nsecrets = ["HF_TOKEN"]\n')
        file.write('secret_vars = { WANDB_API_KEY = "my-key" }\n')
    wrong = nemotron("profiles", "check", "p")
    assert wrong.code == 3
    assert "ok       the workspace has the secret HF_TOKEN\n" in wrong.out
    assert "FAILED   the workspace has no secret my-key\n" in wrong.out


def test_check_asks_the_workspace_for_the_node_group(workspace: Any, nemotron: Nemotron) -> None:
    assert "node group group exists" in nemotron("profiles", "check", "lepton").out
    text = Path("env.toml").read_text().replace('node_group = "group"', 'node_group = "grop"')
    Path("env.toml").write_text(text)
    wrong = nemotron("profiles", "check", "lepton")
    assert wrong.code == 9
    assert "node_group 'grop' is not one of: group" in wrong.err
