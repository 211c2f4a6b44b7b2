"""nemotron.launch.archive: the code that goes with a job."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from nemotron.launch.archive import pack_code


def test_the_archive_is_the_same_bytes_every_time_and_has_the_steps(tmp_path: Path) -> None:
    first, second = pack_code(), pack_code()
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first.content)) as archive:
        members = {member.name: member for member in archive}
    assert "nemotron/steps/peft/megatron_bridge/step.toml" in members  # through the link
    assert all(member.isfile() for member in members.values())
    assert not [name for name in members if "__pycache__" in name]
    assert first.sha256[:12] in first.name


def test_what_is_no_file_is_left_out_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text("x = 1\n")
    (tmp_path / ".#plan.py").symlink_to("me@host.123:456")  # Emacs, while it is open
    os.mkfifo(tmp_path / "pipe")
    with tarfile.open(fileobj=io.BytesIO(pack_code(tmp_path).content)) as archive:
        assert archive.getnames() == ["nemotron/plan.py"]
