"""Finds the config, tokenizer and chat template for a Megatron checkpoint, or makes them."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nemotron.steps._entry import step_error
from nemotron.steps._formats.huggingface import TOKENIZER_FILES, copy_files, describes
from nemotron.steps._formats.megatron import MegatronCheckpoint
from nemotron.steps.convert.megatron_to_hf.checks import STEP


@contextlib.contextmanager
def model_files(checkpoint: MegatronCheckpoint, hf_model_path: Path | None) -> Iterator[Path]:
    """Yield a directory with the config and the tokenizer of a checkpoint.

    That is ``hf_model_path``, else the checkpoint's own ``hf/``, else one made of its run config
    and its ``tokenizer/``.

    Raises:
        NemotronError: ``other_model``: ``hf_model_path`` describes another one.
    """
    given = hf_model_path or checkpoint.hf_dir
    if given is not None:
        if not describes(given, checkpoint.config):
            problem = f"{given}/config.json describes a different model than {checkpoint.root}"
            raise step_error(STEP, "other_model", problem, where="hf_model_path")
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        copy_files(checkpoint.iteration_dir / "tokenizer", directory, TOKENIZER_FILES)
        dtype = str(checkpoint.dtype("embedding.word_embeddings.weight")).removeprefix("torch.")
        config = checkpoint.config.to_hf(dtype_name=dtype)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        print(
            f"note: config.json was made from {checkpoint.iteration_dir}/run_config.yaml; begin "
            "and end tokens and the generation config can only come from hf_model_path",
            file=sys.stderr,
        )
        yield directory
