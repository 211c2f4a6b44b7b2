"""Packing shared by the two nodes of a real Slurm, against the same packing on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Nemotron = Callable[..., Any]
PACK = ("steps", "run", "data_prep/sft_packing", "-c", "tiny", "blend_path=chats", "num_shards=3")
TWO_NODES = ("run.env.nodes=2", "output_dir=there")


@pytest.fixture
def chats(cluster: Path) -> Path:
    """Five files of different sizes, so five tasks of the first stage."""
    directory = cluster / "chats"
    directory.mkdir()
    for number in range(5):
        rows = [
            {"messages": [turn("user", f"{number} {row}"), turn("assistant", "word " * row)]}
            for row in range(1, 60 + 20 * number)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{number}.jsonl").write_text(lines)
    return directory


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def content(packed: Path) -> dict[str, bytes]:
    """Return the files of an output; which config made it stands in artifact.json alone."""
    files = [path for path in packed.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(packed)): path.read_bytes()
        for path in files
        if path.name != "artifact.json"
    }


def test_two_nodes_share_a_packing_that_goes_on_after_one_failed(
    chats: Path, nemotron: Nemotron
) -> None:
    assert nemotron(*PACK, "output_dir=here").code == 0
    # Both nodes tokenize, then the first one finds too much that is no row.
    bad = chats / "9.jsonl"
    bad.write_text("no row\n" * 99)
    failed = nemotron(*PACK, "-r", "rig", *TWO_NODES)
    assert failed.code == 4, failed.out + failed.err
    assert "error[bad_rows]" in failed.out
    assert not (chats.parent / "there").exists()
    bad.unlink()
    tokens = chats.parent / ".there.work" / "tokens"
    done = {path: path.stat().st_mtime_ns for path in tokens.glob("*.json")}
    assert len(done) == 6
    finished = nemotron(*PACK, "-r", "rig", *TWO_NODES)
    assert finished.code == 0, finished.out + finished.err
    kept = {path: path.stat().st_mtime_ns for path in tokens.glob("*.json")}
    assert len(kept) == 5
    assert kept.items() <= done.items()
    found = content(chats.parent / "there")
    assert len([name for name in found if name.endswith(".parquet")]) == 5
    assert found == content(chats.parent / "here")
    assert sorted(path.name for path in tokens.parent.iterdir()) == ["tokens"]
