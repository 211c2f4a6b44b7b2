"""The whole step on small files: what it writes, what it counts, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron.artifacts import read_artifact, verify_files
from nemotron.errors import NemotronError
from nemotron.steps._entry import STEPS_ROOT, run_step
from nemotron.steps.data_prep.sft_packing import output as output_module
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.step import STEP, run
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

MakeRows = Callable[..., list[dict[str, Any]]]
WriteRows = Callable[..., Path]
RunPacking = Callable[..., Path]


def properties_of(packed: Path) -> dict[str, Any]:
    return read_artifact(packed, "packed_parquet").properties


def packed_rows(packed: Path, split: str) -> list[dict[str, list[int]]]:
    files = sorted((packed / "splits" / split).iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def documents_of(row: dict[str, list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    bounds = pairwise([*row["seq_start_id"], len(row["input_ids"])])
    return [
        (tuple(row["input_ids"][start:end]), tuple(row["loss_mask"][start:end]))
        for start, end in bounds
    ]


def raised(call: Callable[[], object]) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        call()
    return caught.value


def test_shards_follow_the_contract_of_the_reader(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, tokenizer_dir: Path
) -> None:
    packed = run_packing(
        write_rows(make_rows(300, max_words=12)), num_shards=2, parquet_row_group_size=8
    )
    verify_files(packed, read_artifact(packed, "packed_parquet"))
    properties = properties_of(packed)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert properties["tokenizer_blake3"] == tokenizer.blake3
    assert (properties["vocab_size"], properties["eos_token_id"]) == (320, 2)
    assert properties["pack_size"] == 256
    files = sorted((packed / "splits" / "train").iterdir())
    assert [file.name for file in files] == [f"shard-0000{n}-of-00002.parquet" for n in (0, 1)]
    for file in files:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        schema = parquet.schema_arrow
        assert [(field.name, field.type) for field in schema] == [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.uint8())),
            ("seq_start_id", pa.list_(pa.int32())),
        ]
        groups = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
        assert set(groups[:-1]) == {8}
        assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
        table = parquet.read()
        entries = {
            key.decode(): text.decode()
            for key, text in (parquet.metadata.metadata or {}).items()
            if key.startswith(b"nemotron.")
        }
        assert entries["nemotron.format_version"] == "2"
        assert entries["nemotron.mask_convention"].startswith("shifted")
        assert entries["nemotron.rows"] == str(table.num_rows)
        assert entries["nemotron.documents"] == str(sum(map(len, table["seq_start_id"])))
        assert entries["nemotron.tokens"] == str(sum(map(len, table["input_ids"])))
        for name in ("pack_size", "algorithm", "seed", "eos_token_id", "chat_template_sha256"):
            assert entries[f"nemotron.{name}"] == str(properties[name])
    for split, counts in properties["splits"].items():
        rows = packed_rows(packed, split)
        documents = [document for row in rows for document in documents_of(row)]
        per_row = [len(row["seq_start_id"]) for row in rows]
        runtime_lengths = [len(row["input_ids"]) - len(row["seq_start_id"]) for row in rows]
        assert counts == {
            "rows": len(rows),
            "conversations": len(documents),
            "documents": len(documents),
            "tokens": sum(len(ids) for ids, _ in documents),
            "supervised_tokens": sum(sum(mask) for _, mask in documents),
            "documents_per_row_p99": np.percentile(per_row, 99, method="inverted_cdf"),
            "documents_per_row_max": max(per_row),
            "longest_document": max(len(ids) - 1 for ids, _ in documents),
            "shortest_row": min(runtime_lengths),
        }
        assert json.loads((packed / "packed_metadata" / f"{split}.json").read_text()) == [
            {
                "dataset_max_seqlen": counts["longest_document"],
                "max_samples_per_bin": counts["documents_per_row_max"],
                "packing_factor": round(len(documents) / len(rows), 2),
                "packing_efficiency": round(100 * sum(runtime_lengths) / (256 * len(rows)), 2),
                "pack_size": 256,
                "min_packed_seqlen": min(runtime_lengths),
            }
        ]
        for row in rows:
            assert row["seq_start_id"][0] == 0
            assert len(row["input_ids"]) - len(row["seq_start_id"]) <= 256
        assert all(mask[-1] == 0 and sum(mask) > 0 for _, mask in documents)
        assert all(ids[-1] == tokenizer.eos_token_id for ids, _ in documents)


def test_a_changed_byte_in_a_shard_is_noticed_by_its_checksum(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    packed = run_packing(write_rows(make_rows(60)), parquet_compression="none")
    file = packed / "splits" / "train" / "shard-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(file, page_checksum_verification=True).read()


def test_every_conversation_is_in_one_split_once_and_trains_its_answers(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, tokenizer_dir: Path
) -> None:
    rows = make_rows(200)
    backend = load_tokenizer(str(tokenizer_dir)).backend
    packed = run_packing(write_rows(rows), pack_size=1024)
    found: list[tuple[str, str]] = []
    for split, count in {"train": 160, "valid": 20, "test": 20}.items():
        documents = [item for row in packed_rows(packed, split) for item in documents_of(row)]
        assert len(documents) == count
        for ids, mask in documents:
            labels = [token for token, flag in zip(ids[1:], mask, strict=False) if flag]
            text, said = (
                backend.decode(list(part), skip_special_tokens=False) for part in (ids, labels)
            )
            found.append((text, said))
    expected = [
        (
            "".join(
                f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                for message in row["messages"]
            ).removesuffix("\n"),
            "".join(
                f"{message['content']}<|im_end|>"
                for message in row["messages"]
                if message["role"] == "assistant"
            ),
        )
        for row in rows
    ]
    assert sorted(found) == sorted(expected)


def test_exact_duplicates_never_straddle_splits(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    rows = make_rows(100) * 2 + make_rows(50, seed=1)
    packed = run_packing(write_rows(rows), pack_size=1024)
    held = {
        split: {ids for row in packed_rows(packed, split) for ids, _ in documents_of(row)}
        for split in ("train", "valid", "test")
    }
    counts = {name: split["documents"] for name, split in properties_of(packed)["splits"].items()}
    assert counts == {"train": 200, "valid": 25, "test": 25}
    assert not held["train"] & held["valid"]
    assert not held["train"] & held["test"]
    assert not held["valid"] & held["test"]


def test_conventions_give_the_same_bytes(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, tmp_path: Path
) -> None:
    plain = [
        {"messages": [message for message in row["messages"] if message["role"] != "system"]}
        for row in make_rows(40, max_turns=1)
    ]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {
            "conversations": [
                {"from": names[message["role"]], "value": message["content"]}
                for message in row["messages"]
            ]
        }
        for row in plain
    ]
    alpaca = [
        {"instruction": row["messages"][0]["content"], "output": row["messages"][1]["content"]}
        for row in plain
    ]
    as_list = tmp_path / "alpaca.json"
    as_list.write_text(json.dumps(alpaca))
    sources = (write_rows(plain), write_rows(sharegpt, "sharegpt.jsonl"), as_list)
    outputs = [
        run_packing(source, output_dir=tmp_path / f"packed-{number}")
        for number, source in enumerate(sources)
    ]
    first, *others = [
        {file.name: file.read_bytes() for file in sorted(packed.rglob("*.parquet"))}
        for packed in outputs
    ]
    assert all(other == first for other in others)


def test_two_runs_write_the_same_bytes_and_another_seed_others(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    source = write_rows(make_rows(60))
    packed = run_packing(source)
    shard = packed / "splits" / "train" / "shard-00000-of-00001.parquet"
    manifest, first = (packed / "artifact.json").read_bytes(), shard.read_bytes()
    run_packing(source)
    assert shard.read_bytes() == first
    assert (packed / "artifact.json").read_bytes() == manifest
    run_packing(source, seed=7)
    assert shard.read_bytes() != first


def test_an_interrupted_run_leaves_the_earlier_output_and_nothing_of_its_own(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_rows(make_rows(60))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_module, "write_artifact", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_packing(source)
        assert not (tmp_path / "packed").exists()
        assert not list(tmp_path.glob(".packed.partial"))
    packed = run_packing(source)
    before = (packed / "artifact.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(output_module, "write_artifact", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_packing(source, seed=9)
    assert (packed / "artifact.json").read_bytes() == before


def test_a_shard_that_is_spoiled_on_its_way_into_the_output_is_told_by_its_digest(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr(output_module, "_link", spoil)
    packed = run_packing(write_rows(make_rows(60)))
    with pytest.raises(NemotronError, match="does not have the BLAKE3"):
        verify_files(packed, read_artifact(packed, "packed_parquet"))


def test_rows_that_cannot_be_used_are_counted_and_named(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[dict[str, Any] | str] = [*make_rows(60)]
    rows[3] = '{"messages": '
    rows[10] = "[1]"
    rows[11] = {"messages": [{"role": "critic", "content": "no"}]}
    rows[12] = {"messages": [{"role": "user", "content": "no"}]}
    source = write_rows(rows)
    error = raised(lambda: run_packing(source, max_bad_fraction=0.05))
    assert (error.code, error.where) == ("bad_rows", f"{source}:4")
    packed = run_packing(source, max_bad_fraction=0.07)
    report = properties_of(packed)["report"]
    assert report["dropped"] == {
        "malformed_json": 1,
        "no_assistant_turn": 1,
        "not_an_object": 1,
        "unknown_role": 1,
    }
    assert (report["rows_read"], report["kept"]) == (60, 56)
    rejects = [json.loads(line) for line in (packed / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (4, "malformed_json"),
        (11, "not_an_object"),
        (12, "unknown_role"),
        (13, "no_assistant_turn"),
    ]
    assert {reject["file"] for reject in rejects} == {str(source)}
    assert re.search(r"dropped +1  malformed_json", capsys.readouterr().out)


@pytest.mark.parametrize("left_out", [{"max_rows": 100}, {"used_in_filter": "sft"}])
def test_rows_that_were_left_out_do_not_hide_that_most_others_are_unusable(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, left_out: dict[str, Any]
) -> None:
    rows: list[dict[str, Any] | str] = []
    for number, row in enumerate(make_rows(2000, max_words=3)):
        rows.append(row | {"used_in": "sft" if number % 20 == 0 else "rl"})
        if number % 25:
            row["messages"][-1]["tool_calls"] = [{"name": "look"}]  # chatml renders no calls
    source = write_rows(rows)
    error = raised(lambda: run_packing(source, **left_out))
    assert re.search(r"\d\d of 100 .*rendered|80 of 100 rows \(80.0%\)", error.problem)


def test_rows_that_max_rows_left_out_were_read_and_count_as_such(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    rows: list[dict[str, Any] | str] = [*make_rows(1980, max_words=3), *["{"] * 20]
    packed = run_packing(write_rows(rows), max_rows=100, max_bad_fraction=0.01)
    assert properties_of(packed)["report"]["dropped"] == {"malformed_json": 20, "max_rows": 1880}
    error = raised(lambda: run_packing(write_rows(rows), max_rows=100, max_bad_fraction=0.009))
    assert "20 of 2000 rows as read and 0 of 100 as rendered (1.0%)" in error.problem


def test_long_conversations_are_cut_at_a_turn_and_counted(
    write_rows: WriteRows, run_packing: RunPacking
) -> None:
    def turns(*words: int) -> dict[str, Any]:
        roles = ("user", "assistant") * 2
        return {
            "messages": [
                {"role": role, "content": "river " * count}
                for role, count in zip(roles, words, strict=False)
            ]
        }

    rows = [turns(1, 3, 3, 400), turns(2, 400), turns(400, 1), turns(1, 1)]
    packed = run_packing(write_rows(rows), train_ratio=1, valid_ratio=0, test_ratio=0, pack_size=64)
    report = properties_of(packed)["report"]
    assert report["truncated"] == {"truncate": 1, "truncate_turn": 1}
    assert report["dropped"] == {"over_long": 1}
    lengths = sorted(
        len(ids) - 1 for row in packed_rows(packed, "train") for ids, _ in documents_of(row)
    )
    assert lengths[-1] == 64


def test_a_blend_realises_weights_limits_and_filters_per_document(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, tmp_path: Path
) -> None:
    tagged = [row | {"used_in": ["sft", "rl"]} for row in make_rows(60)]
    other = [row | {"used_in": "sft, eval"} for row in make_rows(60, seed=1)]
    other[0]["used_in"] = "eval"
    for name, rows in (("a", tagged), ("b", other), ("c", other)):
        write_rows(rows, f"{name}.jsonl")
    datasets = [
        {"name": "a", "path": "a.jsonl", "weight": 2, "max_rows": 50},
        {"name": "b", "path": "b.jsonl", "weight": 1},
        {"name": "c", "path": "missing.jsonl", "weight": 0},
    ]
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"datasets": datasets}))
    report = properties_of(run_packing(blend, used_in_filter="sft"))["report"]
    first, second = report["datasets"]
    assert (first["documents"], first["dropped"]) == (50, {"max_rows": 10})
    assert (second["documents"], second["dropped"]) == (25, {"used_in": 1, "weight": 34})
    assert report["rows_read"] == report["kept"] + sum(report["dropped"].values()) == 120


def test_sample_takes_a_share_of_the_documents(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    report = properties_of(run_packing(write_rows(make_rows(60)), sample="50%"))["report"]
    assert (report["kept"], report["dropped"]) == (30, {"sample": 30})


@pytest.mark.parametrize(
    ("overrides", "code", "problem"),
    [
        ({"num_shards": 100}, "too_many_tiny_shards", r"has \d+ rows; num_shards=1 would fill"),
        ({"messages_field": "chat"}, "bad_rows", r"60 of 60 rows \(100.0%\).*no field 'chat'"),
        ({"used_in_filter": "rl"}, "missing_training_data", "none of the 60 rows is left"),
        ({"blend_path": "/not/here.jsonl"}, "missing_training_data", "does not exist"),
        ({"chat_template": "nano4"}, "bad_chat_template", "did you mean nano3"),
        ({"chat_template": "/not/here.jinja"}, "bad_chat_template", "no file"),
        ({"tokenizer": "/not/here"}, "missing_tokenizer", "no such directory"),
        ({"max_doc_tokens": 3}, "seq_length_mismatch", r"none .* left \(60 over_long\)"),
        ({"sample": "2%"}, "empty_split", "would be empty: 1 documents"),
    ],
)
def test_errors_carry_the_names_of_the_manifest_and_leave_no_output(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    tmp_path: Path,
    overrides: dict[str, Any],
    code: str,
    problem: str,
) -> None:
    source = overrides.pop("blend_path", None) or write_rows(make_rows(60))
    error = raised(lambda: run_packing(source, **overrides))
    assert error.code == code
    assert re.search(problem, error.problem)
    assert error.fix
    assert not (tmp_path / "packed").exists()


NOT_STABLE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ '!' if loop.last and m.role == 'assistant' }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_NAMES = "{% if messages[-1].name %}{{ raise_exception('no names') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "says", "reason"),
    [
        ("chatml", {"tool_calls": [{"name": "look"}]}, "tools_not_rendered"),
        ("chatml", {"reasoning_content": "hm"}, "reasoning_not_rendered"),
        (NOT_STABLE, {}, "template_not_prefix_stable"),
        (NO_NAMES + NOT_STABLE, {"name": "n"}, "template_error"),
    ],
)
def test_rows_that_the_template_cannot_show_are_not_to_be_mended(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    template: str,
    says: dict[str, Any],
    reason: str,
) -> None:
    rows: list[dict[str, Any] | str] = ["{"]
    for row in make_rows(20):
        row["messages"] *= 2
        row["messages"][-1] |= says
        rows.append(row)
    source = write_rows(rows)
    error = raised(lambda: run_packing(source, chat_template=template))
    assert (error.code, error.where) == ("rows_not_rendered", f"{source}:2")
    assert f"20 {reason}" in error.problem
    assert "chat_template" in error.fix
    assert "Mend" not in error.fix


def test_a_template_that_trains_no_token_of_the_data_is_refused(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking
) -> None:
    """It marks the answer of the trial conversation, and none of this data set."""
    template = (
        "{% for m in messages %}{% if m.content == 'This is answered.' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    error = raised(lambda: run_packing(write_rows(make_rows(20)), chat_template=template))
    assert error.code == "bad_loss_masks"
    assert "20 no_trainable_tokens" in error.problem


def test_tiny_config_runs_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_OUTPUT_DIR", str(tmp_path / "tiny"))
    text = (STEPS_ROOT / STEP / "config" / "tiny.yaml").read_text()
    config = tmp_path / "train.yaml"
    config.write_text(text[text.index("blend_path:") :])
    assert run_step(STEP, Config, run, ["--config", str(config)]) == 0
    splits = properties_of(tmp_path / "tiny")["splits"]
    assert set(splits) == {"train", "valid", "test"}
    assert np.all([split["supervised_tokens"] > 0 for split in splits.values()])
