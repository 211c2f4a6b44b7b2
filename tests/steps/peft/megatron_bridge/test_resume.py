"""Going on from a save: as if the run had never stopped, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nemotron.artifacts import hold, read_artifact, verify_files, write_artifact
from nemotron.errors import ExitCode
from nemotron.steps._training.resume import differences, list_saves
from nemotron.steps._training.run_directory import retain_newest
from nemotron.steps.peft.megatron_bridge.identity import run_identity
from nemotron.steps.peft.megatron_bridge.schema import Config
from tests.steps._formats.harm import HARMS, other_base, resign

Train = Callable[..., Any]
# 12 rows in global batches of 4 are 3 iterations an epoch: a stop after 5 is in the second epoch.
# The decay is stated, so that a run of 5 iterations is the beginning of a run of 8.
PLAN = {"scheduler.lr_decay_iters": 8, "train.eval_interval": 2}
ADAPTER, MOMENTS = "adapter_model.safetensors", "trainer_state.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(train_here: Train) -> Any:
    run = train_here(**PLAN)
    assert run.exit_code == 0
    return run


@pytest.fixture(scope="module")
def stopped(train_here: Train) -> Any:
    """A run of the same plan that ended after 5 of 8 iterations, at saves 3 and 5."""
    run = train_here(**PLAN, **{"train.train_iters": 5, "checkpoint.save_interval": 3})
    assert run.exit_code == 0
    return run


@pytest.fixture
def resumable(stopped: Any, tmp_path: Path) -> Path:
    """A copy of ``stopped`` that a test may go on from, or damage."""
    return Path(shutil.copytree(stopped.output, tmp_path / "out"))


def as_unfinished(output: Path, **changes: Any) -> Path:
    """Make the saves those of a run of 8 iterations that was killed; return ``output``.

    ``changes`` are further values of their state.
    """
    for path in output.glob("iter_*/trainer_state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"train_iters": 8} | changes))
        artifact = read_artifact(path.parent, "checkpoint_lora")
        (path.parent / "artifact.json").unlink()
        write_artifact(
            path.parent,
            artifact_type=artifact.type,
            produced_by=artifact.produced_by,
            properties=artifact.properties,
        )
    return output


def with_best(output: Path, iteration: int, lm_loss: float, *, num_other: int = 0) -> Path:
    """Make the saves those of a run whose best was this, with so many supervised tokens more."""
    state = json.loads((output / "iter_0000005/trainer_state.json").read_text())
    num_tokens = state["best"]["supervised_tokens"] + num_other
    best = {"iteration": iteration, "lm_loss": lm_loss, "supervised_tokens": num_tokens}
    return as_unfinished(output, best=best)


def comparable(run: Any) -> list[dict[str, Any]]:
    """Return what a run recorded, without times and directories."""
    kept = ("event", "iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples")
    events = [{k: v for k, v in e.items() if k in kept} for e in run.events]
    return [e for e in events if e["event"] in ("step", "validation")]


def same_bytes(run: Any, other: Any, *names: str) -> bool:
    return all((run.adapter / n).read_bytes() == (other.adapter / n).read_bytes() for n in names)


def test_a_run_that_was_stopped_in_the_second_epoch_ends_with_the_same_bytes(
    train_here: Train, uninterrupted: Any, resumable: Path
) -> None:
    run = train_here(**PLAN, **{"checkpoint.save": str(resumable)})
    assert run.exit_code == 0
    steps = [e for e in comparable(run) if e["event"] == "step"]
    assert steps == [e for e in comparable(uninterrupted) if e["event"] == "step"]
    assert same_bytes(run, uninterrupted, ADAPTER, MOMENTS)
    assert (resumable / "latest_checkpointed_iteration.txt").read_text() == "8\n"


@pytest.mark.parametrize(
    "sharded",
    [
        {"recipe.tensor_model_parallel_size": 2},
        {"recipe.pipeline_model_parallel_size": 2},
    ],
    ids=["tensor and sequence", "pipeline"],
)
def test_another_layout_goes_on_to_rounding(
    train: Train,
    train_here: Train,
    uninterrupted: Any,
    tmp_path: Path,
    sharded: dict[str, Any],
) -> None:
    output = {"checkpoint.save": str(tmp_path / "out")}
    first = train(**PLAN, **output, **sharded, **{"train.train_iters": 5})
    assert first.exit_code == 0, first.stderr
    moments = load_file(first.adapter / MOMENTS)
    second = train_here(**PLAN, **output)
    assert second.exit_code == 0, second.stderr
    # As in test_layouts: sums over ranks in another order, amplified by eight AdamW steps.
    assert second.losses == pytest.approx(uninterrupted.losses, rel=5e-6)
    name = "exp_avg/decoder.layers.1.mlp.linear_fc1.lora_b"
    assert moments[name].shape == (96, 4)


def test_the_newest_two_damaged_leave_the_third(
    train_here: Train, uninterrupted: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run = train_here(
        **PLAN,
        **{"checkpoint.save": str(output), "train.train_iters": 6, "checkpoint.save_interval": 2},
    )
    assert run.exit_code == 0
    as_unfinished(output)
    weights = output / "iter_0000006" / MOMENTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (output / "iter_0000004" / "artifact.json").unlink()
    capfd.readouterr()
    run = train_here(**PLAN, **{"checkpoint.save": str(output)})
    said = capfd.readouterr().out
    assert run.exit_code == 0
    assert "iter_0000006, which is damaged" in said
    assert "iter_0000004, which is damaged" in said
    assert f"resuming from {output / 'iter_0000002'}" in said
    assert run.losses == uninterrupted.losses
    assert same_bytes(run, uninterrupted, ADAPTER, MOMENTS)
    assert (output / "damaged_iter_0000006").is_dir()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer.lr": 0.02}, ["optimizer.lr: 0.01 -> 0.02"]),
        ({"peft.dim": 8, "rng.seed": 7}, ["peft.dim: 4 -> 8", "rng.seed: 1234 -> 7"]),
        ({"scheduler.lr_decay_iters": 9}, ["scheduler.lr_decay_iters: 8 -> 9"]),
        ({"train.train_iters": 5}, ["train.train_iters: 8 -> 5 leaves nothing to do"]),
    ],
)
def test_an_unfinished_run_with_other_values_is_refused_with_what_changed(
    train_here: Train, resumable: Path, change: Any, told: list[str]
) -> None:
    run = train_here(**PLAN | change | {"checkpoint.save": str(as_unfinished(resumable))})
    assert (run.error["code"], run.error["exit_code"]) == ("resume_mismatch", ExitCode.PREFLIGHT)
    assert run.error["problem"].endswith("other values: " + "; ".join(told))
    assert (resumable / "iter_0000005").is_dir()


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        ({"lr_warmup_iters": 2}, {"lr_warmup_init": 1e-5}),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}, {"lr_wsd_decay_iters": 3}),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4},
            {"lr_wsd_decay_style": "linear"},
        ),
    ],
)
def test_whatever_sets_the_learning_rate_counts(
    world: Any, scheduler: dict[str, Any], changes: dict[str, Any]
) -> None:
    identities = [
        run_identity(Config.model_validate({"scheduler": values}), world.packs, world.base)
        for values in (scheduler, scheduler | changes)
    ]
    (told,) = differences(*identities)
    assert told.startswith(f"scheduler.{next(iter(changes))}: ")


def test_the_order_of_patterns_counts_where_the_first_match_does(world: Any) -> None:
    patterns = {"linear_qkv": 8.0, "*.layers.0.*": 4.0}
    identities = [
        run_identity(Config.model_validate({"peft": {"alpha_pattern": p}}), world.packs, world.base)
        for p in (patterns, dict(reversed(patterns.items())), dict(patterns))
    ]
    (told,) = differences(*identities[:2])
    assert told.startswith("order of peft.alpha_pattern: ")
    assert differences(identities[0], identities[2]) == []


def test_other_rows_and_another_base_are_refused(
    train_here: Train, world: Any, resumable: Path, tmp_path: Path
) -> None:
    as_unfinished(resumable)
    for source, key, told in (
        (world.packs, "dataset.nano3_packed_sft_dir", "train rows: "),
        (world.base, "checkpoint.pretrained_checkpoint", "base: "),
    ):
        changed = tmp_path / source.name
        shutil.copytree(source, changed)
        manifest = json.loads((changed / "artifact.json").read_text())
        manifest["properties"]["base_fingerprint"] = "other"
        for file in manifest["files"]:
            file["blake3"] = "0" * 64
        (changed / "artifact.json").write_text(json.dumps(manifest))
        run = train_here(**PLAN, **{"checkpoint.save": str(resumable), key: str(changed)})
        assert run.error["code"] == "resume_mismatch"
        assert told in run.error["problem"]


def test_layout_intervals_and_logging_may_change_and_the_best_stays(
    train_here: Train, resumable: Path
) -> None:
    changes = {
        "train.micro_batch_size": 2,
        "train.eval_interval": 3,
        "checkpoint.save_interval": 1,
        "logger.log_interval": 4,
        "model.recompute_granularity": "full",
        "checkpoint.most_recent_k": 2,
    }
    best = 3, 0.5  # an evaluation that no later one comes near
    output = {"checkpoint.save": str(with_best(resumable, *best))}
    run = train_here(**PLAN | changes | output)
    assert run.exit_code == 0
    properties = read_artifact(run.adapter, "checkpoint_lora").properties
    assert (properties["best_iteration"], properties["best_valid_loss"]) == best
    kept = [iteration for iteration, _ in list_saves(resumable)]
    assert kept[:2] == [8, 7]
    assert len(kept) <= 3  # with the one of the lowest loss, if that is older


def test_the_best_of_other_rows_is_no_best_of_these(train_here: Train, resumable: Path) -> None:
    output = {"checkpoint.save": str(with_best(resumable, 3, 0.5, num_other=1))}
    run = train_here(**PLAN, **output)
    properties = read_artifact(run.adapter, "checkpoint_lora").properties
    assert properties["best_iteration"] > 5
    assert properties["best_valid_loss"] > 0.5
    assert properties["valid_loss_before"] is not None


def test_a_loss_before_of_other_rows_is_no_loss_before(train_here: Train, resumable: Path) -> None:
    before = {"lm_loss": 9.0, "supervised_tokens": 1}
    output = {"checkpoint.save": str(as_unfinished(resumable, before=before))}
    run = train_here(**PLAN, **output)
    properties = read_artifact(run.adapter, "checkpoint_lora").properties
    assert (properties["valid_loss_before"], properties["valid_loss"] > 0.0) == (None, True)


def test_the_newest_whole_saves_are_kept_and_a_damaged_one_is_not_counted(resumable: Path) -> None:
    newest = resumable / "iter_0000005" / ADAPTER
    content = newest.read_bytes()
    newest.write_bytes(content[:-1])
    retain_newest(resumable, 1, until=5)
    assert [iteration for iteration, _ in list_saves(resumable)] == [5, 3]
    newest.write_bytes(content)
    retain_newest(resumable, 1, until=5)
    assert [iteration for iteration, _ in list_saves(resumable)] == [5]


def test_the_save_with_the_lowest_validation_loss_is_kept_and_named(
    train_here: Train, resumable: Path, capfd: Any
) -> None:
    manifest = resumable / "iter_0000003" / "artifact.json"
    record = json.loads(manifest.read_text())
    record["properties"]["valid_loss"] = 0.5  # that no later one comes near
    manifest.write_text(json.dumps(record))
    kept = {"checkpoint.save_interval": 1, "checkpoint.most_recent_k": 2}
    as_unfinished(resumable)
    run = train_here(**PLAN | kept | {"checkpoint.save": str(resumable)})
    assert run.exit_code == 0
    assert [iteration for iteration, _ in list_saves(resumable)] == [8, 7, 3]
    best = f"of all saves, {resumable}/iter_0000003 has the lowest validation loss"
    assert best in capfd.readouterr().out
    retain_newest(resumable, 3, until=8)  # among the newest it is one of them
    assert [iteration for iteration, _ in list_saves(resumable)] == [8, 7, 3]


def test_saves_of_the_time_before_a_run_went_back_do_not_cost_those_since(
    train_here: Train, resumable: Path
) -> None:
    (as_unfinished(resumable) / "iter_0000005" / "trainer_state.json").unlink()
    resign(resumable / "iter_0000005")  # an adapter only: the run goes back to 3
    kept = {"checkpoint.save_interval": 1, "checkpoint.most_recent_k": 2}
    run = train_here(**PLAN | kept | {"checkpoint.save": str(resumable), "train.train_iters": 4})
    assert run.exit_code == 0
    assert [iteration for iteration, _ in list_saves(resumable)] == [5, 4, 3]


def test_a_finished_run_starts_again_and_is_kept(train_here: Train, resumable: Path) -> None:
    output = {"checkpoint.save": str(resumable), "train.train_iters": 5}
    run = train_here(**PLAN, **output)
    assert run.exit_code == 0
    assert [e["iteration"] for e in run.events if e["event"] == "step"] == [1, 2, 3, 4, 5]
    assert (resumable.with_name("out.previous") / "iter_0000003").is_dir()


def test_a_run_that_lacks_only_its_last_evaluation_gets_it(
    train_here: Train, resumable: Path
) -> None:
    as_unfinished(resumable, train_iters=5, is_evaluated=False)
    output = {"checkpoint.save": str(resumable), "train.train_iters": 5}
    moments = (resumable / "iter_0000005" / MOMENTS).read_bytes()
    run = train_here(**PLAN, **output)
    assert run.exit_code == 0
    *_, validation, saved = run.events
    assert (validation["event"], validation["iteration"]) == ("validation", 5)
    assert (saved["event"], saved["iteration"]) == ("saved", 5)
    properties = read_artifact(run.adapter, "checkpoint_lora").properties
    assert properties["valid_loss"] == validation["lm_loss"]
    assert (run.adapter / MOMENTS).read_bytes() == moments
    assert not resumable.with_name("out.previous").exists()


def test_two_runs_never_share_a_directory(train_here: Train, resumable: Path) -> None:
    with hold(resumable):
        run = train_here(**PLAN, **{"checkpoint.save": str(resumable)})
    assert (run.error["code"], run.exit_code) == ("output_locked", ExitCode.LOCKED)
    assert [path.name for path in resumable.glob("iter_*5")] == ["iter_0000005"]


@pytest.mark.parametrize(
    ("checkpoint", "told"),
    [
        ({"most_recent_k": 1}, "wanted -1, or 2 or more"),
        ({"ckpt_step": 3}, "ckpt_step selects a save of checkpoint.load"),
        ({"ckpt_step": 3, "load": "a", "save": "./a"}, "must be a different directory"),
    ],
)
def test_what_cannot_be_honoured_is_refused(checkpoint: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config.model_validate({"checkpoint": checkpoint})


def test_load_from_what_would_make_room_is_refused(
    train_here: Train, stopped: Any, resumable: Path
) -> None:
    previous = Path(shutil.copytree(stopped.output, resumable.with_name("out.previous")))
    as_unfinished(resumable, train_iters=5, identity={})  # another run, that came to its end
    run = train_here(
        **PLAN, **{"checkpoint.save": str(resumable), "checkpoint.load": str(previous)}
    )
    assert (run.error["code"], run.error["where"]) == (
        "output_path_overlaps_inputs",
        "checkpoint.load",
    )
    assert "out.previous, which the new run would move or delete" in run.error["problem"]
    assert [len(list(each.glob("iter_*"))) for each in (resumable, previous)] == [2, 2]


def test_load_goes_on_from_an_earlier_save_in_a_directory_of_its_own(
    train_here: Train, uninterrupted: Any, stopped: Any, tmp_path: Path
) -> None:
    output = {"checkpoint.save": str(tmp_path / "out")}
    back = {"checkpoint.load": str(stopped.output), "checkpoint.ckpt_step": 3}
    run = train_here(**PLAN, **output, **back)
    assert run.exit_code == 0
    assert run.losses == uninterrupted.losses[3:]
    assert same_bytes(run, uninterrupted, ADAPTER, MOMENTS)
    run = train_here(**PLAN, **output, **back | {"checkpoint.ckpt_step": 4})
    assert run.error["code"] == "no_save_to_load"
    assert "no intact save of iteration 4" in run.error["problem"]


def test_load_says_why_the_finished_run_in_its_place_is_not_continued(
    train_here: Train, stopped: Any, resumable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    as_unfinished(resumable, train_iters=5, identity={})  # another run, that came to its end
    place = {"checkpoint.save": str(resumable), "checkpoint.load": str(stopped.output)}
    assert train_here(**PLAN, **place).exit_code == 0
    said = capfd.readouterr().out
    assert f"the finished run in {resumable} is not continued, because of " in said
    assert f"resuming from {stopped.output}" in said


def test_a_save_without_the_optimizer_is_an_adapter_only(
    train_here: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"checkpoint.save": str(tmp_path / "out"), "checkpoint.save_optim": False}
    run = train_here(**changes, **{"train.train_iters": 2})
    assert not (run.adapter / MOMENTS).exists()
    verify_files(run.adapter, read_artifact(run.adapter, "checkpoint_lora"))
    train_here(**changes, **{"train.train_iters": 1})
    assert "iter_0000002, which has only the adapter" in capfd.readouterr().out


@pytest.mark.parametrize("harm", [each for each in HARMS if each is not other_base])
def test_a_harmful_adapter_is_refused_even_with_digests_that_fit(
    train_here: Train, resumable: Path, harm: Callable[[Path], None]
) -> None:
    harm(resumable / "iter_0000005")
    resign(resumable / "iter_0000005")
    run = train_here(**PLAN, **{"checkpoint.save": str(resumable)})
    assert (run.exit_code, run.error["code"]) == (ExitCode.DATA, HARMS[harm])
