"""The texts of the tiny world: deterministic, of the right kinds, and those that are committed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from nemotron.steps import _tiny
from nemotron.steps._tiny import chats, corpus
from nemotron.steps._tiny.build import SEED
from nemotron.steps._tiny.facts import Fact, facts_of, load_kinds

ROOT = Path(_tiny.__file__).parent
CHATS = [json.loads(line) for line in (ROOT / "chat.jsonl").read_text("utf-8").splitlines()]


def _user_texts(conversation: dict[str, list[dict[str, str]]]) -> list[str]:
    return [each["content"] for each in conversation["messages"] if each["role"] == "user"]


def _questions(fact: Fact) -> set[str]:
    return {fact.fill(text) for text in (*fact.kind.questions, fact.kind.follow_up)}


def test_chat_file_is_what_the_generator_makes() -> None:
    assert chats.conversations(SEED) == CHATS


def test_prompts_file_is_what_the_generator_makes() -> None:
    prompts = json.loads((ROOT / "prompts.json").read_text("utf-8"))
    assert chats.demo_prompts(corpus.load_world(SEED)) == prompts


def test_documents_follow_from_the_seed() -> None:
    first, again, other = (list(itertools.islice(corpus.documents(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_chat_file_holds_300_to_500_different_conversations() -> None:
    assert 300 <= len(CHATS) <= 500
    assert len({json.dumps(each) for each in CHATS}) == len(CHATS)


def test_conversations_alternate_user_and_assistant_after_an_optional_system_message() -> None:
    for conversation in CHATS:
        assert conversation.keys() == {"messages"}
        roles = [message["role"] for message in conversation["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message.keys() == {"role", "content"} for message in conversation["messages"])
        assert all(message["content"].strip() for message in conversation["messages"])


def test_chat_file_has_single_and_multi_turn_and_system_messages() -> None:
    num_turns = [len(_user_texts(each)) for each in CHATS]
    systems = {
        each["messages"][0]["content"] for each in CHATS if each["messages"][0]["role"] == "system"
    }
    assert min(num_turns) == 1
    assert max(num_turns) >= 3
    assert systems == {chats.BRIEF, chats.HELPFUL}


def test_no_question_is_asked_twice_across_conversations() -> None:
    """What a held-out conversation asks is then in no training conversation, in no wording."""
    asked = [text for each in CHATS for text in _user_texts(each) if text != "Thank you!"]
    assert len(asked) == len(set(asked))


def test_demo_and_quizzed_facts_are_in_no_conversation() -> None:
    world = corpus.load_world(SEED)
    asked = {text for each in CHATS for text in _user_texts(each)}
    for fact in (*world.demo, *world.quizzed):
        assert asked.isdisjoint(_questions(fact))


def test_chatted_and_demo_facts_are_asked_in_no_document() -> None:
    world = corpus.load_world(SEED)
    text = "\n".join(itertools.islice(corpus.documents(SEED), 2000))
    assert any(question in text for question in _questions(world.quizzed[0]))
    for fact in (*world.demo, *world.chatted):
        assert not any(question in text for question in _questions(fact))


def test_documents_state_every_fact() -> None:
    text = "\n".join(itertools.islice(corpus.documents(SEED), 20_000))
    assert [fact for fact in facts_of(load_kinds()) if fact.answer not in text] == []


def test_documents_never_hold_chat_roles() -> None:
    for document in itertools.islice(corpus.documents(SEED), 3000):
        for role in ("system", "user", "assistant"):
            assert f"{corpus.START}{role}" not in document


@pytest.mark.parametrize("fact", facts_of(load_kinds())[::7], ids=lambda fact: fact.subject)
def test_sentences_fill_every_blank_and_begin_with_a_capital_letter(fact: Fact) -> None:
    for template in (*fact.kind.statements, *fact.kind.questions, fact.kind.brief):
        sentence = fact.fill(template)
        assert "{" not in sentence
        assert sentence[0] == sentence[0].upper()
        assert sentence[-1] in ".?"
