"""Conventions: the same conversation in every shape is one conversation; bad rows say why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemotron.steps.data_prep.sft_packing.conversations import (
    Conversation,
    detect_field,
    read_conversation,
)
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(row: dict[str, Any]) -> Conversation:
    field = detect_field(row, messages_field="messages")
    assert field is not None
    return read_conversation(row, field=field, tools_field="tools")


def test_conventions_give_the_same_messages_and_uid() -> None:
    openai = read(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Add.\n1 and 2"},
                {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
            ]
        }
    )
    sharegpt = read(
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Add.\n1 and 2"},
                {"from": "gpt", "value": "3"},
            ]
        }
    )
    alpaca = read({"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."})
    assert openai.messages == sharegpt.messages == alpaca.messages
    assert openai.uid == sharegpt.uid == alpaca.uid


@pytest.mark.parametrize("prompt", ["Q", [USER]])
@pytest.mark.parametrize("completion", ["A", [ASSISTANT]])
def test_a_prompt_and_its_completion_are_a_conversation(prompt: Any, completion: Any) -> None:
    row = {"prompt": prompt, "completion": completion}
    assert read(row) == read({"messages": [USER, ASSISTANT]})


def test_of_prompt_and_completion_only_the_completion_is_trained() -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, USER, ASSISTANT]}
    assert [message.get("weight") for message in read(row).messages] == [
        *(None, 0, None),
        *(None, None, None),
    ]
    row = {"prompt": [USER, ASSISTANT], "completion": [USER]}
    with pytest.raises(BadRowError) as caught:
        read(row)
    assert caught.value.reason == "untrained"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": None, "conversations": [1]}, "conversations"),
        ({"messages": [], "conversations": [1]}, "conversations"),
        ({"messages": None, "conversations": None, "instruction": "Q"}, "instruction"),
        ({"messages": None, "instruction": "", "input": "Q"}, "instruction"),
        ({"messages": None, "prompt": "Q", "completion": "A"}, "prompt"),
        ({"messages": [1], "prompt": "Q", "completion": "A"}, "messages"),
        ({"messages": None, "prompt": "Q"}, "messages"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, None),
    ],
)
def test_a_field_without_a_conversation_does_not_hide_one(
    row: dict[str, Any], field: str | None
) -> None:
    assert detect_field(row, messages_field="messages") == field


def test_alpaca_history_comes_before_the_instruction() -> None:
    row = {"instruction": "Q2", "input": "", "output": "A2", "history": [["Q", "A"]]}
    contents = [message["content"] for message in read(row).messages]
    assert contents == ["Q", "A", "Q2", "A2"]


def test_function_call_turns_of_sharegpt_become_tool_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "look"}]',
    }
    conversation = read(row)
    call = conversation.messages[1]["tool_calls"][0]
    assert call["function"] == {"name": "look", "arguments": {"at": "sky"}}
    assert conversation.messages[2]["role"] == "tool"
    assert conversation.tools == [{"name": "look"}]


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("names", [("from", "value"), ("role", "content")])
def test_a_function_call_may_be_a_list_of_parallel_calls(
    names: tuple[str, str], as_text: bool
) -> None:
    calls: list[dict[str, Any]] = [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]
    said = [("human", "Q"), ("function_call", json.dumps(calls) if as_text else calls)]
    turns = [dict(zip(names, turn, strict=True)) for turn in [*said, ("gpt", "A")]]
    (message,) = read({"conversations": turns}).messages[1:2]
    assert (message["role"], message["content"]) == ("assistant", "")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f", "g"]


OLD_CALL: dict[str, Any] = {"name": "look", "arguments": '{"at": "sky"}'}


@pytest.mark.parametrize("call", [OLD_CALL, json.dumps(OLD_CALL)])
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_the_old_function_call_and_function_of_openai_are_a_tool_call_and_its_answer(
    call: Any, content: dict[str, Any]
) -> None:
    result = {"name": "look", "content": "sun"}
    old = [{"role": "assistant", "function_call": call, **content}, {"role": "function", **result}]
    new = [{"role": "assistant", "tool_calls": [OLD_CALL]}, {"role": "tool", **result}]
    assert read({"messages": [USER, *old, ASSISTANT]}) == read(
        {"messages": [USER, *new, ASSISTANT]}
    )


def test_an_old_function_call_that_names_nothing_is_no_call() -> None:
    nothing = {"function_call": {"name": None, "arguments": None}}
    assert read({"messages": [USER, ASSISTANT | nothing]}) == read({"messages": [USER, ASSISTANT]})


@pytest.mark.parametrize("names", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize(
    ("asks", "answers"),
    [("User", "Assistant"), ("human", "gpt"), ("Human", "GPT"), ("USER", "model")],
)
def test_roles_are_known_by_the_names_of_either_convention_in_any_case(
    names: tuple[str, str], asks: str, answers: str
) -> None:
    turns = [dict(zip(names, turn, strict=True)) for turn in ((asks, "Q"), (answers, "A"))]
    assert read({"messages": turns}) == read({"messages": [USER, ASSISTANT]})


def test_arguments_in_a_string_become_an_object() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    message = read(row).messages[1]
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}


@pytest.mark.parametrize("said", [{"tool_calls": [{"name": "f"}]}, {"reasoning_content": "hm"}])
def test_a_message_needs_no_content_where_it_says_something_else(said: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", **said}]}
    assert read(row).messages[1]["content"] == ""


def test_content_that_is_null_is_empty_text() -> None:
    row = {"messages": [{"role": "user", "content": None}, ASSISTANT]}
    assert read(row).messages[0]["content"] == ""


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_read_under_each_of_its_names(name: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "A", name: "hm"}]}
    assert read(row).messages[1]["reasoning_content"] == "hm"


def test_uid_ignores_fields_that_say_nothing() -> None:
    tagged = {"messages": [USER | {"id": 7}, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}
    assert read(tagged).uid == read({"messages": [USER, ASSISTANT, USER, ASSISTANT]}).uid


@pytest.mark.parametrize(
    "empty",
    [
        *({"tool_calls": calls} for calls in ([], None)),
        *({name: ""} for name in ("reasoning_content", "thinking", "reasoning", "name")),
        {"function_call": {}, "audio": None, "tool_calls": [], "reasoning_content": ""},
    ],
)
def test_fields_that_exports_leave_empty_are_as_if_they_were_not_there(
    empty: dict[str, Any],
) -> None:
    conversation = read({"messages": [USER | empty, ASSISTANT | empty]})
    assert conversation == read({"messages": [USER, ASSISTANT]})


def test_detect_field_takes_a_named_field_at_its_word() -> None:
    row = {"dialog": [USER, ASSISTANT], "messages": []}
    assert detect_field(row, messages_field="dialog") == "dialog"
    assert detect_field({"messages": []}, messages_field="dialog") is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no_conversation"),
        ({"messages": "Q"}, "no_conversation"),
        ({"messages": ["Q"]}, "bad_message"),
        ({"messages": [{"role": "user", "content": 3}, ASSISTANT]}, "bad_message"),
        ({"messages": [{"role": "user", "text": "Q"}, ASSISTANT]}, "bad_message"),
        ({"messages": [{"role": "user", "value": "Q"}, ASSISTANT]}, "bad_message"),
        ({"messages": [USER, {"role": "assistant"}, USER, ASSISTANT]}, "bad_message"),
        ({"conversations": [{"from": "human", "text": "Q"}]}, "bad_message"),
        *(
            ({"messages": [USER, ASSISTANT | {"weight": weight}]}, "bad_message")
            for weight in (0.5, 2, -1, "0", True, [0])
        ),
        ({"messages": [{"content": "Q"}, ASSISTANT]}, "unknown_role"),
        ({"messages": [{"role": "critic", "content": "Q"}, ASSISTANT]}, "unknown_role"),
        ({"messages": [USER, {"role": "function_call", "content": "[]"}]}, "bad_message"),
        ({"messages": [USER, {"role": "function_call", "content": ""}]}, "bad_message"),
        ({"messages": [USER, ASSISTANT | {"function_call": "look"}]}, "bad_message"),
        ({"messages": [{"role": ["user"], "content": "Q"}, ASSISTANT]}, "unknown_role"),
        ({"conversations": [{"from": "oracle", "value": "Q"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not_text"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": ["f"]}]}, "bad_message"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 1}]}]}, "bad_message"),
        ({"messages": [USER, ASSISTANT], "system": ["be good"]}, "bad_message"),
        ({"instruction": "Q", "output": "A", "system": {"be": "good"}}, "bad_message"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "untrained"),
        (
            {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"content": ""}]},
            "untrained",
        ),
        ({"messages": [USER]}, "no_assistant_turn"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty_answer"),
        ({"messages": [USER, ASSISTANT], "tools": "look"}, "bad_tools"),
        ({"instruction": "Q", "output": None}, "empty_answer"),
        ({"instruction": ["Q"], "output": "A"}, "bad_message"),
        ({"instruction": "Q", "output": "A", "history": ["Q"]}, "bad_message"),
        ({"instruction": "Q", "output": "A", "history": 5}, "bad_message"),
        ({"messages": [USER | {"name": b"Q"}, ASSISTANT]}, "bad_message"),
        ({"prompt": "Q", "completion": ""}, "empty_answer"),
        ({"prompt": "Q", "completion": None}, "empty_answer"),
        ({"prompt": 3, "completion": "A"}, "bad_message"),
        ({"prompt": ["Q"], "completion": "A"}, "bad_message"),
        ({"prompt": "Q", "completion": ["A"]}, "bad_message"),
    ],
)
def test_read_conversation_says_why_a_row_cannot_be_used(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        read(row)
    assert caught.value.reason == reason
