"""Renders chat templates in a sandbox, and finds what the assistant says in the text.

Templates are rendered as ``transformers`` renders them (same globals, filters and whitespace, and
its ``{% generation %}`` tag), but without importing it: that takes seconds, and a job does not have
it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron.steps.data_prep.sft_packing.reasoning import Messages
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.turns import Span, chosen_spans

QUESTION, ANSWER = "What is asked?", "This is answered."
PROBE: Messages = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]
# What a template can raise when it gets data that it was not written for.
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The whole text.
        spans: Ascending (start, end) character ranges of ``text`` that are trained.
    """

    text: str
    spans: list[Span]

    @property
    def trained(self) -> str:
        """The trained text, spans joined."""
        return "".join(self.text[start:end] for start, end in self.spans)


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: Jinja source.
        variables: Further variables of the template, such as ``eos_token``.
        special_tokens: Texts of the tokenizer's special tokens; one of them ends a turn.
        today: The date that ``strftime_now`` returns, ISO; None for the real one. A run must not
            render differently after midnight.

    Raises:
        jinja2.TemplateSyntaxError: The source does not parse.
        BadRowError: It cannot render ``PROBE``; see ``render``.

    Attributes:
        text: The source.
        stop: The special token that ends an assistant's turn, or None. It is the one that follows
            the answer of ``PROBE``: nothing else can follow a last turn.
    """

    def __init__(
        self,
        text: str,
        *,
        variables: Mapping[str, str],
        special_tokens: Sequence[str],
        today: str | None = None,
    ) -> None:
        self.text = text
        environment, self._tracker = _environment(today)
        self._template = environment.from_string(text)
        # Merged once, because jinja2 would copy its globals for every conversation.
        self._variables = {**self._template.globals, **variables}
        self._has_markers = _has_generation_tag(environment.parse(text))
        self.stop: str | None = None
        self.stop = self._find_stop(special_tokens)

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        *,
        is_trained: Sequence[bool] | None = None,
    ) -> Rendered:
        """Return the text of a conversation and the spans that the assistant says.

        ``is_trained`` says for which messages, see ``turns.trained_turns``; None for all.

        If the template has ``{% generation %}``, one render gives the spans: what the tag encloses.
        Otherwise a span is what a turn adds to the conversation before it plus the generation
        prompt. That takes two renders per trained turn, and each must be a prefix of the whole
        text: otherwise the spans would be guesses.

        The token that ends a turn is always in its span, because a model that was never trained on
        it does not stop; some templates leave it outside of ``{% generation %}``. A span that
        consists of that token alone is left out.

        Raises:
            BadRowError: ``template_error``, ``template_not_prefix_stable``, ``generation_moved``,
                ``spans_not_per_turn``, ``invalid_unicode``.
        """
        if is_trained is None:
            is_trained = [message["role"] == "assistant" for message in messages]
        try:
            rendered = self._render(messages, tools, is_trained)
        except RENDER_ERRORS as error:
            raise BadRowError("template_error", f"{type(error).__name__}: {error}"[:200]) from None
        if not rendered.text.isascii():
            _require_unicode(rendered.text)
        return rendered

    def _render(
        self, messages: Messages, tools: Sequence[Any] | None, is_trained: Sequence[bool]
    ) -> Rendered:
        if self._has_markers:
            text, marked = self._render_marked(messages, tools)
            spans = chosen_spans(marked, messages, is_trained)
        else:
            text, spans = self._render_prefixes(messages, tools, is_trained)
        bare = ("", self.stop or "")
        whole = (self._with_stop(text, span) for span in spans)
        return Rendered(text, [(s, e) for s, e in whole if text[s:e].strip() not in bare])

    def _render_marked(
        self, messages: Messages, tools: Sequence[Any] | None
    ) -> tuple[str, list[Span]]:
        tracker = self._tracker
        tracker.start()
        text = self._text(messages, tools)
        for start, said in tracker.marked:
            # Inside a macro or a set block the tag cannot know where its text will be inserted.
            if not text.startswith(said, start):
                raise BadRowError("generation_moved", "{% generation %} is inside a macro or block")
        return text, [(start, start + len(said)) for start, said in tracker.marked if said]

    def _render_prefixes(
        self, messages: Messages, tools: Sequence[Any] | None, is_trained: Sequence[bool]
    ) -> tuple[str, list[Span]]:
        text = self._text(messages, tools)
        spans: list[Span] = []
        for index in itertools.compress(range(len(messages)), is_trained):
            prompt = self._text(messages[:index], tools, add_generation_prompt=True)
            turn = self._text(messages[: index + 1], tools)
            if not (text.startswith(prompt) and text.startswith(turn) and turn.startswith(prompt)):
                raise BadRowError(
                    "template_not_prefix_stable",
                    f"message {index} renders differently when the conversation ends there",
                )
            spans.append((len(prompt), len(turn)))
        return text, spans

    def _text(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        context = self._template.new_context(variables, shared=True)
        pieces: list[str] = []
        for piece in self._template.root_render_func(context):
            pieces.append(piece)
            self._tracker.position += len(piece)
        return "".join(pieces)

    def _with_stop(self, text: str, span: Span) -> Span:
        """Extend a span over the stop token after it, or cut the blanks after the one in it.

        Blanks that a template has inside ``{% generation %}`` stay: its author wants them.
        """
        start, end = span
        if self.stop is None or text.endswith(self.stop, start, end):
            return span
        said = text[start:end].rstrip()
        if said.endswith(self.stop):
            return (start, end) if self._has_markers else (start, start + len(said))
        after = re.compile(r"\s*" + re.escape(self.stop)).match(text, end)
        return (start, after.end()) if after else span

    def _find_stop(self, special_tokens: Sequence[str]) -> str | None:
        text, spans = self.render(PROBE)
        answer = text.find(ANSWER, spans[0][0]) if spans else -1
        if answer < 0 or not special_tokens:
            return None
        longest_first = sorted(special_tokens, key=len, reverse=True)
        pattern = r"\s*(" + "|".join(map(re.escape, longest_first)) + ")"
        after = re.compile(pattern).match(text, answer + len(ANSWER))
        return after.group(1) if after else None


class _Tracker:
    """Tracks the position in the output, and the texts that ``{% generation %}`` has enclosed."""

    def __init__(self) -> None:
        self.position = 0
        self.marked: list[tuple[int, str]] = []

    def start(self) -> None:
        self.position = 0
        self.marked = []

    def mark(self, said: str) -> None:
        self.marked.append((self.position, said))


class _Generation(Extension):
    """The tag ``{% generation %} ... {% endgeneration %}``: its body, noted by the tracker."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        said = caller()
        self.environment.tracker.mark(said)  # pyright: ignore[reportAttributeAccessIssue]
        return said


def _environment(today: str | None) -> tuple[ImmutableSandboxedEnvironment, _Tracker]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    tracker = _Tracker()
    environment.extend(tracker=tracker)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    now = datetime.fromisoformat(today) if today else datetime.now()
    environment.globals["strftime_now"] = now.strftime
    return environment, tracker


def _has_generation_tag(tree: nodes.Template) -> bool:
    calls = (block.call.node for block in tree.find_all(nodes.CallBlock))
    return any(isinstance(node, nodes.ExtensionAttribute) for node in calls)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump JSON as transformers does: jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _require_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can contain but no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("invalid_unicode", f"lone surrogate at character {error.start}") from None
