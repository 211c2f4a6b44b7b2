"""The same run at every layout: losses, gradient norms and adapters agree to fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., Any]
# Sums over ranks in another order move a loss by an fp32 ulp or two (1.2e-7); eight AdamW steps
# amplify that, measured at most 3e-7. The bound leaves an order of magnitude.
LOSS_TOLERANCE = 5e-6
# Adam divides by the gradient's own size, so a gradient near zero turns rounding into a step of up
# to the learning rate, 1e-2; a hundredth of one such step is allowed.
ADAPTER_TOLERANCE = 1e-4


def adapter_difference(run: Any, reference: Any) -> float:
    """Return the largest difference between two runs' adapters."""
    name = "adapter_model.safetensors"
    got, wanted = load_file(run.adapter / name), load_file(reference.adapter / name)
    assert got.keys() == wanted.keys()
    return max(float((got[key] - wanted[key]).abs().max()) for key in wanted)


@pytest.fixture(scope="module")
def reference(train: Train) -> Any:
    run = train()
    assert run.exit_code == 0, run.stderr
    return run


@pytest.mark.parametrize(
    ("tensor_size", "data_size", "micro_batch_size"), [(2, 1, 1), (4, 1, 2), (1, 2, 1), (2, 2, 2)]
)
def test_losses_and_adapter_do_not_depend_on_the_layout(
    train: Train, reference: Any, tensor_size: int, data_size: int, micro_batch_size: int
) -> None:
    run = train(
        **{
            "recipe.tensor_model_parallel_size": tensor_size,
            "recipe.sequence_parallel": False,
            "recipe.data_parallel_size": data_size,
            "train.micro_batch_size": micro_batch_size,
        }
    )
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(reference.losses, rel=LOSS_TOLERANCE)
    assert adapter_difference(run, reference) <= ADAPTER_TOLERANCE


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_sequence_parallelism_changes_no_loss_and_no_adapter(
    train: Train, reference: Any, tensor_size: int
) -> None:
    # Rows have other lengths than multiples of 4, so the sequence is padded on the way.
    run = train(**{"recipe.tensor_model_parallel_size": tensor_size})
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(reference.losses, rel=LOSS_TOLERANCE)
    assert adapter_difference(run, reference) <= ADAPTER_TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe.pipeline_model_parallel_size": 4},
        {"model.virtual_pipeline_model_parallel_size": 2},
        {"model.num_layers_in_first_pipeline_stage": 1, "recipe.recompute_granularity": "full"},
    ],
    ids=["four stages", "interleaved", "uneven and recomputed"],
)
def test_pipeline_stages_change_no_bit(
    train: Train, reference: Any, changes: dict[str, Any]
) -> None:
    # The same operations on the same numbers in the same order, dropout and all. Micro batches have
    # different lengths.
    run = train(**{"recipe.pipeline_model_parallel_size": 2, **changes})
    assert run.exit_code == 0, run.stderr
    assert run.losses == reference.losses
    assert run.valid_losses == reference.valid_losses
    assert adapter_difference(run, reference) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        # One micro batch for two stages.
        {"recipe.data_parallel_size": 2, "train.micro_batch_size": 2},
        {"recipe.tensor_model_parallel_size": 2, "recipe.sequence_parallel": False},
        {"recipe.tensor_model_parallel_size": 2},
    ],
    ids=["with data", "with tensor", "with tensor and sequence"],
)
def test_pipeline_stages_go_with_the_other_splits(
    train: Train, reference: Any, changes: dict[str, Any]
) -> None:
    run = train(**{"recipe.pipeline_model_parallel_size": 2, **changes})
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(reference.losses, rel=LOSS_TOLERANCE)
    assert run.valid_losses == pytest.approx(reference.valid_losses, rel=LOSS_TOLERANCE)
    assert adapter_difference(run, reference) <= ADAPTER_TOLERANCE


def test_the_work_of_a_step_is_the_same_at_every_layout_and_shared_by_the_ranks(
    train: Train, reference: Any
) -> None:
    layout = {f"recipe.{name}_parallel_size": 2 for name in ("tensor_model", "pipeline_model")}
    run = train(**layout, **{"logger.log_interval": 3})
    assert work(run, num_ranks=4) == pytest.approx(work(reference, num_ranks=1), rel=1e-12)
    # The largest of all ranks takes a collective, so it is there where a line is printed.
    with_memory = [step for step in steps_of(run) if "peak_memory_bytes" in step]
    assert [step["iteration"] for step in with_memory] == [1, 3, 6, 8]
    # A process that has imported torch holds some 100 MB; this model adds nothing to speak of.
    assert all(5e7 < step["peak_memory_bytes"] < 5e9 for step in with_memory)


def steps_of(run: Any) -> list[dict[str, Any]]:
    return [event for event in run.events if event["event"] == "step"]


def work(run: Any, num_ranks: int) -> list[float]:
    """Return the floating-point operations of every step, in 1e12."""
    return [step["tflops_per_rank"] * step["seconds"] * num_ranks for step in steps_of(run)]


def test_bf16_differs_by_its_rounding_and_leaves_fp32_masters(
    train_here: Train, reference: Any
) -> None:
    run = train_here(mixed_precision="bf16_mixed")
    assert run.exit_code == 0
    assert run.losses != reference.losses
    # bf16 keeps 8 bits; the roundings of a layer's few products move a loss by some 1e-3.
    assert run.losses == pytest.approx(reference.losses, rel=2e-2)
    for file in ("adapter_model.safetensors", "trainer_state.safetensors"):
        assert {each.dtype for each in load_file(run.adapter / file).values()} == {torch.float32}


def test_the_same_run_twice_gives_the_same_bytes(train: Train, reference: Any) -> None:
    again = train()
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (reference.adapter / name).read_bytes()


def test_training_lowers_the_loss_and_is_clipped(reference: Any) -> None:
    steps = steps_of(reference)
    assert min(step["grad_norm"] for step in steps) > 0.5  # the bound: every step was clipped
    assert steps[0]["learning_rate"] == 0.0  # Megatron's first warm-up step
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] - 0.1


def test_every_save_is_validated_and_says_so(reference: Any) -> None:
    validations = [e["iteration"] for e in reference.events if e["event"] == "validation"]
    assert validations == [0, 4, 8]
    assert (reference.output / "latest_checkpointed_iteration.txt").read_text() == "8\n"


def test_the_chat_template_of_the_packs_goes_with_the_adapter(reference: Any) -> None:
    assert (reference.adapter / "chat_template.jinja").read_text() == "{{ messages }}"
