"""Hostile inputs and places: a named error or a counted reject, and nothing half-written."""

from __future__ import annotations

import functools
import json
import math
import operator
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nemotron.artifacts import read_artifact
from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.conversations import detect_field, read_conversation
from nemotron.steps.data_prep.sft_packing.masks import build_encoder
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rows import parse
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

MakeRows = Callable[..., list[dict[str, Any]]]
WriteRows = Callable[..., Path]
RunPacking = Callable[..., Path]
STEP = "nemotron.steps.data_prep.sft_packing.step"
GOOD = json.dumps({"instruction": "Name a bird.", "output": "A crow."})
# One row of each convention, with every field that is looked at, and values of every type.
ROWS = (
    """{"messages": [
        {"role": "user", "content": "Q", "name": "n"},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}], "reasoning": "r",
         "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "T", "tool_call_id": "1"},
        {"role": "assistant", "content": "A"}],
      "tools": [{"function": {"name": "f"}}], "system": "S"}""",
    """{"conversations": [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": "{}"},
        {"from": "gpt", "value": "A"}],
      "tools": "[]", "system": "S"}""",
    """{"instruction": "Q", "input": "I", "output": "A", "history": [["Q", "A"]], "system": "S"}""",
    """{"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}""",
)
VALUES = (
    *(None, True, 0, 5, -0.5, math.inf, 10**4000, "", "x", "[1]", "[" * 3000, "\ud800"),
    *([], [1], ["x", "y"], [["x", "y"]], [None], [{}], {}, {"x": 1}, [{"name": "f"}]),
    *(b"x", ("x", 1), Decimal(1), date(2026, 1, 1), [{"name": "f", "arguments": {"x": b"x"}}]),
    functools.reduce(lambda value, _: [value], range(600), 1),
    "\U0010fffe99\U0010ffff",
)


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


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*above, key)
        if isinstance(item, dict | list):
            yield from places(item, (*above, key))


def put(row: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a row with another value in one place."""
    changed = json.loads(json.dumps(row))
    functools.reduce(operator.getitem, place[:-1], changed)[place[-1]] = value
    return changed


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
        b'{"instruction": "a", "output": "x", "tools": %b1%b}' % (b"[" * 600, b"]" * 600): (
            "malformed_json"
        ),
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


def test_values_that_only_parquet_has_are_counted(tmp_path: Path, run_packing: RunPacking) -> None:
    def call(at: datetime) -> list[dict[str, Any]]:
        return [{"name": "look", "arguments": {"at": at}}]

    def answers(*messages: dict[str, Any]) -> list[list[dict[str, Any]]]:
        question = {"role": "user", "content": "Q"}
        return [[question, {"role": "assistant", "content": "A", **each}] for each in messages]

    call_type = pa.struct({"name": pa.string(), "arguments": pa.struct({"at": pa.timestamp("us")})})
    types = {"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call_type)}
    conversation = pa.list_(pa.struct(types | {"sent": pa.timestamp("ns")}))
    calls = answers({}, {"tool_calls": call(datetime(2026, 1, 1))}, {"sent": 1}, {"sent": 1000}, {})
    texts = pa.array([b"", b"", b"", b"", b"\xff"]).view(pa.string())  # of no message, but read
    table = pa.table({"messages": pa.array(calls, conversation), "instruction": texts})
    pq.write_table(table, tmp_path / "x.parquet")
    packed = run_packing(
        tmp_path / "x.parquet", max_bad_fraction=0.9, train_ratio=1, valid_ratio=0, test_ratio=0
    )
    report = read_artifact(packed, "packed_parquet").properties["report"]
    rejects = [json.loads(line) for line in (packed / "rejects.jsonl").read_text().splitlines()]
    assert {reject["row"]: reject["reason"] for reject in rejects} == {
        1: "bad_message",
        2: "unreadable_value",
        4: "invalid_unicode",
    }
    assert "datetime" in rejects[0]["detail"]
    assert report["rows_read"] == 5


def test_no_value_in_any_field_ends_the_run(tokenizer_dir: Path) -> None:
    prints_all = (
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ m.tool_calls | default([]) | tojson }}<|im_end|>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(str(tokenizer_dir))
    encoder = build_encoder(
        tokenizer=tokenizer,
        chat_template=prints_all,
        add_bos=False,
        add_eos=True,
        reasoning="split_per_turn",
    )

    def packed_or_reason(row: Any) -> str:
        try:
            field = detect_field(row, messages_field="messages") or "messages"
            conversation = read_conversation(row, field=field, tools_field="tools")
        except BadRowError as error:
            return error.reason
        (found,) = encoder.encode([conversation])
        return found.reason if isinstance(found, BadRowError) else "packed"

    outcomes = Counter(
        packed_or_reason(put(row, place, value))
        for row in map(parse, ROWS)
        for place in places(row)
        for value in VALUES
    )
    assert outcomes["packed"] > 100
    assert outcomes.total() - outcomes["packed"] > 100


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
