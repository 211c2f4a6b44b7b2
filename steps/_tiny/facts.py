"""The tiny world's facts: ``facts.toml``, read into kinds and facts, and made into sentences.

All texts of the tiny world (the pre-training corpus, the conversations, the demo prompts) are made
from these facts.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FACTS_FILE = Path(__file__).with_name("facts.toml")


@dataclass(frozen=True)
class Kind:
    """One relation between subjects and objects, such as countries and their capitals.

    Args:
        title: Heading of a list of such facts; names the kind.
        statements: Sentences that state a fact; the first is also the answer to every question.
        questions: Questions that the first statement answers.
        follow_up: A question about another subject, right after one of the same kind.
        brief: The short answer.
        table: Object by subject.
    """

    title: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str
    brief: str
    table: dict[str, str]


@dataclass(frozen=True)
class Fact:
    """One row of a kind's table."""

    kind: Kind
    subject: str
    object: str

    def fill(self, template: str) -> str:
        """Return a template of the kind as a sentence about this fact, with its first letter big.

        ``{s}`` and ``{o}`` are subject and object, ``{a}`` and ``{b}`` the same with "a" or "an".
        """
        text = template.format(
            s=self.subject,
            o=self.object,
            a=_with_article(self.subject),
            b=_with_article(self.object),
        )
        return text[0].upper() + text[1:]

    @property
    def answer(self) -> str:
        """The sentence that answers every question about this fact."""
        return self.fill(self.kind.statements[0])

    @property
    def brief(self) -> str:
        """The short answer to every question about this fact."""
        return self.fill(self.kind.brief)


def load_kinds() -> tuple[Kind, ...]:
    """Return the kinds of ``facts.toml`` in its order."""
    content = tomllib.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return tuple(
        Kind(
            title=entry["title"],
            statements=tuple(entry["statements"]),
            questions=tuple(entry["questions"]),
            follow_up=entry["follow_up"],
            brief=entry["brief"],
            table=_read_table(entry["facts"]),
        )
        for entry in content["kind"]
    )


def facts_of(kinds: tuple[Kind, ...]) -> list[Fact]:
    """Return every fact, kind by kind, in the order of the tables."""
    return [Fact(kind, subject, value) for kind in kinds for subject, value in kind.table.items()]


def _read_table(text: str) -> dict[str, str]:
    """Return object by subject from ``subject: object`` entries, separated by commas."""
    pairs = (entry.split(":") for entry in text.replace("\n", " ").split(","))
    return {subject.strip(): value.strip() for subject, value in pairs}


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
