"""A merge, and one that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron.artifacts import Producer
from nemotron.errors import NemotronError
from nemotron.steps.convert.merge_lora.schema import Config
from nemotron.steps.convert.merge_lora.step import run

PRODUCER = Producer(step="convert/merge_lora", config_sha256="0" * 64, code_version="0")


def merge_into(adapter: Path, base: Path, output: Path, **changes: Any) -> None:
    """Merge into ``base``, of whichever format it is."""
    key = "base_hf_path" if (base / "config.json").is_file() else "base_megatron_path"
    values = {"lora_checkpoint": adapter, key: base, "output_hf_path": output}
    run(Config.model_validate(values | changes), PRODUCER)


def error_of(adapter: Path, base: Path, output: Path, **changes: Any) -> NemotronError:
    """Return the error of a merge, after checking that it wrote nothing."""
    before = set(output.parent.rglob("*"))
    with pytest.raises(NemotronError) as caught:
        merge_into(adapter, base, output, **changes)
    written = {path for path in set(output.parent.rglob("*")) - before if path.suffix != ".lock"}
    assert not written
    return caught.value
