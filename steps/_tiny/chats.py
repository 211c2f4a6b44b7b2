"""The conversations of ``chat.jsonl`` and the demo prompts, in OpenAI's ``messages`` form.

They ask about the same closed world as the corpus, in a format that the base has never seen, and
answer in one style: one plain sentence per fact, or the bare fact where the system message asks
for it. A fact is asked in one conversation at most.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron.steps._tiny.corpus import World, load_world, ownership
from nemotron.steps._tiny.facts import Fact

BRIEF = "Answer as briefly as you can."
HELPFUL = "You are a helpful assistant. Answer in one sentence."
NUM_PORTRAITS = 36
NUM_READINGS = 60

# What "tell me about" is answered with, in this order.
PORTRAIT_KINDS = (
    "Countries and continents",
    "Capitals of the world",
    "Kinds of animals",
    "Legs of animals",
    "Young animals",
    "Sounds of animals",
)


@dataclass(frozen=True)
class Turn:
    """A question with its full and, where there is one, its brief answer."""

    question: str
    answer: str
    brief: str | None


def conversations(seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return all conversations, shuffled."""
    rng = random.Random(seed)  # noqa: S311
    facts = list(load_world(seed).chatted)
    rng.shuffle(facts)
    portraits, facts = _portraits(facts)
    exchanges = [*portraits, *_questions(rng, facts)]
    exchanges += [[_reading(rng)] for _ in range(NUM_READINGS)]
    rng.shuffle(exchanges)
    return [{"messages": _messages(rng, turns)} for turns in exchanges]


def demo_prompts(world: World) -> list[dict[str, Any]]:
    """Return the demo prompts: ``messages`` to answer, and the ``answer`` that is right."""
    return [
        {
            "messages": [{"role": "user", "content": fact.fill(fact.kind.questions[0])}],
            "answer": fact.answer,
        }
        for fact in world.demo
    ]


def _portraits(facts: list[Fact]) -> tuple[list[list[Turn]], list[Fact]]:
    """Return "tell me about" turns over subjects with several facts, and the facts left over."""
    facts_by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.kind.title in PORTRAIT_KINDS:
            facts_by_subject.setdefault(fact.subject, []).append(fact)
    groups = [group[:3] for group in facts_by_subject.values() if len(group) > 1][:NUM_PORTRAITS]
    turns = []
    for group in groups:
        group.sort(key=lambda fact: PORTRAIT_KINDS.index(fact.kind.title))
        subject = group[0].subject
        name = subject if subject[0].isupper() else f"the {subject}"
        answer = " ".join(fact.answer for fact in group)
        turns.append([Turn(f"Tell me about {name}.", answer, None)])
    used = {(fact.kind.title, fact.subject) for group in groups for fact in group}
    return turns, [fact for fact in facts if (fact.kind.title, fact.subject) not in used]


def _questions(rng: random.Random, facts: list[Fact]) -> Iterator[list[Turn]]:
    """Yield conversations of one question, or of two or three of one kind."""
    facts_by_kind: dict[str, list[Fact]] = {}
    for fact in facts:
        facts_by_kind.setdefault(fact.kind.title, []).append(fact)
    for group in facts_by_kind.values():
        while group:
            num_turns = min(len(group), rng.choices((1, 2, 3), weights=(8, 2, 1))[0])
            turns: list[Turn] = []
            for fact in (group.pop() for _ in range(num_turns)):
                asked = fact.kind.follow_up if turns else rng.choice(fact.kind.questions)
                turns.append(Turn(fact.fill(asked), fact.answer, fact.brief))
            yield turns


def _reading(rng: random.Random) -> Turn:
    """A question whose answer stands in the message itself."""
    owned = ownership(rng, 2)
    owner, thing = rng.choice(owned)
    told = " ".join(f"{name} has {what}." for name, what in owned)
    return Turn(
        f"{told} What does {owner} have?", f"{owner} has {thing}.", f"{thing}.".capitalize()
    )


def _messages(rng: random.Random, turns: list[Turn]) -> list[dict[str, str]]:
    """Return the turns as messages; some with a system message, some with thanks at the end."""
    style = rng.choices((None, BRIEF, HELPFUL), weights=(65, 20, 15))[0]
    if style == BRIEF and any(turn.brief is None for turn in turns):
        style = None
    messages = [{"role": "system", "content": style}] if style else []
    for turn in turns:
        answer = turn.brief if style == BRIEF and turn.brief else turn.answer
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": answer})
    if rng.random() < 0.08:
        messages.append({"role": "user", "content": "Thank you!"})
        messages.append({"role": "assistant", "content": "You are welcome!"})
    return messages
