"""nemotron.plan: one config, one command, decided before anything runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from nemotron.catalog import find_step
from nemotron.errors import NemotronError
from nemotron.plan import JobPlan, build
from nemotron.profile import load_profile

SLURM = """
[slurm]
executor = "slurm"
nodes = 2
gpus_per_node = 8
container_image = "registry.example/profile:1"
remote_job_dir = "/lustre/me"
mounts = ["/lustre:/lustre"]
env_vars = { A = "profile", B = "profile" }
secrets = ["HF_TOKEN"]
"""


def plan(step: str, *overrides: str, profile: str | None = None, **options: object) -> JobPlan:
    chosen = None if profile is None else load_profile(profile)
    return build(find_step(step), overrides=overrides, profile=chosen, **options)  # type: ignore[arg-type]


@pytest.fixture
def slurm(demo: Path) -> Path:
    (demo / "profiles").mkdir()
    (demo / "profiles" / "slurm.toml").write_text(SLURM)
    return demo


def test_a_local_torchrun_step_gets_as_many_ranks_as_its_config_needs(demo: Path) -> None:
    job = plan("demo/train", "recipe.tensor_model_parallel_size=4")
    assert job.num_ranks == 4
    assert job.command() == [
        sys.executable,
        *["-m", "nemotron.steps._torchrun", "--standalone", "--local-addr=127.0.0.1"],
        *["--nproc-per-node", "4"],
        *["-m", "nemotron.steps.demo.train.step", "--config", ".nemotron/jobs/<job>/train.yaml"],
    ]
    assert job.command("/jobs/7")[-1] == "/jobs/7/train.yaml"


def test_a_python_step_is_one_process(demo: Path) -> None:
    job = plan("demo/make")
    assert job.num_ranks == 1
    assert job.command()[:3] == [sys.executable, "-m", "nemotron.steps.demo.make.step"]


def test_what_stands_after_the_dashes_is_passed_on_verbatim(demo: Path) -> None:
    words = ("--run", ".nemotron/jobs/<job>/x", "a.b=1", "--", "--config", "-c")
    command = plan("demo/make", passthrough=words).command("/jobs/7")
    assert command[-8:] == ["--config", "/jobs/7/train.yaml", *words]


def test_arguments_win_over_the_config_and_its_base(demo: Path) -> None:
    job = plan("demo/train", "peft.dim=3", config="tiny")
    assert job.values["peft"]["dim"] == 3
    origin = job.origins["peft.dim"]
    assert origin.place == "argument peft.dim=3"
    assert origin.overrides.endswith("tiny.yaml:3")


def test_the_config_of_the_job_is_complete_and_has_no_run_section(demo: Path) -> None:
    values = plan("demo/train").values
    assert "run" not in values
    assert values["save"] == "out/train"


def test_the_yaml_keeps_five_keys_over_the_profile(slurm: Path) -> None:
    job = plan("demo/train", profile="slurm")
    assert job.execution.container_image == "registry.example/demo:25.10"
    assert job.execution.gpus_per_node == 4
    assert job.execution.nodes == 2
    assert job.image == "registry.example/demo:25.10"


def test_the_profile_wins_the_rest_and_the_arguments_win_over_all(slurm: Path) -> None:
    (slurm / "mine.yaml").write_text("run: {env: {env_vars: {A: yaml, C: yaml}}}\n")
    job = plan(
        "demo/make", "run.env.nodes=1", "run.env.env_vars.B=argument", "run.env.qos=high",
        config="mine.yaml", profile="slurm",
    )  # fmt: skip
    assert job.execution.env_vars == {"A": "profile", "B": "argument", "C": "yaml"}
    assert job.nodes == 1
    assert job.execution.model_dump()["qos"] == "high"


def test_a_config_may_not_set_other_keys_of_the_profile(slurm: Path) -> None:
    (slurm / "mine.yaml").write_text("run:\n  env:\n    partition: x\n")
    with pytest.raises(NemotronError, match=r"config cannot set run\.env\.partition") as caught:
        plan("demo/make", config="mine.yaml", profile="slurm")
    assert caught.value.where == "mine.yaml:3"


def test_the_executor_cannot_be_changed_behind_the_profile(slurm: Path) -> None:
    with pytest.raises(NemotronError, match=r"unknown key run\.env\.executor"):
        plan("demo/make", "run.env.executor=slurm")


def test_the_run_section_is_strict(demo: Path) -> None:
    with pytest.raises(NemotronError, match=r"unknown key run\.producer") as caught:
        plan("demo/make", "run.producer={}")
    assert caught.value.fix == "did you mean run.producers?"


def test_errors_of_all_sections_come_at_once(demo: Path) -> None:
    with pytest.raises(NemotronError) as caught:
        plan("demo/train", "peft.dmi=1", "run.env.nodes=x", "run.prod=1")
    assert str(caught.value).count("error[") == 3


def test_a_home_that_no_shell_expands_is_refused_wherever_the_job_runs(slurm: Path) -> None:
    for profile in (None, "slurm"):
        with pytest.raises(NemotronError) as caught:
            plan("demo/train", "save=~/out", profile=profile)
        assert caught.value.code == "home_in_config"
        assert caught.value.where == "argument save=~/out"
        assert caught.value.fix.endswith(str(Path.home() / "out"))
    assert plan("demo/train", "save=x/~/out").values["save"] == "x/~/out"


def test_a_credential_is_refused_before_anything_else(demo: Path) -> None:
    with pytest.raises(NemotronError) as caught:
        plan("demo/train", f"run_name=hf_{'x' * 30}")
    assert caught.value.code == "secret_in_config"
    assert "xxx" not in str(caught.value)


def test_a_remote_plan_uses_the_images_python_and_spreads_the_ranks(slurm: Path) -> None:
    job = plan("demo/train", "recipe.tensor_model_parallel_size=8", profile="slurm")
    assert job.nproc_per_node == 4
    assert shlex.join(job.command()).startswith(
        "python -m nemotron.steps._torchrun --nnodes=2 --nproc-per-node 4 -m nemotron.steps.demo"
    )


def test_mounts_image_and_squash_of_a_slurm_plan(slurm: Path) -> None:
    job = plan("demo/train", "run.env.lustre_mount=/x:/x", profile="slurm")
    # The job runs in this directory, which the container must have.
    assert job.mounts == ("/lustre:/lustre", "/x:/x", f"{slurm}:{slurm}")
    assert job.squash is not None
    remote = plan("demo/train", "run.env.tunnel=ssh", profile="slurm", force_squash=True)
    assert remote.squash is not None
    assert remote.squash.startswith("/lustre/me/registry_example_demo_25_10_")
    assert remote.squash.endswith(".sqsh")
    other = plan(
        "demo/train",
        "run.env.tunnel=ssh",
        "run.env.container_image=registry.example/demo:25_10",
        profile="slurm",
    )
    assert other.squash != remote.squash
    ready = plan(
        "demo/train", "run.env.tunnel=ssh", "run.env.container_image=/x.sqsh", profile="slurm"
    )
    assert ready.squash is None


def test_force_squash_says_that_it_has_no_effect_here(demo: Path) -> None:
    assert any(
        "--force-squash has no effect" in n for n in plan("demo/make", force_squash=True).notes
    )


def test_keys_without_effect_on_a_local_run_are_noted(demo: Path) -> None:
    notes = plan("demo/train", "run.env.container_image=x").notes
    assert notes == ("run.env.container_image has no effect on a local run",)
    assert plan("demo/train").notes == ()


def test_keys_of_a_profile_without_effect_on_a_local_run_are_noted(demo: Path) -> None:
    keys = 'container_image = "x"\ngpus_per_node = 8\nextra = { qos = "high" }\n'
    (demo / "env.toml").write_text(f'[mine]\nextends = "local"\n{keys}')
    assert plan("demo/train", profile="mine").notes == (
        "the profile's container_image has no effect on a local run",
        "the profile's gpus_per_node has no effect on a local run",
        "the profile's extra has no effect on a local run",
    )


def test_a_value_that_the_yaml_keeps_names_the_profile_that_asked_for_another(slurm: Path) -> None:
    job = plan("demo/train", profile="slurm")
    place = job.origins["run.env.gpus_per_node"].place
    assert place.endswith("default.yaml:2")
    assert job.origins["run.env.gpus_per_node"].overrides == "profiles/slurm.toml [slurm]"
    assert job.origins["run.env.nodes"].overrides == ""
    assert job.notes == (
        'the profile\'s container_image = "registry.example/profile:1" has no effect: '
        f'{place} sets "registry.example/demo:25.10"; '
        'pass run.env.container_image="registry.example/profile:1"',
        f"the profile's gpus_per_node = 8 has no effect: {place} sets 4; "
        "pass run.env.gpus_per_node=8",
    )
    job = plan(
        "demo/train", "run.env.gpus_per_node=6", "run.env.container_image=x", profile="slurm"
    )
    assert job.notes == ()


def test_threads_are_shared_out_unless_the_user_did(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert plan("demo/train").environment == {"OMP_NUM_THREADS": "4"}
    assert plan("demo/train", "recipe.tensor_model_parallel_size=16").environment == {
        "OMP_NUM_THREADS": "1"
    }
    given = plan("demo/train", "run.env.env_vars.OMP_NUM_THREADS=3")
    assert given.environment == {"OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert plan("demo/train").environment == {}


def test_startup_commands_share_one_shell_with_the_job(demo: Path) -> None:
    job = plan("demo/make", "run.env.startup_commands=['export A=1', 'cd /']")
    shell, flag, script, name, *rest = job.command()
    assert (shell, flag, name) == ("bash", "-c", "bash")
    assert script.splitlines() == ["set -euo pipefail", "export A=1", "cd /", 'exec "$@"']
    assert rest[:2] == [sys.executable, "-m"]


def test_inputs_take_the_first_key_that_is_set(demo: Path) -> None:
    (first,) = plan("demo/train").inputs
    assert (first.type, first.key, first.path) == ("packed_parquet", "data.packs", "./out/make")
    (second,) = plan("demo/train", "data.packs=null", "data.glob=x/*.parquet").inputs
    assert (second.key, second.path) == ("data.glob", "x/*.parquet")
    (none,) = plan("demo/train", "data.packs=null").inputs
    assert (none.key, none.path) == ("data.packs", None)


def test_outputs_and_producers_come_from_manifest_and_config(demo: Path) -> None:
    job = plan("demo/train", config="tiny")
    assert [(output.type, output.path) for output in job.outputs] == [
        ("checkpoint_lora", "out/train")
    ]
    producer = job.inputs[0].producer
    assert producer is not None
    assert (producer.step, producer.config) == ("demo/make", "tiny")


def test_building_a_plan_writes_nothing(slurm: Path) -> None:
    before = sorted(slurm.rglob("*"))
    plan("demo/train", profile="slurm")
    assert sorted(slurm.rglob("*")) == before


def test_a_config_refers_to_what_profile_and_arguments_make_of_it(slurm: Path) -> None:
    arguments = ("run.env.nodes=4", "output_dir=${run.env.nodes}/${run.env.env_vars.B}")
    job = plan("demo/make", *arguments, profile="slurm")
    assert job.values["output_dir"] == "4/profile"


def test_a_literal_opening_in_a_profile_stays_one(slurm: Path) -> None:
    with (slurm / "profiles" / "slurm.toml").open("a") as file:
        file.write(r"""startup_commands = ['export X=\${HOME}/x']""")
    job = plan("demo/make", profile="slurm")
    assert job.execution.startup_commands == ("export X=${HOME}/x",)
