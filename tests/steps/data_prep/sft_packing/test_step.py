"""The whole step on small files: what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from tests.steps.data_prep.sft_packing.conftest import documents_of, packed_rows, properties_of

MakeRows = Callable[..., list[dict[str, Any]]]
WriteRows = Callable[..., Path]
RunPacking = Callable[..., Path]


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
        check_shard(file, properties)
    for split, counts in properties["splits"].items():
        rows = packed_rows(packed, split)
        check_counts(rows, counts)
        check_sidecar(packed / "packed_metadata" / f"{split}.json", rows, counts)
        documents = [document for row in rows for document in documents_of(row)]
        assert all(row["seq_start_id"][0] == 0 for row in rows)
        assert max(runtime_lengths(rows)) <= 256
        assert all(mask[-1] == 0 and sum(mask) > 0 for _, mask in documents)
        assert all(ids[-1] == tokenizer.eos_token_id for ids, _ in documents)


def check_shard(file: Path, properties: dict[str, Any]) -> None:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    assert [(field.name, field.type) for field in parquet.schema_arrow] == [
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


def check_counts(rows: list[dict[str, Any]], counts: dict[str, int]) -> None:
    documents = [document for row in rows for document in documents_of(row)]
    per_row = [len(row["seq_start_id"]) for row in rows]
    assert counts == {
        "rows": len(rows),
        "conversations": len(documents),
        "documents": len(documents),
        "tokens": sum(len(ids) for ids, _ in documents),
        "supervised_tokens": sum(sum(mask) for _, mask in documents),
        "documents_per_row_p99": np.percentile(per_row, 99, method="inverted_cdf"),
        "documents_per_row_max": max(per_row),
        "longest_document": max(len(ids) - 1 for ids, _ in documents),
        "shortest_row": min(runtime_lengths(rows)),
    }


def check_sidecar(path: Path, rows: list[dict[str, Any]], counts: dict[str, int]) -> None:
    lengths = runtime_lengths(rows)
    assert json.loads(path.read_text()) == [
        {
            "dataset_max_seqlen": counts["longest_document"],
            "max_samples_per_bin": counts["documents_per_row_max"],
            "packing_factor": round(counts["documents"] / len(rows), 2),
            "packing_efficiency": round(100 * sum(lengths) / (256 * len(rows)), 2),
            "pack_size": 256,
            "min_packed_seqlen": min(lengths),
        }
    ]


def runtime_lengths(rows: list[dict[str, Any]]) -> list[int]:
    return [len(row["input_ids"]) - len(row["seq_start_id"]) for row in rows]


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


def test_the_template_of_a_tokenizer_may_write_roles_that_are_text_to_it(
    make_rows: MakeRows,
    write_rows: WriteRows,
    run_packing: RunPacking,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    copy = shutil.copytree(tokenizer_dir, tmp_path / "copy")
    template = (  # as Zephyr's and TinyLlama's
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    rows = make_rows(20, max_turns=1)
    packed = run_packing(write_rows(rows), tokenizer=str(copy), num_workers=1)
    tokenizer = load_tokenizer(str(copy)).backend
    texts = {
        tokenizer.decode(list(ids), skip_special_tokens=False)
        for row in packed_rows(packed, "train")
        for ids, _ in documents_of(row)
    }
    wanted = {
        "".join(f"<|{turn['role']}|>\n{turn['content']}<|im_end|>\n" for turn in row["messages"])
        for row in rows
    }
    assert texts <= {text.removesuffix("\n") for text in wanted}
    with pytest.raises(
        NemotronError, match=r"writes <\|assistant\|>, not in the tokenizer's vocabulary"
    ):
        run_packing(write_rows(rows), chat_template=template)


def test_tiny_config_runs_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_OUTPUT_DIR", str(tmp_path / "tiny"))
    text = (STEPS_ROOT / STEP / "config" / "tiny.yaml").read_text()
    config = tmp_path / "train.yaml"
    config.write_text(text[text.index("blend_path:") :])
    assert run_step(STEP, Config, run, ["--config", str(config)]) == 0
    splits = properties_of(tmp_path / "tiny")["splits"]
    assert set(splits) == {"train", "valid", "test"}
    assert np.all([split["supervised_tokens"] > 0 for split in splits.values()])
