"""nemotron.profile: finding, extending and checking profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron.errors import NemotronError
from nemotron.profile import EXECUTORS, load_profile, read_tables
from nemotron.tree import Node, plain

REPOSITORY = Path(__file__).parents[2]


def profiles(directory: Path, text: str, name: str = "a") -> None:
    (directory / "profiles").mkdir(exist_ok=True)
    (directory / "profiles" / f"{name}.toml").write_text(text)


def keys(node: Node) -> object:
    return plain(node)


def test_extends_merges_tables_and_replaces_lists_over_several_levels(here: Path) -> None:
    profiles(
        here,
        """
        [base]
        executor = "slurm"
        partition = "a"
        mounts = ["/a:/a", "/b:/b"]
        env_vars = { X = "1", Y = "1" }
        [middle]
        extends = "base"
        partition = "b"
        [top]
        extends = "middle"
        mounts = ["/c:/c"]
        env_vars = { Y = "2" }
        """,
    )
    profile = load_profile("top")
    assert (profile.name, profile.executor) == ("top", "slurm")
    assert keys(profile.values) == {
        "partition": "b",
        "mounts": ["/c:/c"],
        "env_vars": {"X": "1", "Y": "2"},
    }


def test_a_parent_may_stand_in_another_file(here: Path) -> None:
    profiles(here, '[base]\nexecutor = "slurm"\n', "one")
    profiles(here, '[top]\nextends = "base"\nqos = "high"\n', "two")
    assert load_profile("top").executor == "slurm"


def test_a_circle_of_extends_is_named(here: Path) -> None:
    profiles(here, '[a]\nextends = "b"\n[b]\nextends = "a"\n')
    with pytest.raises(NemotronError, match="a -> b -> a") as caught:
        load_profile("a")
    assert caught.value.code == "profile_cycle"


def test_an_unknown_parent_is_named_with_the_closest(here: Path) -> None:
    profiles(here, '[base]\n[prod]\nextends = "bse"\n')
    with pytest.raises(NemotronError, match=r"\[prod\] extends 'bse'") as caught:
        load_profile("prod")
    assert caught.value.fix == "did you mean base?"
    assert caught.value.where == "profiles/a.toml [prod]"


def test_an_unknown_profile_is_refused_with_what_there_is(here: Path) -> None:
    profiles(here, "[prod]\n")
    with pytest.raises(NemotronError, match="no profile 'prdo'") as caught:
        load_profile("prdo")
    assert caught.value.fix == "did you mean prod?"
    with pytest.raises(NemotronError) as caught:
        load_profile("zzz")
    assert caught.value.fix.startswith("choose from: local, prod")


def test_an_unknown_key_is_refused_with_the_closest(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slurm"\nparttion = "x"\n')
    with pytest.raises(NemotronError, match="unknown slurm profile key parttion") as caught:
        load_profile("p")
    assert caught.value.fix == "did you mean partition?"
    assert caught.value.where == "profiles/a.toml [p]"


def test_keys_of_another_executor_are_refused(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "lepton"\npartition = "x"\n')
    with pytest.raises(NemotronError, match="unknown lepton profile key"):
        load_profile("p")


def test_what_the_schema_does_not_know_goes_into_extra(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slurm"\n[p.extra]\ncomment = "mine"\n')
    assert keys(load_profile("p").values) == {"extra": {"comment": "mine"}}


def test_a_value_of_the_wrong_type_is_refused(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slurm"\nnodes = "two"\ntime = "soon"\n')
    with pytest.raises(NemotronError) as caught:
        load_profile("p")
    assert "nodes is 'two'; wanted an integer" in str(caught.value)
    assert "time is 'soon'" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("time = '4 hours'", "time is '4 hours'; wanted a Slurm time, such as 04:00:00"),
        ('time = "5\\n"', "wanted a Slurm time"),
        ('account = "a\'b"', "wanted one line without quotes and backslashes"),
        ('partition = "p\\n#SBATCH --wrap=x"', "wanted one line without quotes"),
        ("host = '-oProxyCommand=x'", "wanted a name of only letters, digits"),
        ("remote_job_dir = '/a b'", "wanted an absolute path of only letters"),
        # Slurm's log is named for the job, and a file's name has 255 characters at most.
        (f"job_name_prefix = '{'a' * 230}'", "wanted at most 100 characters, only letters"),
    ],
)
def test_a_value_that_no_directive_or_command_can_hold_is_refused_in_words(
    here: Path, written: str, wanted: str
) -> None:
    (here / "env.toml").write_text(f"[x]\nexecutor = 'slurm'\n{written}\n")
    with pytest.raises(NemotronError) as caught:
        load_profile("x")
    assert caught.value.code == "invalid_value"
    assert wanted in caught.value.problem


@pytest.mark.parametrize(
    ("written", "problem", "fix"),
    [
        ("time = 04:00:00", "time = 04:00:00 is not in quotes", 'time = "04:00:00"'),
        ("extra = { begin = 16:00:00 }", "begin = 16:00:00 is not in quotes", 'begin = "16:00:00"'),
        (
            'mounts = ["~/data:/data"]',
            "mounts[0] is '~/data:/data'; only a shell expands ~",
            "/data",
        ),
        ('extra = { export = "NONE" }', "secrets reach the job in sbatch's environment", ""),
    ],
)
def test_a_value_that_would_mean_something_else_is_refused(
    here: Path, written: str, problem: str, fix: str
) -> None:
    profiles(here, f'[p]\nexecutor = "slurm"\n{written}\n')
    with pytest.raises(NemotronError) as caught:
        load_profile("p")
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_what_a_shell_or_this_machine_reads_may_begin_with_a_home(here: Path) -> None:
    lines = 'identity = "~/.ssh/id"\nstartup_commands = ["~/env.sh"]\nextra = { export = "ALL" }'
    profiles(here, f'[p]\nexecutor = "slurm"\n{lines}\n')
    assert load_profile("p").notes == ()


def test_a_key_without_effect_may_begin_with_a_home(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slurm"\nbuild_cache_dir = "~/.cache/images"\n')
    assert load_profile("p").execution.model_fields_set == {"build_cache_dir"}


def test_settings_of_other_tools_are_said_to_have_no_effect(here: Path) -> None:
    (here / "env.toml").write_text('[wandb]\nproject = "x"\n[p]\nexecutor = "slurm"\n')
    (note,) = load_profile("p").notes
    assert note == "[wandb] in env.toml has no effect; pass logger.wandb_project=NAME"


def test_an_unknown_executor_is_refused(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slrum"\n')
    with pytest.raises(NemotronError, match="executor 'slrum'") as caught:
        load_profile("p")
    assert caught.value.fix == "did you mean slurm?"


def test_a_profile_without_executor_is_local_and_local_needs_no_file(here: Path) -> None:
    assert load_profile("local").executor == "local"
    profiles(here, '[mine]\nenv_vars = { A = "1", B = 2 }\n')
    profile = load_profile("mine")
    assert profile.executor == "local"


def test_extends_must_be_one_name(here: Path) -> None:
    profiles(here, '[p]\nextends = ["a"]\n')
    with pytest.raises(NemotronError, match=r"is \['a'\]; wanted the name of one profile"):
        load_profile("p")


def test_executor_must_be_one_name(here: Path) -> None:
    profiles(here, '[p]\nexecutor = ["slurm"]\n')
    with pytest.raises(NemotronError, match=r"has executor \['slurm'\]\n"):
        load_profile("p")


def test_references_are_resolved_and_empty_variables_are_left_out(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_NODES", "3")
    profiles(
        here,
        """
        [p]
        executor = "slurm"
        nodes = "${oc.env:DEMO_NODES,1}"
        env_vars = { GONE = "${oc.env:UNSET_X,''}", ALSO = "${oc.env:UNSET_X,null}", KEPT = "" }
        """,
    )
    assert keys(load_profile("p").values) == {"nodes": 3, "env_vars": {"ALSO": None, "KEPT": ""}}


def test_references_to_keys_see_what_the_profile_makes_of_its_parent(here: Path) -> None:
    profiles(
        here,
        """
        [base]
        executor = "slurm"
        lustre_mount = "/base"
        remote_job_dir = "${lustre_mount}/jobs"
        mounts = ["${lustre_mount}:${lustre_mount}"]
        env_vars = { HF_HOME = "${remote_job_dir}/hf" }
        [top]
        extends = "base"
        lustre_mount = "/top"
        """,
    )
    assert keys(load_profile("top").values) == {
        "lustre_mount": "/top",
        "remote_job_dir": "/top/jobs",
        "mounts": ["/top:/top"],
        "env_vars": {"HF_HOME": "/top/jobs/hf"},
    }


@pytest.mark.parametrize(
    "line",
    [
        'env_vars = { HF_TOKEN = "hf_xxxxxxxxxxxxxxxxxxxxxxxx" }',
        'env_vars = { HF_TOKEN = "${oc.env:HF_TOKEN}" }',
        'env_vars = { WANDB_API_KEY = "tiger" }',
        'remote_job_dir = "https://u:p@host/x"',
    ],
)
def test_a_secret_in_a_profile_is_refused(
    here: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    profiles(here, f'[p]\nexecutor = "slurm"\n{line}\n')
    with pytest.raises(NemotronError) as caught:
        load_profile("p")
    assert caught.value.code == "secret_in_config"
    assert "secrets = [" in caught.value.fix
    assert not any(part in str(caught.value) for part in ("xxxx", "hunter2", "tiger", "u:p"))


def test_files_are_found_upward_until_a_project_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMOTRON_ENV_FILE", raising=False)
    inner = tmp_path / "project" / "sub"
    inner.mkdir(parents=True)
    (tmp_path / "env.toml").write_text("[outside]\n")
    (tmp_path / "project" / "env.toml").write_text("[inside]\n")
    profiles(tmp_path / "project", "[shared]\n")
    assert set(read_tables(inner)) == {"local", "inside", "shared"}
    (inner / "pyproject.toml").touch()
    assert set(read_tables(inner)) == {"local"}


def test_env_toml_stands_before_profiles_and_reserved_tables_are_no_profiles(here: Path) -> None:
    profiles(here, '[p]\nexecutor = "slurm"\nqos = "low"\n')
    (here / "env.toml").write_text(
        '[wandb]\nproject = "x"\n[p]\nexecutor = "slurm"\nqos = "high"\n'
    )
    assert keys(load_profile("p").values) == {"qos": "high"}
    with pytest.raises(NemotronError, match="reserved for settings"):
        load_profile("wandb")


def test_the_variable_names_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "env.toml").write_text("[found]\n")
    (here / "named.toml").write_text("[named]\n")
    monkeypatch.setenv("NEMOTRON_ENV_FILE", "named.toml")
    assert set(read_tables(here)) == {"local", "named"}
    monkeypatch.setenv("NEMOTRON_ENV_FILE", "gone.toml")
    with pytest.raises(NemotronError, match=r"no file gone\.toml") as caught:
        load_profile("local")
    assert caught.value.where == "NEMOTRON_ENV_FILE"


def test_one_name_in_two_files_is_refused(here: Path) -> None:
    profiles(here, "[p]\n", "one")
    profiles(here, "[p]\n", "two")
    with pytest.raises(NemotronError, match=r"one\.toml \[p\] and in profiles/two\.toml"):
        load_profile("p")


@pytest.mark.parametrize("text", ["[p\n", 'x = "outside"\n'])
def test_a_broken_file_is_named(here: Path, text: str) -> None:
    profiles(here, text)
    with pytest.raises(NemotronError) as caught:
        load_profile("p")
    assert caught.value.where == "profiles/a.toml"


def test_every_template_of_the_repository_is_valid_without_any_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NEMOTRON_ENV_FILE", "NEMOTRON_WORKSPACE", "SLURM_ACCOUNT", "SLURM_PARTITION"):
        monkeypatch.delenv(name, raising=False)
    names = set(read_tables(REPOSITORY))
    assert {"local", "slurm_peft_megatron_bridge", "lepton_peft_megatron_bridge"} <= names
    for part in ("prep_sft_packing", "convert_model"):
        assert {f"slurm_{part}", f"lepton_{part}"} <= names
    assert {load_profile(name, REPOSITORY).executor for name in names} == set(EXECUTORS)


def test_no_template_holds_a_secret_or_a_host_name() -> None:
    text = "".join(path.read_text() for path in (REPOSITORY / "profiles").glob("*.toml"))
    assert "host =" not in text
    assert "@" not in text.replace("TERM@", "")
