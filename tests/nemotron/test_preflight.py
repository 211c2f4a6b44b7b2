"""nemotron.preflight: everything that can be known before a run, at once."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from nemotron.catalog import find_step
from nemotron.errors import ExitCode
from nemotron.plan import build
from nemotron.preflight import Check, check, failures, label
from nemotron.profile import load_profile

STORAGE = 'mounts = [{ path = "/", mount_path = "/store", from = "node-nfs:x" }]'
LEPTON = f'executor = "lepton"\ncontainer_image = "x"\nresource_shape = "gpu"\n{STORAGE}'


def checks(
    step: str, *overrides: str, config: str = "default", profile: str = "", dry_run: bool = True
) -> list[Check]:
    chosen = load_profile(profile) if profile else None
    plan = build(find_step(step), config=config, overrides=overrides, profile=chosen)
    return check(plan, dry_run=dry_run)


def texts(found: list[Check], status: str) -> list[str]:
    return [result.text for result in found if result.status == status]


def cluster(directory: Path, text: str) -> None:
    (directory / "env.toml").write_text(text)


def test_a_missing_input_is_pending_in_a_dry_run_and_the_manifests_error_in_a_real_one(
    demo: Path,
) -> None:
    assert texts(checks("demo/train"), "pending") == ["packed_parquet at ./out/make: not there yet"]
    (error,) = failures(checks("demo/train", dry_run=False))
    assert error.code == "missing_packs"
    assert error.where == "data.packs"
    assert (error.why, error.fix) == ("there are no packs", "run demo/make")
    assert error.exit_code is ExitCode.PREFLIGHT


def test_an_input_that_is_not_set_is_missing(demo: Path) -> None:
    assert texts(checks("demo/train", "data.packs=null"), "pending") == [
        "packed_parquet (data.packs is not set): not there yet"
    ]
    (error,) = failures(checks("demo/train", "data.packs=null", dry_run=False))
    assert error.problem == "data.packs is not set"


def test_an_optional_input_may_be_unset_but_not_wrong(demo: Path) -> None:
    assert not failures(checks("demo/make", dry_run=False))
    (error,) = failures(checks("demo/make", "source=gone.jsonl", dry_run=False))
    assert error.problem == "no training_jsonl at gone.jsonl"


def test_a_manifest_without_an_error_of_its_own_names_the_producers(demo: Path) -> None:
    (error,) = failures(checks("demo/use", dry_run=False))
    assert error.code == "input_missing"
    assert error.fix == "run demo/loop or demo/make first, or pass packs=PATH"


def test_an_input_that_is_there_is_ok_and_an_empty_directory_is_not(demo: Path) -> None:
    (demo / "out" / "make").mkdir(parents=True)
    assert failures(checks("demo/train", dry_run=False))
    (demo / "out" / "make" / "a.parquet").touch()
    assert not failures(checks("demo/train", dry_run=False))
    glob = ("data.packs=null", "data.glob=out/make/*.parquet")
    assert not failures(checks("demo/train", *glob, dry_run=False))
    assert failures(checks("demo/train", "data.packs=null", "data.glob=out/*.csv", dry_run=False))


def test_brackets_in_the_name_of_something_that_is_there_are_no_pattern(demo: Path) -> None:
    (demo / "packs[1]").mkdir()
    (demo / "packs[1]" / "a.parquet").touch()
    assert not failures(checks("demo/train", "data.packs='packs[1]'", dry_run=False))
    overlap = ("data.packs='packs[1]'", "save='packs[1]/new'")
    (error,) = failures(checks("demo/train", *overlap, dry_run=False))
    assert error.code == "output_path_overlaps_inputs"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_missing_input_with_a_producer_is_produced_first(demo: Path, dry_run: bool) -> None:
    found = checks("demo/train", config="tiny", dry_run=dry_run)
    assert not failures(found)
    (pending,) = [result for result in found if result.status == "pending"]
    assert pending.text == "packed_parquet at ./out/make: produced first by demo/make -c tiny"
    assert pending.producer is not None
    assert label(pending.producer) == "demo/make -c tiny"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_producer_must_write_where_the_input_is_wanted(demo: Path, dry_run: bool) -> None:
    found = checks("demo/train", "data.packs=elsewhere", config="tiny", dry_run=dry_run)
    (error,) = failures(found)
    assert error.code == "producer_output_differs"
    assert error.fix == (
        "nemotron steps run demo/make -c tiny output_dir=elsewhere, or pass data.packs=out/make"
    )


def test_the_command_that_makes_an_input_can_be_pasted_into_a_shell(demo: Path) -> None:
    (error,) = failures(checks("demo/train", "data.packs=my packs", config="tiny"))
    assert error.fix is not None
    command, _, _ = error.fix.partition(", or pass ")
    assert shlex.split(command)[-2:] == ["tiny", "output_dir=my packs"]


def test_the_command_that_makes_an_input_names_the_config_as_it_is_found(demo: Path) -> None:
    (demo / "mine.yaml").write_text(
        "packs: elsewhere\nsave: ./x\n"
        "run: {producers: {packed_parquet: {step: demo/make, config: ./my make.yaml}}}\n"
    )
    (demo / "my make.yaml").write_text("source: gone.jsonl\noutput_dir: ./out/make\n")
    (error,) = failures(checks("demo/use", config="mine.yaml"))
    assert error.fix is not None
    command, _, _ = error.fix.partition(", or pass ")
    assert shlex.split(command)[-3:] == ["-c", "./my make.yaml", "output_dir=elsewhere"]


def test_a_plan_is_named_by_the_config_that_it_has_and_not_by_one_of_the_same_stem(
    demo: Path,
) -> None:
    (demo / "tiny.yaml").write_text("source: gone.jsonl\noutput_dir: ./out/make\n")
    configs = ("tiny", "./tiny.yaml", str(demo / "tiny.yaml"))
    plans = [build(find_step("demo/make"), config=config) for config in configs]
    assert [label(plan) for plan in plans] == [f"demo/make -c {config}" for config in configs]


def test_an_input_may_lie_inside_of_what_the_producer_writes(demo: Path) -> None:
    overrides = ("data.packs=null", "data.glob=./out/make/splits/*.parquet")
    assert not failures(checks("demo/train", *overrides, config="tiny"))


def test_errors_of_a_producer_are_found_before_anything_runs(demo: Path) -> None:
    (demo / "mine.yaml").write_text(
        "packs: ./out/make\nsave: ./x\n"
        "run: {producers: {packed_parquet: {step: demo/make, config: ./bad.yaml}}}\n"
    )
    (demo / "bad.yaml").write_text("source: gone.jsonl\noutput_dir: ./out/make\n")
    found = checks("demo/use", config="mine.yaml", dry_run=False)
    assert [error.problem for error in failures(found)] == ["no training_jsonl at gone.jsonl"]


def test_producers_that_wait_for_each_other_are_refused(demo: Path) -> None:
    (error,) = failures(checks("demo/loop", config="one"))
    assert error.code == "producer_cycle"
    assert "demo/loop -c one -> demo/loop -c two -> demo/loop -c one" in error.problem


@pytest.mark.parametrize("save", ["out/make", "out/make/inner", "out", "."])
def test_an_output_over_an_input_fails_in_both(demo: Path, save: str) -> None:
    (error,) = failures(checks("demo/train", f"save={save}"))
    assert error.code == "output_path_overlaps_inputs"
    assert error.fix == "choose another save"
    assert error.exit_code is ExitCode.PREFLIGHT


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        ("chats-*.jsonl", 0),
        ("./chats-*.jsonl", 0),
        ("*", 1),
        ("**/*.jsonl", 1),
        ("out/*.jsonl", 0),
        ("out/*", 1),
    ],
)
def test_an_output_may_lie_beside_the_files_of_a_pattern(
    demo: Path, pattern: str, refused: int
) -> None:
    found = failures(checks("demo/train", f"data.packs={pattern}", "save=out/new"))
    assert [error.code for error in found] == ["output_path_overlaps_inputs"] * refused


def test_checks_of_the_step_run_without_torch_and_fail_in_both(demo: Path) -> None:
    (error,) = failures(checks("demo/train", "peft.dim=13"))
    assert error.code == "unlucky"


def test_all_failures_come_at_once(demo: Path) -> None:
    found = checks("demo/train", "peft.dim=13", "save=out/make", "run.env.nodes=2")
    assert [error.code for error in failures(found)] == [
        "layout_invalid",
        "output_path_overlaps_inputs",
        "unlucky",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.env.nodes=2", "a local run has one node"),
        ("run.env.nproc_per_node=3", "the config needs 2 rank(s)"),
    ],
)
def test_a_local_layout_that_cannot_be_is_refused(demo: Path, override: str, problem: str) -> None:
    (error,) = failures(checks("demo/train", override))
    assert problem in error.problem
    assert error.where.startswith("run.env.")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["run.env.nodes=3"], "2 rank(s) cannot be spread evenly over 3 node(s)"),
        (["recipe.tensor_model_parallel_size=8"], "8 ranks per node do not fit on 4 GPU(s)"),
        (["run.env.nproc_per_node=8"], "the config needs 2 rank(s)"),
    ],
)
def test_a_remote_layout_that_cannot_be_is_refused(
    demo: Path, overrides: list[str], problem: str
) -> None:
    cluster(demo, '[c]\nexecutor = "slurm"\n')
    (error,) = failures(checks("demo/train", *overrides, profile="c"))
    assert problem in error.problem


def test_a_remote_step_needs_an_image(demo: Path) -> None:
    cluster(demo, f"[c]\n{LEPTON}\n")
    (error,) = failures(checks("demo/use", "run.env.container_image=null", profile="c"))
    assert error.code == "image_missing"


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (STORAGE, "", "the profile mounts no storage"),
        (
            "",
            'nemo_run_dir = "/scratch"',
            "nemo_run_dir /scratch is not on any of the mounts: /store",
        ),
        (
            "",
            'workspace = "/work"\nnemo_run_dir = "/store/nemo-run"',
            "the output /work/out/train is not on any of the mounts: /store",
        ),
        ('resource_shape = "gpu"', "", "4 GPU(s) per node are requested, but no resource_shape"),
    ],
)
def test_a_lepton_profile_that_cannot_work_is_refused(
    demo: Path, before: str, after: str, problem: str
) -> None:
    keys = LEPTON.replace(before, after) if before else f"{LEPTON}\n{after}"
    cluster(demo, f"[c]\n{keys}\n")
    found = failures(checks("demo/train", profile="c"))
    assert problem in found[0].problem
    assert len(found) == 1


def test_a_lepton_job_without_gpus_needs_no_shape(demo: Path) -> None:
    keys = LEPTON.replace('resource_shape = "gpu"', "")
    cluster(demo, f"[c]\n{keys}\n")
    assert failures(checks("demo/train", "run.env.gpus_per_node=0", profile="c")) == []


def test_what_a_workspace_has_not_been_asked_for_is_pending(demo: Path) -> None:
    cluster(demo, f'[c]\n{LEPTON}\nsecrets = ["HF_TOKEN"]\n')
    found = checks("demo/train", profile="c")
    assert "secret HF_TOKEN: the job takes it from the workspace" in texts(found, "pending")


@pytest.fixture
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this host one from which jobs are submitted."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("login_node")
def test_an_input_that_a_login_node_sees_must_be_there_on_submission(demo: Path) -> None:
    cluster(demo, '[c]\nexecutor = "slurm"\ncontainer_image = ""\n')
    found = checks("demo/train", profile="c", config="tiny")
    (pending,) = texts(found, "pending")
    assert pending.startswith("packed_parquet at ./out/make: not there yet; make it first: ")
    assert pending.endswith("nemotron steps run demo/make -c tiny -r c")
    (error,) = failures(checks("demo/train", profile="c", config="tiny", dry_run=False))
    assert (error.code, error.exit_code) == ("missing_packs", 3)
    assert error.fix == "make it first: nemotron steps run demo/make -c tiny -r c"
    (error,) = failures(checks("demo/train", profile="c", dry_run=False))
    assert error.fix == "run demo/make"  # the config names no producer: the manifest's words
    (demo / "out" / "make").mkdir(parents=True)
    (demo / "out" / "make" / "made.txt").touch()
    found = checks("demo/train", profile="c", dry_run=False)
    assert f"packed_parquet is at {demo}/out/make" in texts(found, "ok")


@pytest.mark.usefixtures("login_node")
@pytest.mark.parametrize(
    ("keys", "override"),
    [
        (LEPTON, ""),
        ('executor = "slurm"\ndependency = "afterok:7"', ""),
        ('executor = "slurm"', "data.packs=/scratch/of/the/node"),
        ('executor = "slurm"\nworkspace = "/opt/inside"\nmounts = ["/nowhere:/opt"]', "../x"),
    ],
)
def test_an_input_that_nobody_can_see_from_here_is_left_to_the_job(
    demo: Path, keys: str, override: str
) -> None:
    cluster(demo, f"[c]\n{keys}\n")
    overrides = [override] if "=" in override else [f"data.packs={override}"] if override else []
    found = checks("demo/train", *overrides, profile="c", dry_run=False)
    assert not failures(found)
    (pending, *_) = texts(found, "pending")
    assert pending.endswith(": cannot be checked from here")


SSH = 'executor = "slurm"\ntunnel = "ssh"\nremote_job_dir = "/jobs"'


@pytest.mark.usefixtures("login_node")
@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ("", True),
        ('executor = "slurm"', True),
        ('executor = "slurm"\nworkspace = "/elsewhere"', False),
        ('executor = "slurm"\ndependency = "afterok:7"', False),
        (f"{SSH}", False),
        (f'{SSH}\nworkspace = "HERE"', False),  # the same name on another machine
        (LEPTON, False),
    ],
)
def test_files_of_this_machine_are_checked_only_where_the_job_has_them(
    demo: Path, keys: str, refused: bool
) -> None:
    cluster(demo, f"[c]\n{keys.replace('HERE', str(demo))}\n")
    (demo / "out" / "make").mkdir(parents=True)
    (demo / "out" / "make" / "odd").touch()
    found = checks("demo/train", profile="c")
    assert [error.code for error in failures(found)] == ["odd_packs"] * refused
    left = "checks of demo/train that read files: left to the job"
    assert (left in texts(found, "pending")) is not refused
    found = checks("demo/train", "peft.dim=13", profile="c")
    assert "unlucky" in [error.code for error in failures(found)]


@pytest.mark.usefixtures("login_node")
def test_an_input_is_looked_for_where_the_image_has_it_from(demo: Path) -> None:
    mounts = f'mounts = ["/nowhere:/", "{demo}/store:/data", "/nowhere:/dat"]'
    cluster(demo, f'[c]\nexecutor = "slurm"\nworkspace = "/data/mine"\n{mounts}\n')
    (error,) = failures(checks("demo/train", profile="c", dry_run=False))
    assert error.code == "missing_packs"
    made = demo / "store" / "mine" / "out" / "make"
    made.mkdir(parents=True)
    (made / "made.txt").touch()
    assert f"packed_parquet is at {made}" in texts(checks("demo/train", profile="c"), "ok")


@pytest.mark.parametrize("profile", ["", "c"])
def test_what_a_job_fetches_is_not_looked_for(demo: Path, profile: str) -> None:
    cluster(demo, '[c]\nexecutor = "slurm"\n')
    found = checks("demo/make", "source=hf://a/b", profile=profile, dry_run=False)
    assert not failures(found)
    assert texts(found, "pending") == ["training_jsonl at hf://a/b: fetched by the job"]


def test_a_secret_must_be_set_for_a_real_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(demo, '[c]\nsecrets = ["HF_TOKEN"]\n')
    assert texts(checks("demo/make", profile="c"), "pending") == ["secret HF_TOKEN is not set here"]
    (error,) = failures(checks("demo/make", profile="c", dry_run=False))
    assert error.code == "secret_missing"
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    found = checks("demo/make", profile="c", dry_run=False)
    assert not failures(found)
    assert "hunter2" not in str(found)
