"""Hostile inputs and places: a named error or a counted reject, and nothing half-written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron.artifacts import read_artifact
from nemotron.errors import NemotronError

MakeRows = Callable[..., list[dict[str, Any]]]
WriteRows = Callable[..., Path]
RunPacking = Callable[..., Path]
STEP = "nemotron.steps.data_prep.sft_packing.step"
GOOD = json.dumps({"instruction": "Name a bird.", "output": "A crow."})


def run_in_process(
    tmp_path: Path, tokenizer_dir: Path, prelude: str, **values: Any
) -> subprocess.CompletedProcess[str]:
    settings = {
        "tokenizer": str(tokenizer_dir),
        "chat_template": None,
        "output_dir": str(tmp_path / "packed"),
        "num_shards": 1,
        "num_workers": 1,
        "train_ratio": 1.0,
        "valid_ratio": 0.0,
        "test_ratio": 0.0,
    }
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings | values))
    code = f"{prelude}\nfrom {STEP} import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_rows_of_every_hostile_kind_are_counted(
    tmp_path: Path, run_packing: RunPacking, make_rows: MakeRows
) -> None:
    def row(text: str) -> str:
        return json.dumps({"instruction": text, "output": "A crow."})

    hostile = {
        b'{"instruction": "\xff\xfe", "output": "x"}': "invalid_unicode",
        b'{"instruction": "\\ud800", "output": "x"}': "invalid_unicode",
        b'{"instruction": "a\x00b", "output": "x"}': "malformed_json",
        b'{"instruction": "a", "output": "x", "score": NaN}': "malformed_json",
        b'{"instruction": "a", "output": "x", "output": "y"}': "malformed_json",
        b'{"instruction": ' + b"[" * 1_000_000: "malformed_json",
        b'{"messages": [{"role": "user", "content": {"a": ' * 200 + b"1": "malformed_json",
        b"null": "not_an_object",
        b'{"instruction": 7, "output": "x"}': "bad_message",
        b'{"messages": {"role": "user"}}': "no_conversation",
        b'{"messages": [[["user"]]]}': "bad_message",
        b'{"messages": [{"role": ["user"], "content": "x"}]}': "unknown_role",
        b'{"instruction": "a", "output": ""}': "empty_answer",
        b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": 3}]}': "bad_message",
        b'{"messages": [{"role": "assistant", "content": "x"}], "tools": 3}': "bad_tools",
    }
    rows = [*map(json.dumps, make_rows(20)), row("\x00 and \ufffe"), row("\U0010fffe0\U0010ffff")]
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join([*hostile, *(text.encode() for text in rows)]))
    packed = run_packing(file, max_bad_fraction=0.5, pack_size=1024)
    report = read_artifact(packed, "packed_parquet").properties["report"]
    assert report["kept"] == len(rows)
    reasons = list(hostile.values())
    assert report["dropped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    rejects = [json.loads(line) for line in (packed / "rejects.jsonl").read_text().splitlines()]
    found = {reject["line"]: reject["reason"] for reject in rejects}
    assert found == dict(enumerate(reasons, start=1))


def test_a_line_of_300_mb_costs_no_memory(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "x.jsonl"
    with file.open("wb") as stream:  # mostly a hole: quick to write, and 300 MB to read
        stream.write(GOOD.encode() + b'\n{"instruction": "')
        stream.seek(300 << 20)
        stream.write(b'", "output": "y"}\n' + GOOD.encode() + b"\n")
    # 700 MB of address space beyond what the imports take: two copies of the line would not fit.
    prelude = (
        "import resource, pyarrow.parquet, tokenizers, nemotron.steps.data_prep.sft_packing.step\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * 4096 + (500 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held, held))"
    )
    done = run_in_process(
        tmp_path, tokenizer_dir, prelude, blend_path=str(file), max_bad_fraction=0.5
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_artifact(tmp_path / "packed", "packed_parquet").properties["report"]
    assert (report["kept"], report["dropped"]) == (2, {"row_too_large": 1})
    (reject,) = (tmp_path / "packed" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("empty.jsonl", Path.touch, "missing_training_data"),
        ("empty.json", Path.touch, "missing_training_data"),
        ("empty.parquet", Path.touch, "unreadable_input"),
        ("empty.jsonl.gz", Path.touch, "missing_training_data"),
        ("x.jsonl", Path.mkdir, "missing_training_data"),
        ("mem.jsonl", lambda path: path.symlink_to("/proc/self/mem"), "unreadable_input"),
        ("gone.jsonl", lambda path: path.symlink_to("nowhere"), "missing_training_data"),
        ("x.jsonl.gz", lambda path: path.write_bytes(b"not gzip"), "unreadable_input"),
        ("x.jsonl.zst", lambda path: path.write_bytes(b"not zstd"), "unreadable_input"),
        ("x.parquet", lambda path: path.write_bytes(b"PAR1 not Parquet PAR1"), "unreadable_input"),
    ],
)
def test_files_that_hold_nothing_are_errors_that_name_them(
    tmp_path: Path, run_packing: RunPacking, name: str, make: Callable[[Path], Any], code: str
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    make(path)
    with pytest.raises(NemotronError) as caught:
        run_packing(path)
    assert caught.value.code == code
    assert name.split(".", maxsplit=1)[0] in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "packed").exists()


def test_a_full_disk_is_an_error_and_the_run_goes_on_where_there_is_room(
    tmp_path: Path, tokenizer_dir: Path, make_rows: MakeRows, write_rows: WriteRows
) -> None:
    source = write_rows(make_rows(400))
    # A limit on the size of a file fails a write as a full disk does, without needing a mount.
    prelude = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    )
    done = run_in_process(tmp_path, tokenizer_dir, prelude, blend_path=str(source))
    assert done.returncode == 6, done.stdout + done.stderr
    assert "error[cannot_write]" in done.stderr
    assert "fix: " in done.stderr
    assert not (tmp_path / "packed").exists()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {source.name, "train.yaml", ".packed.lock"}
    assert run_in_process(tmp_path, tokenizer_dir, "", blend_path=str(source)).returncode == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_output_that_cannot_be_written_is_an_error(
    write_rows: WriteRows, make_rows: MakeRows, run_packing: RunPacking
) -> None:
    with pytest.raises(NemotronError) as caught:  # /proc takes no directories, not even root's
        run_packing(write_rows(make_rows(20)), output_dir=Path("/proc/packed"))
    assert (caught.value.code, caught.value.exit_code) == ("cannot_write", 6)
