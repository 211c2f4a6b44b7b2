"""The whole step on small files: what it counts and leaves out, and when it refuses to go on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import NemotronError
from tests.steps.data_prep.sft_packing.conftest import documents_of, packed_rows, properties_of

MakeRows = Callable[..., list[dict[str, Any]]]
WriteRows = Callable[..., Path]
RunPacking = Callable[..., Path]


def raised(call: Callable[[], object]) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        call()
    return caught.value


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
        ({"num_shards": 100}, "too_many_tiny_shards", r"has \d+ row\(s\); num_shards=1 would fill"),
        (
            {"num_shards": 90, "valid_shards": 20, "test_shards": 20},
            "too_many_tiny_shards",
            r"the \w+ split has \d+ row\(s\) for [25]0 files; valid_shards=null test_shards=null "
            r"num_shards=1 gives every split one file, and as many rows as its ratio says",
        ),
        ({"messages_field": "chat"}, "bad_rows", r"60 of 60 rows \(100.0%\).*no field 'chat'"),
        ({"used_in_filter": "rl"}, "missing_training_data", "no rows are left of the 60 read"),
        ({"blend_path": "/not/here.jsonl"}, "missing_training_data", "does not exist"),
        ({"chat_template": "nano4"}, "bad_chat_template", "did you mean nano3"),
        ({"chat_template": "/not/here.jinja"}, "bad_chat_template", "nor a file"),
        ({"tokenizer": "/not/here"}, "missing_tokenizer", "no such directory"),
        ({"max_doc_tokens": 3}, "seq_length_mismatch", r"no rows are left .* \(60 over_long\)"),
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


@pytest.mark.parametrize("key", ["used_in_filter", "sample"])
def test_rows_that_the_config_leaves_out_are_not_looked_for_elsewhere(
    make_rows: MakeRows, write_rows: WriteRows, run_packing: RunPacking, key: str
) -> None:
    with pytest.raises(NemotronError, match="no rows are left of the 60 read") as caught:
        run_packing(write_rows(make_rows(60)), **{key: "0.1%"})
    assert key in caught.value.fix


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
