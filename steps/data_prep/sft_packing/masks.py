"""Turns conversations into token ids and loss masks: renders them, cuts at spans, encodes batches.

The text is cut where the assistant's words begin and end, and the pieces are encoded separately, as
the model meets them at inference: the prompt first. So no token crosses the edge, as one would if
an answer that begins with a newline were encoded together with the header before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
import numpy as np
from tokenizers import Tokenizer

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.conversations import Conversation
from nemotron.steps.data_prep.sft_packing.engine import Engine
from nemotron.steps.data_prep.sft_packing.left_out import (
    require_calls,
    require_definitions,
    require_reasoning,
)
from nemotron.steps.data_prep.sft_packing.reasoning import (
    Reasoning,
    Variant,
    per_answer,
    per_turn,
    variants,
)
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import (
    ANSWER,
    PROBE,
    QUESTION,
    ChatTemplate,
    Rendered,
)
from nemotron.steps.data_prep.sft_packing.sanitizing import Sanitizer
from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer, template_text
from nemotron.steps.data_prep.sft_packing.turns import trained_turns

# A text has the same tokens whole and in these two pieces, unless the tokenizer adds something at
# the start of every text, as with SentencePiece's dummy prefix.
_WHOLE, _PIECES = "a\nb c", ("a\n", "b c")
_UNTRAINED = BadRowError("no_trainable_tokens", "the template marks nothing as the assistant's")


class Document(NamedTuple):
    """A tokenized conversation, or one turn of it.

    Attributes:
        tokens: Token ids, int32, a trained one as its complement (``~id``): ids and mask in one.
        first_trained: Index of the first label, at least 1.
    """

    tokens: np.ndarray
    first_trained: int

    @property
    def ids(self) -> np.ndarray:
        """Token ids, int32."""
        return np.where(self.tokens < 0, ~self.tokens, self.tokens)

    @property
    def mask(self) -> np.ndarray:
        """uint8, 1 where the token itself is trained (not yet shifted)."""
        return (self.tokens < 0).view(np.uint8)


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations with one tokenizer and one chat template.

    Attributes:
        tokenizer: The tokenizer.
        engine: Encodes text with it.
        template: The compiled template.
        add_bos: Put the BOS token first where it is not.
        add_eos: End with the EOS token where the template ends turns with no special token.
        reasoning: What becomes of reasoning.
        sanitizer: Keeps control strings in users' text plain text; None lets them act.
        stop_token_id: The token that ends a turn, or None.
        encodes_pieces: Whether this tokenizer can encode pieces separately.
    """

    tokenizer: ChatTokenizer
    engine: Engine
    template: ChatTemplate
    add_bos: bool
    add_eos: bool
    reasoning: Reasoning
    sanitizer: Sanitizer | None
    stop_token_id: int | None
    encodes_pieces: bool

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Document] | BadRowError]:
        """Return the documents of each conversation, or the reason why there is none."""
        rendered = [self._render(item) for item in conversations]
        texts = [text for item in rendered if not isinstance(item, BadRowError) for text in item]
        if self.encodes_pieces:
            tokens, ends = _encode_pieces(texts, engine=self.engine, sanitizer=self.sanitizer)
        else:
            tokens, ends = _encode_whole(texts, backend=self.tokenizer.backend)
        documents = self._documents(tokens, ends)
        return [
            item
            if isinstance(item, BadRowError)
            else _trainable([next(documents) for _ in item]) or _UNTRAINED
            for item in rendered
        ]

    def _render(self, conversation: Conversation) -> list[Rendered] | BadRowError:
        try:
            rendered = self._render_variants(conversation)
            require_definitions(self.template, conversation.messages, conversation.tools)
        except BadRowError as error:
            return error
        except RecursionError:
            return BadRowError("malformed_json", "nested too deeply")
        return rendered

    def _render_variants(self, conversation: Conversation) -> list[Rendered]:
        found = variants(conversation.messages, self.reasoning)
        return [text for variant in found for text in self._render_stable(variant, conversation)]

    def _render_stable(self, variant: Variant, conversation: Conversation) -> list[Rendered]:
        """Render a variant; split it if the template shows messages differently when they are last.

        Only with ``split_per_turn``. Even without reasoning a template may show the last turn
        differently, and within a turn the answer after calls of tools.
        """
        try:
            return [self._render_variant(variant, conversation)]
        except BadRowError as error:
            if error.reason != "template_not_prefix_stable":
                raise
            if self.reasoning != "split_per_turn" or variant.num_trained == 1:
                raise BadRowError(error.reason, f"{error.detail}; {self._advice()}") from None
        is_whole = variant.num_trained is None
        parts = per_turn(variant.messages) if is_whole else per_answer(variant)
        return [text for part in parts for text in self._render_stable(part, conversation)]

    def _advice(self) -> str:
        """Return what to do about a template that shows turns differently when they are last."""
        marked = "another chat_template can mark the assistant's words with {% generation %}"
        if "<think>" in self.template.text and self.template.stop == "<|im_end|>":
            marked = "chat_template=qwen3, the bundled one, marks the assistant's words itself"
        if self.reasoning == "split_per_turn":
            return marked
        return f"reasoning=split_per_turn trains every turn as at inference, {marked}"

    def _render_variant(self, variant: Variant, conversation: Conversation) -> Rendered:
        messages, tools = variant.messages, conversation.tools
        is_trained = trained_turns(variant)
        if self.sanitizer is not None:
            messages = self.sanitizer.hide(messages)
            tools = self.sanitizer.hide_tools(tools)
        rendered = self.template.render(messages, tools, is_trained=is_trained)
        if not self.encodes_pieces and Sanitizer.has_placeholder(rendered.text):
            detail = (
                "this tokenizer cannot encode a control string as text; sanitize=false allows it"
            )
            raise BadRowError("control_string", detail)
        require_calls(self.template, messages, tools, is_trained)
        if self.reasoning != "strip":
            require_reasoning(self.template, messages, tools, is_trained)
        return rendered

    def _documents(self, tokens: np.ndarray, ends: np.ndarray) -> Iterator[Document | None]:
        """Yield each document; None if it has no label.

        A document ends with its last trained token: attention is causal, so anything after it (a
        newline, a question without an answer) changes no loss and would only take up room.
        """
        starts = np.append(0, ends)[:-1]
        trained = np.append(np.flatnonzero(tokens < 0), len(tokens))
        first = np.searchsorted(trained, np.minimum(starts + 1, ends))
        behind_last = np.searchsorted(trained, ends)
        adds_ends = self.add_bos or (self.add_eos and self.stop_token_id is None)
        bounds = (starts, trained[behind_last - 1] + 1, trained[first] - starts, first, behind_last)
        for start, stop, label, label_number, behind in zip(
            *(array.tolist() for array in bounds), strict=True
        ):
            found = None if label_number == behind else Document(tokens[start:stop], label)
            yield self._with_ends(found) if found and adds_ends else found

    def _with_ends(self, document: Document) -> Document:
        """Add the BOS and EOS tokens that the config asks for and the template did not write."""
        tokens, label = document
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.add_bos and bos is not None and tokens[0] not in (bos, ~bos):
            tokens, label = np.insert(tokens, 0, bos), label + 1
        if self.add_eos and self.stop_token_id is None and tokens[-1] != ~eos:
            tokens = np.append(tokens, np.int32(~eos))
        return Document(tokens, label)


def _trainable(documents: Sequence[Document | None]) -> list[Document]:
    return [document for document in documents if document is not None]


def build_encoder(
    *,
    tokenizer: ChatTokenizer,
    chat_template: str | None,
    add_bos: bool,
    add_eos: bool,
    reasoning: Reasoning = "keep",
    sanitize: bool = True,
    engine: str = "tokenizers",
    today: str | None = None,
) -> Encoder:
    """Return an encoder after trying its template on one question and answer.

    Args:
        tokenizer: The tokenizer.
        chat_template: Bundled name, inline text or file; None for the tokenizer's own.
        add_bos: See ``Encoder``.
        add_eos: See ``Encoder``.
        reasoning: See ``Encoder``.
        sanitize: Whether control strings in what others than the assistant say stay text.
        engine: What encodes text: ``tokenizers`` or ``kitoken``.
        today: The date that ``strftime_now`` gives templates, ISO; None for the real one.

    Raises:
        NemotronError: ``bad_chat_template``: there is none, or it does not parse or render;
            ``bad_loss_masks``: what it marks is not the answer; ``tokenizer_mismatch``: it writes
            tokens that the tokenizer does not know, or ``add_bos`` without a BOS token.
    """
    text = template_text(chat_template, tokenizer)
    if add_bos and tokenizer.bos_token_id is None:
        problem = "tokenizer.add_bos is true, but the tokenizer has no bos_token"
        raise step_error(STEP, "tokenizer_mismatch", problem, where=str(tokenizer.directory))
    template = _compiled(text, tokenizer, today)
    stop = template.stop
    return Encoder(
        tokenizer=tokenizer,
        template=template,
        add_bos=add_bos,
        add_eos=add_eos,
        engine=Engine(tokenizer, engine),
        reasoning=reasoning,
        sanitizer=Sanitizer(tokenizer.special_tokens) if sanitize else None,
        stop_token_id=None if stop is None else tokenizer.backend.token_to_id(stop),
        encodes_pieces=_can_encode_pieces(tokenizer.backend),
    )


def _compiled(text: str, tokenizer: ChatTokenizer, today: str | None) -> ChatTemplate:
    """Return a template that parses, renders and marks the answer of one question and answer."""
    try:
        template = ChatTemplate(
            text,
            variables=tokenizer.variables,
            special_tokens=tokenizer.special_tokens,
            today=today,
        )
        _require_mask(template)
    except jinja2.TemplateSyntaxError as error:
        raise step_error(
            STEP, "bad_chat_template", str(error.message), where=f"line {error.lineno}"
        ) from None
    except BadRowError as error:
        problem = f"{error.reason} on a question and its answer: {error}"
        raise step_error(STEP, "bad_chat_template", problem) from None
    return template


def _require_mask(template: ChatTemplate) -> None:
    trained = template.render(PROBE).trained
    if ANSWER not in trained or QUESTION in trained:
        problem = (
            f"of the question {QUESTION!r} and the answer {ANSWER!r}, it would train {trained!r}"
        )
        raise step_error(STEP, "bad_loss_masks", problem, where="chat_template")


def _can_encode_pieces(backend: Tokenizer) -> bool:
    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return ids(_WHOLE) == [token for piece in _PIECES for token in ids(piece)]


def _encode_pieces(
    texts: Sequence[Rendered], *, engine: Engine, sanitizer: Sanitizer | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all texts, complemented where trained, and where each text ends.

    Trained spans are encoded separately from the text between them. The text after the last span is
    not encoded: no document reaches that far.
    """
    pieces: list[str] = []
    plain: set[int] = set()
    flags: list[int] = []  # -1 for a trained piece: x ^ -1 is ~x
    num_pieces: list[int] = []
    for text, spans in texts:
        position = 0
        is_touched = sanitizer is not None and sanitizer.has_placeholder(text)
        for start, end in spans:
            for piece, flag in ((text[position:start], 0), (text[start:end], -1)):
                if not piece:
                    continue
                if is_touched and sanitizer is not None:
                    for part, is_plain in sanitizer.cut(piece):
                        if is_plain:
                            plain.add(len(pieces))
                        pieces.append(part)
                        flags.append(flag)
                else:
                    pieces.append(piece)
                    flags.append(flag)
            position = end
        num_pieces.append(len(pieces))
    ids, lengths = engine.encode(pieces, plain=plain)
    ids ^= np.repeat(np.array(flags, dtype=np.int32), lengths)
    piece_ends = np.append(0, np.cumsum(lengths))
    return ids, piece_ends[np.array(num_pieces, dtype=np.int64)]


def _encode_whole(
    texts: Sequence[Rendered], *, backend: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same for texts that are encoded whole; a token inside a span is trained.

    For tokenizers that mark the start of every text. It is slower: it needs every token's offsets.
    """
    encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=False)
    found = [np.empty(0, dtype=np.int32)]
    for text, encoding in zip(texts, encodings, strict=True):
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        tokens = np.array(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(offsets), dtype=bool)
        for start, end in text.spans:
            trained |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
        found.append(np.where(trained, ~tokens, tokens))
    return np.concatenate(found), np.cumsum([len(tokens) for tokens in found[1:]], dtype=np.int64)
