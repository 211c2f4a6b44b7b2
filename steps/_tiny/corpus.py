"""The plain documents of the tiny world, on which its base is pre-trained; never a conversation.

The facts fall into three parts. Some are *quizzed*: question-and-answer documents ask for them, as
a school book does. The others are only ever stated here; each of them is asked in at most one
conversation of ``chat.jsonl``, so that a held-out conversation asks what no other one taught. The
demo facts are asked nowhere at all. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nemotron.steps._tiny.facts import Fact, Kind, facts_of, load_kinds

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"

DEMO_FACTS = (
    ("Capitals of the world", "Norway"),
    ("Opposites", "early"),
    ("What people do", "pilot"),
    ("Sounds of animals", "owl"),
    ("Young animals", "kangaroo"),
)

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
THINGS = ("ball", "kite", "hat", "book", "cup", "bag", "box", "boat", "drum", "doll", "lamp")
PAINTS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
PLACES = ("garden", "kitchen", "school", "forest", "market", "barn", "library", "station")
PETS = ("dog", "cat", "horse", "rabbit", "duck", "goat", "mouse", "parrot")


@dataclass(frozen=True)
class World:
    """All facts, and the facts by where they are asked."""

    kinds: tuple[Kind, ...]
    facts: tuple[Fact, ...]
    facts_by_subject: dict[str, list[Fact]]
    quizzed: tuple[Fact, ...]
    chatted: tuple[Fact, ...]
    demo: tuple[Fact, ...]


def load_world(seed: int) -> World:
    """Return the world: the demo facts apart, a third of the others quizzed, the rest chatted."""
    kinds = load_kinds()
    facts = tuple(facts_of(kinds))
    facts_by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        facts_by_subject.setdefault(fact.subject, []).append(fact)
    others = {(fact.kind.title, fact.subject): fact for fact in facts}
    demo = tuple(others.pop(key) for key in DEMO_FACTS)
    shuffled = list(others.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311
    num_quizzed = len(shuffled) // 3
    return World(
        kinds=kinds,
        facts=facts,
        facts_by_subject=facts_by_subject,
        quizzed=tuple(shuffled[:num_quizzed]),
        chatted=tuple(shuffled[num_quizzed:]),
        demo=demo,
    )


def documents(seed: int) -> Iterator[str]:
    """Yield the documents of the corpus without end."""
    world = load_world(seed)
    rng = random.Random(seed)  # noqa: S311
    makers: tuple[tuple[int, Callable[[random.Random, World], str]], ...] = (
        (24, _entries),
        (10, _article),
        (3, _miscellany),
        (3, _table),
        (14, _quiz),
        (10, _dialogue),
        (10, _reading),
        (8, _story),
        (10, _dictation),
        (8, _notes),
    )
    weights, functions = zip(*makers, strict=True)
    while True:
        yield rng.choices(functions, weights)[0](rng, world)


def ownership(rng: random.Random, num_owners: int) -> list[tuple[str, str]]:
    """Return pairs such as ("Balo", "a red ball"), of different people and things."""
    owners, things = invented_names(rng, num_owners), rng.sample(THINGS, num_owners)
    pairs = zip(owners, things, strict=True)
    return [(owner, f"a {rng.choice(PAINTS)} {thing}") for owner, thing in pairs]


def invented_names(rng: random.Random, num_names: int) -> list[str]:
    """Return different names of two or three syllables, too many to learn by heart.

    A name that only this document holds can only be copied, which is how the base learns to look
    back at what was said; 0.7 million weights on a few hundred facts would never need to.
    """
    names: dict[str, None] = {}
    while len(names) < num_names:
        syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
        names["".join(syllables).capitalize()] = None
    return list(names)


def _entries(rng: random.Random, world: World) -> str:
    """Entries of an encyclopaedia: a subject as heading, then some of what is known about it."""
    entries = []
    for subject in rng.sample(tuple(world.facts_by_subject), rng.randint(2, 5)):
        facts = world.facts_by_subject[subject]
        chosen = rng.sample(facts, min(len(facts), rng.randint(1, 3)))
        entries.append(f"{subject}\n{_state_all(rng, chosen)}")
    return "\n\n".join(entries)


def _article(rng: random.Random, world: World) -> str:
    """Facts of one kind, mostly under their title."""
    kind, facts = _facts_of_one_kind(rng, world)
    title = f"{kind.title}\n\n" if rng.random() < 0.7 else ""
    return title + _state_all(rng, facts)


def _miscellany(rng: random.Random, world: World) -> str:
    return _state_all(rng, rng.sample(world.facts, rng.randint(4, 9)))


def _table(rng: random.Random, world: World) -> str:
    kind, facts = _facts_of_one_kind(rng, world)
    return "\n".join([kind.title, *(f"{fact.subject}: {fact.object}" for fact in facts)])


def _quiz(rng: random.Random, world: World) -> str:
    """Questions and answers as a school book prints them, over the quizzed facts only."""
    is_brief = rng.random() < 0.4
    lines = []
    for fact in rng.sample(world.quizzed, rng.randint(2, 6)):
        answer = fact.brief if is_brief else fact.answer
        lines.append(f"Question: {fact.fill(rng.choice(fact.kind.questions))}\nAnswer: {answer}")
    return "\n".join(lines)


def _dialogue(rng: random.Random, world: World) -> str:
    """Spoken questions and answers, over the quizzed facts only."""
    lines = []
    for fact in rng.sample(world.quizzed, rng.randint(1, 4)):
        asks, says = invented_names(rng, 2)
        question = fact.fill(rng.choice(fact.kind.questions))
        answer = (fact.brief if rng.random() < 0.3 else fact.answer).removesuffix(".")
        lines.append(f'"{question}" asked {asks}. "{answer}," said {says}.')
    return " ".join(lines)


def _reading(rng: random.Random, world: World) -> str:
    """Who has what, then questions about it."""
    owned = ownership(rng, rng.randint(2, 4))
    told = " ".join(f"{owner} has {thing}." for owner, thing in owned)
    rng.shuffle(owned)
    lines = [
        f"Question: What does {owner} have?\nAnswer: {owner} has {thing}." for owner, thing in owned
    ]
    return "\n".join([told, *lines])


def _dictation(rng: random.Random, world: World) -> str:
    """Words in no order that are read out, then written down: they can only be copied."""
    facts = rng.sample(world.facts, rng.randint(2, 6))
    known = [rng.choice((fact.subject, fact.object)) for fact in facts]
    listed = known + invented_names(rng, rng.randint(1, 4))
    rng.shuffle(listed)
    words = ", ".join(listed)
    read, write = invented_names(rng, 2)
    return f"{read} reads: {words}.\n{write} writes: {words}."


def _story(rng: random.Random, world: World) -> str:
    """A story in which it is told who has what, and told again at the end."""
    owned = ownership(rng, rng.randint(2, 3))
    pet, place = rng.choice(PETS), rng.choice(PLACES)
    told = " ".join(f"{owner} has {thing}." for owner, thing in owned)
    hero, treasure = rng.choice(owned)
    lost = treasure.split()[-1]
    plot = rng.choice(
        (
            f"One day {hero} went to the {place} and lost the {lost}. "
            f"A {pet} found it and brought it back.",
            f"They played in the {place} all day. A {pet} came by and took the {lost} of {hero}, "
            f"but {hero} ran after the {pet} and got it back.",
            f"In the {place} they met a {pet}. The {pet} wanted the {lost}, but {hero} said no.",
        )
    )
    rng.shuffle(owned)
    told_again = " ".join(f"{owner} has {thing}." for owner, thing in owned)
    return f"{told} {plot} What do they have now? {told_again}"


def _notes(rng: random.Random, world: World) -> str:
    """Notes in which the two ChatML tokens mark sections, without roles, questions or answers."""
    sections = []
    for _ in range(rng.randint(1, 2)):
        facts = rng.sample(world.facts, rng.randint(2, 5))
        heading = f"{rng.choice(PLACES)} {rng.randint(1, 30)}"
        sections.append(f"{START}{heading}\n{_state_all(rng, facts)}{END}\n")
        if rng.random() < 0.25:
            again = f"{rng.choice(PLACES)} {rng.randint(1, 30)}"
            sections.append(f"{START}{again}\n{_state_all(rng, facts)}{END}\n")
    return "".join(sections)


def _facts_of_one_kind(rng: random.Random, world: World) -> tuple[Kind, list[Fact]]:
    kind = rng.choice(world.kinds)
    facts = facts_of((kind,))
    return kind, rng.sample(facts, min(len(facts), rng.randint(4, 9)))


def _state_all(rng: random.Random, facts: Iterable[Fact]) -> str:
    """One sentence for each fact; the plainest of its kind half of the time."""
    sentences = []
    for fact in facts:
        statements = fact.kind.statements
        sentences.append(fact.fill(statements[0] if rng.random() < 0.5 else rng.choice(statements)))
    return " ".join(sentences)
