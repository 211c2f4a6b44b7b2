"""``nemotron data``: packed data as numbers and as text, counted from the files themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from nemotron.cli.app import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the step makes of a blend of two small data sets."""
    directory = tmp_path_factory.mktemp("packed")
    for name, count in (("birds", 20), ("fish", 60)):
        rows = [
            {"instruction": f"Name {number} {name}.", "output": f"{name} {number}"}
            for number in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines + ("{\n" if name == "fish" else ""))
    sources: list[dict[str, Any]] = [
        {"name": name, "path": f"{name}.jsonl"} for name in ("birds", "fish")
    ]
    sources[1]["weight"] = 2
    (directory / "blend.json").write_text(json.dumps({"datasets": sources}))
    values = {
        "blend_path": directory / "blend.json",
        "output_dir": directory / "out",
        "pack_size": 128,
    }
    arguments = [f"{key}={value}" for key, value in values.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["steps", "run", "data_prep/sft_packing", "-c", "tiny", *arguments]) == 0
    return directory / "out"


@pytest.mark.parametrize("name", ["noext", "lengths.PNG"])
def test_a_histogram_is_written_under_the_name_that_was_asked_for(
    packed: Path, tmp_path: Path, name: str
) -> None:
    assert main(["data", "stats", str(packed), "--png", str(tmp_path / name)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["lengths.svg", "lengths.jpg", "lengths.x"])
def test_a_histogram_of_another_format_is_refused(
    packed: Path, tmp_path: Path, capsys: Captured, name: str
) -> None:
    assert main(["data", "stats", str(packed), "--png", str(tmp_path / name)]) == 2
    assert f"fix: pass --png {tmp_path / 'lengths.png'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_stats_are_those_of_the_rows(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    png = tmp_path / "lengths.png"
    assert main(["data", "stats", str(packed), "--json", "--png", str(png)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert png.read_bytes().startswith(b"\x89PNG")
    for name, item in data["splits"].items():
        files = sorted((packed / "splits" / name).iterdir())
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        ends = [[*row["seq_start_id"][1:], len(row["input_ids"])] for row in rows]
        lengths = sorted(
            end - start - 1
            for row, of_row in zip(rows, ends, strict=True)
            for start, end in zip(row["seq_start_id"], of_row, strict=True)
        )
        supervised = sum(sum(row["loss_mask"]) for row in rows)
        assert (item["rows"], item["documents"]) == (len(rows), len(lengths))
        assert (item["tokens"], item["supervised_tokens"]) == (sum(lengths), supervised)
        assert item["efficiency"] == pytest.approx(sum(lengths) / (128 * len(rows)))
        assert item["document_tokens"]["max"] == lengths[-1]
        assert item["document_tokens"]["p50"] == lengths[(len(lengths) - 1) // 2]
    assert (data["rows_read"], data["kept"]) == (81, 60)
    assert data["dropped"] == {"malformed_json": 1, "weight": 20}
    assert [entry["conversations"] for entry in data["datasets"]] == [20, 40]
    assert main(["data", "stats", str(packed)]) == 0
    page = capsys.readouterr().out
    assert "dropped   20 weight" in page
    assert "66.7%" in page


def test_inspect_shows_documents_and_what_is_trained(packed: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert main(["data", "inspect", str(packed), "--row", "0", "--json"]) == 0
    documents: list[list[dict[str, Any]]] = json.loads(capsys.readouterr().out)["documents"]
    for runs in documents:
        assert [run["trained"] for run in runs] == [False, True]
        assert runs[0]["text"].endswith("<|im_start|>assistant\n")
        assert runs[1]["text"].endswith("<|im_end|>")
    assert main(["data", "inspect", str(packed), "--row", "0"]) == 0
    page = capsys.readouterr().out
    assert page.count("--- document") == len(documents)
    assert f"<<{documents[0][1]['text']}>>" in page


def test_inspect_keeps_the_blanks_that_a_decoder_takes_off_the_start_of_a_text(
    tmp_path: Path, capsys: Captured
) -> None:
    vocabulary = {"<unk>": 0, "▁Red": 1, "?": 2, "▁Yes": 3, ".": 4, "▁Blue": 5}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.decoder = Metaspace(prepend_scheme="first")  # pyright: ignore
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, mask = [1, 2, 3, 4, 5, 2, 3, 4], [0, 1, 1, 0, 0, 1, 1, 0]
    table = pa.table({"input_ids": [ids], "loss_mask": [mask], "seq_start_id": [[0, 4]]})
    pq.write_table(table, tmp_path / "shard.parquet")
    arguments = ["data", "inspect", str(tmp_path), "--tokenizer", str(tmp_path)]
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert "Red?<< Yes.>>" in page
    assert "\nBlue?<< Yes.>>" in page


def test_files_of_others_are_read_by_their_columns(
    packed: Path, tmp_path: Path, capsys: Captured
) -> None:
    table = pa.table({"input_ids": [[5, 6, 27]], "loss_mask": [[1, 1, 0]], "seq_start_id": [[0]]})
    pq.write_table(table, tmp_path / "shard.parquet")
    capsys.readouterr()
    assert main(["data", "stats", str(tmp_path), "--json"]) == 0
    item = json.loads(capsys.readouterr().out)["splits"][""]
    assert (item["rows"], item["tokens"], item["supervised_tokens"]) == (1, 2, 2)
    assert main(["data", "inspect", str(tmp_path)]) == 4
    assert "the packs do not record their tokenizer" in capsys.readouterr().err
    tokenizer = json.loads((packed / "artifact.json").read_text())["properties"]["tokenizer"]
    assert main(["data", "inspect", str(tmp_path), "--tokenizer", tokenizer]) == 0
    # Control characters of the data do not reach the terminal.
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["stats", "nowhere"], 4, "nowhere does not exist"),
        (["inspect", "{}", "--row", "9999"], 2, "no row 9999"),
        (["inspect", "{}", "--split", "dev"], 2, "choose one with --split: train, valid, test"),
        (["inspect", "{}", "--tokenizer", "nowhere"], 4, "no tokenizer.json at nowhere"),
        (["inspect", "{}", "--row", "-1"], 2, "--row"),
        (["stats", "{}/rejects.jsonl"], 4, "is not packed Parquet"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    packed: Path, capsys: Captured, arguments: list[str], code: int, problem: str
) -> None:
    capsys.readouterr()
    assert main(["data", *(text.format(packed) for text in arguments)]) == code
    assert problem in capsys.readouterr().err


def test_shards_that_the_packs_do_not_list_are_refused(
    packed: Path, tmp_path: Path, capsys: Captured
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(packed, packs)
    (shard,) = (packs / "splits" / "valid").iterdir()
    shutil.copy(shard, packs / "splits" / "train" / "shard-00009-of-00010.parquet")
    assert main(["data", "stats", str(packs)]) == 4
    told = capsys.readouterr().err
    assert "error[artifact_unlisted]" in told
    assert "shard-00009-of-00010.parquet is not in artifact.json" in told


def test_another_tokenizer_is_refused(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert main(["data", "inspect", str(packed), "--tokenizer", str(tmp_path)]) == 4
    assert "is not the tokenizer that made these packs" in capsys.readouterr().err


GOOD: dict[str, Any] = {"input_ids": [[5, 6, 27]], "loss_mask": [[1, 1, 0]], "seq_start_id": [[0]]}
UNSORTED = "seq_start_id of row 1 does not increase from 0 to below its length"


@pytest.mark.parametrize(
    ("changes", "metadata", "problem"),
    [
        ({"seq_start_id": [0]}, {}, "its column seq_start_id is int64, not a list of integers"),
        ({"loss_mask": [["a", "b", "c"]]}, {}, "its column loss_mask is list<"),
        ({"input_ids": [None]}, {}, "its column input_ids is null, not a list of integers"),
        (
            {},
            {"nemotron.pack_size": "0512"},
            "its metadata has pack_size '0512', which is not a number",
        ),
    ],
)
def test_a_file_that_is_no_packed_parquet_is_damaged(
    tmp_path: Path, capsys: Captured, changes: dict[str, Any], metadata: Any, problem: str
) -> None:
    table = pa.table(GOOD | changes).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "shard.parquet")
    for command in (["stats"], ["inspect", "--tokenizer", "nowhere"]):
        assert main(["data", *command, str(tmp_path)]) == 4
        error = capsys.readouterr().err
        assert "error[packs_damaged]" in error
        assert problem in error


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (([5, 6, 27], [1, 1, 0], [0, 9]), UNSORTED),
        (([5, 6, 27], [1, 1, 0], [1, 2]), UNSORTED),
        (([5, 6, 27], [1, 1, 0], [0, 2, 1]), UNSORTED),
        (([5, 6, 27], [1, 1, 0], []), UNSORTED),
        (([], [], []), UNSORTED),
        ((None, None, None), "has a null in rows 0 to 2"),
        (([5, 6, 27], [1, None, 0], [0]), "loss_mask has a null in rows 0 to 2"),
    ],
)
def test_a_row_that_breaks_the_contract_is_damaged(
    tmp_path: Path, capsys: Captured, row: tuple[Any, ...], problem: str
) -> None:
    columns = {
        name: [*good, bad, *good] for (name, good), bad in zip(GOOD.items(), row, strict=True)
    }
    pq.write_table(pa.table(columns), tmp_path / "shard.parquet")
    for command in (["stats"], ["inspect", "--row", "1", "--tokenizer", "nowhere"]):
        assert main(["data", *command, str(tmp_path)]) == 4
        error = capsys.readouterr().err
        assert "error[packs_damaged]" in error
        assert problem in error


def test_a_mask_of_another_length_than_its_row_is_damaged(tmp_path: Path, capsys: Captured) -> None:
    pq.write_table(pa.table(GOOD | {"loss_mask": [[1, 0]]}), tmp_path / "shard.parquet")
    assert main(["data", "inspect", str(tmp_path), "--tokenizer", "nowhere"]) == 4
    assert "row 0 has 3 input_ids but 2 loss_mask" in capsys.readouterr().err


@pytest.mark.parametrize("token", [-100, 1 << 31])
def test_an_id_that_no_token_can_have_is_damage(
    tmp_path: Path, capsys: Captured, token: int
) -> None:
    pq.write_table(pa.table(GOOD | {"input_ids": [[5, token, 27]]}), tmp_path / "shard.parquet")
    assert main(["data", "inspect", str(tmp_path), "--tokenizer", "nowhere"]) == 4
    assert f"row 0 has {token} in its input_ids" in capsys.readouterr().err


def test_lists_of_other_widths_are_read(tmp_path: Path, capsys: Captured) -> None:
    schema = pa.schema(
        {
            "input_ids": pa.large_list(pa.uint32()),
            "loss_mask": pa.list_(pa.bool_()),
            "seq_start_id": pa.list_(pa.int64()),
        }
    )
    columns = GOOD | {"loss_mask": [[True, True, False]]}
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "shard.parquet")
    assert main(["data", "stats", str(tmp_path), "--json"]) == 0
    item = json.loads(capsys.readouterr().out)["splits"][""]
    assert (item["rows"], item["tokens"], item["supervised_tokens"]) == (1, 2, 2)
