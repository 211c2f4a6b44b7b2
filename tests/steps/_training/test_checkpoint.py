"""nemotron.steps._training.checkpoint: what it writes at every layout, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.artifacts import publish
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._training.checkpoint import SaveFailedError, fail_together
from nemotron.steps._training.distributed import Layout

ALONE = ProcessGroup()
LAYOUT = Layout(ALONE, ALONE, ALONE, ALONE, ALONE, torch.device("cpu"))
WORKER = Path(__file__).with_name("saves_worker.py")
# Two moments of two factors of four linears of four layers.
NUM_MOMENTS = 2 * 2 * 4 * 4


@pytest.fixture(scope="module")
def saves(run_ranks: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return {"alone": run_ranks(WORKER, 1)["TP 1 PP 1"]} | run_ranks(WORKER, 4)


@pytest.mark.parametrize(
    "layout", ["TP 1 PP 1", "TP 1 PP 2", "TP 1 PP 4", "TP 2 PP 1", "TP 2 PP 2", "TP 4 PP 1"]
)
def test_a_save_has_the_same_bytes_at_every_layout(
    saves: dict[str, dict[str, Any]], layout: str
) -> None:
    alone, save = Path(saves["alone"]["save"]), Path(saves[layout]["save"])
    for name in ("adapter_model.safetensors", "adapter_config.json", "trainer_state.safetensors"):
        assert (save / name).read_bytes() == (alone / name).read_bytes(), name


def test_only_the_rank_that_writes_a_save_holds_it(saves: dict[str, dict[str, Any]]) -> None:
    assert saves["alone"]["held"] == [NUM_MOMENTS]
    for layout in saves.keys() - {"alone"}:
        assert saves[layout]["held"] == [NUM_MOMENTS, 0, 0, 0], layout


def test_a_save_whose_place_holds_what_it_did_not_write_fails_as_on_a_full_disk(
    tmp_path: Path,
) -> None:
    # On the first rank alone: as any other error it would leave the other ranks waiting.
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "iter_0000005" / "notes.md").touch()

    def save() -> Path:
        with publish(tmp_path / "iter_0000005", step="peft/megatron_bridge") as partial:
            return partial

    with pytest.raises(SaveFailedError, match="holds files that no step of nemotron wrote"):
        fail_together(LAYOUT, save)
