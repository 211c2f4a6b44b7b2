"""nemotron.steps._training.checkpoint: a save that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemotron.artifacts import publish
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._training.checkpoint import SaveFailedError, fail_together
from nemotron.steps._training.distributed import Layout

ALONE = ProcessGroup()
LAYOUT = Layout(ALONE, ALONE, ALONE, ALONE, ALONE, torch.device("cpu"))


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
