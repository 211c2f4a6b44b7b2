"""Conversations to token ids and the mask of what is trained: render, cut at spans, batch-encode.

The text is cut where the assistant begins and ends, and the pieces are encoded apart. That is how
the model meets them at inference, prompt first, so no token straddles the edge, as one does when an
answer that begins with a newline is encoded in one go with the header before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import jinja2
import numpy as np
from tokenizers import Tokenizer

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.conversations import Conversation
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import (
    ANSWER,
    PROBE,
    QUESTION,
    ChatTemplate,
    Rendered,
)
from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer, template_text

# Encoding one text, or one text in two pieces, gives the same tokens unless the tokenizer adds
# something at the start of every text, as those with SentencePiece's dummy prefix do.
_WHOLE, _PIECES = "a\nb c", ("a\n", "b c")


# Not cut; cut at the end of a turn; cut within one.
TRUNCATIONS = ("", "truncate_turn", "truncate")


class Document(NamedTuple):
    """A tokenized conversation.

    Attributes:
        ids: Token ids, int32.
        mask: uint8, 1 where the token itself is trained (not yet shifted).
        truncated: How it was cut; one of ``TRUNCATIONS``.
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: str = ""


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations with one tokenizer and one chat template.

    Attributes:
        tokenizer: The tokenizer.
        template: The compiled template.
        add_bos: Put the BOS token first where it is not.
        add_eos: End with the EOS token where the template ends turns with no special token.
        max_tokens: Longest document, stored tokens; longer ones end with an earlier turn.
        stop_token_id: The token that ends a turn, or None.
        encodes_pieces: Whether pieces may be encoded apart with this tokenizer.
    """

    tokenizer: ChatTokenizer
    template: ChatTemplate
    add_bos: bool
    add_eos: bool
    max_tokens: int
    stop_token_id: int | None
    encodes_pieces: bool

    def encode(self, conversations: Sequence[Conversation]) -> list[Document | BadRowError]:
        """Return one document, or why there is none, for each conversation."""
        rendered: list[Rendered | BadRowError] = [self._render(item) for item in conversations]
        texts = [item for item in rendered if not isinstance(item, BadRowError)]
        encode = _encode_pieces if self.encodes_pieces else _encode_whole
        encoded = encode(texts, backend=self.tokenizer.backend)
        return [
            item if isinstance(item, BadRowError) else self._finish(*next(encoded))
            for item in rendered
        ]

    def _render(self, conversation: Conversation) -> Rendered | BadRowError:
        try:
            return self.template.render(conversation.messages, conversation.tools)
        except BadRowError as error:
            return error

    def _finish(self, ids: np.ndarray, mask: np.ndarray) -> Document | BadRowError:
        """End the document with its last trained token: attention is causal, so what comes after
        (a newline, a question without an answer) changes no loss and would only take room.
        """
        trained = np.flatnonzero(mask)
        if len(trained) == 0 or trained[-1] == 0:
            return BadRowError(
                "no_trainable_tokens", "the template marks nothing as the assistant's"
            )
        ids, mask = ids[: trained[-1] + 1], mask[: trained[-1] + 1]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.add_bos and bos is not None and ids[0] != bos:
            ids, mask = np.insert(ids, 0, bos), np.insert(mask, 0, 0)
        if self.add_eos and self.stop_token_id is None and ids[-1] != eos:
            ids, mask = np.append(ids, np.int32(eos)), np.append(mask, np.uint8(1))
        document = truncate(ids, mask, max_tokens=self.max_tokens, stop_token_id=self.stop_token_id)
        if document is None:
            detail = f"{len(ids)} tokens, of which the first {self.max_tokens} hold no answer"
            return BadRowError("over_long", detail)
        return document


def build_encoder(
    *,
    tokenizer: ChatTokenizer,
    chat_template: str | None,
    add_bos: bool,
    add_eos: bool,
    max_tokens: int,
) -> Encoder:
    """Return an encoder after trying its template on one question and answer.

    Args:
        tokenizer: The tokenizer.
        chat_template: Bundled name, inline text or file; None for the tokenizer's own.
        add_bos: See ``Encoder``.
        add_eos: See ``Encoder``.
        max_tokens: See ``Encoder``.

    Raises:
        NemotronError: ``bad_chat_template``: there is none, or it does not parse or render;
            ``bad_loss_masks``: what it marks is not the answer; ``tokenizer_mismatch``: it writes
            tokens that the tokenizer does not know, or ``add_bos`` without a BOS token.
    """
    text = template_text(chat_template, tokenizer)
    if add_bos and tokenizer.bos_token_id is None:
        problem = "tokenizer.add_bos is true, but the tokenizer has no bos_token"
        raise step_error(STEP, "tokenizer_mismatch", problem, where=str(tokenizer.directory))
    try:
        compiled = ChatTemplate(
            text, variables=tokenizer.variables, special_tokens=tokenizer.special_tokens
        )
        _require_mask(compiled)
    except jinja2.TemplateSyntaxError as error:
        raise step_error(
            STEP, "bad_chat_template", str(error.message), where=f"line {error.lineno}"
        ) from None
    except BadRowError as error:
        problem = f"{error.reason} on a question and its answer: {error}"
        raise step_error(STEP, "bad_chat_template", problem) from None
    stop = compiled.stop
    return Encoder(
        tokenizer=tokenizer,
        template=compiled,
        add_bos=add_bos,
        add_eos=add_eos,
        max_tokens=max_tokens,
        stop_token_id=None if stop is None else tokenizer.backend.token_to_id(stop),
        encodes_pieces=_can_encode_pieces(tokenizer.backend),
    )


def truncate(
    ids: np.ndarray, mask: np.ndarray, *, max_tokens: int, stop_token_id: int | None
) -> Document | None:
    """Return a document of at most ``max_tokens``, or None if nothing trained is left of it.

    It ends with the last assistant's turn that fits whole; where not even the first one does, it
    ends in the middle of that turn, without an end-of-turn token that the model did not say there.
    """
    if len(ids) <= max_tokens:
        return Document(ids, mask)
    is_end = (mask == 1) & (np.append(mask[1:], 0) == 0)
    if stop_token_id is not None:
        is_end &= ids == stop_token_id
    ends = np.flatnonzero(is_end[:max_tokens])
    last = ends if len(ends) else np.flatnonzero(mask[:max_tokens])
    if len(last) == 0 or last[-1] == 0:
        return None
    length = int(last[-1]) + 1
    return Document(ids[:length], mask[:length], "truncate_turn" if len(ends) else "truncate")


def _require_mask(template: ChatTemplate) -> None:
    trained = template.render(PROBE).trained
    if ANSWER not in trained or QUESTION in trained:
        problem = (
            f"of the question {QUESTION!r} and the answer {ANSWER!r} it would train {trained!r}"
        )
        raise step_error(STEP, "bad_loss_masks", problem, where="chat_template")


def _can_encode_pieces(backend: Tokenizer) -> bool:
    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return ids(_WHOLE) == [token for piece in _PIECES for token in ids(piece)]


def _encode_pieces(
    texts: Sequence[Rendered], *, backend: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and mask of each text, its trained spans encoded apart from the rest."""
    pieces: list[str] = []
    is_trained: list[int] = []
    num_pieces: list[int] = []
    for text, spans in texts:
        before, position = len(pieces), 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, flag in ((text[position:start], 0), (text[start:end], 1)):
                if piece:
                    pieces.append(piece)
                    is_trained.append(flag)
            position = end
        num_pieces.append(len(pieces) - before)
    encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
    lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
    all_ids = (encoding.ids for encoding in encodings)
    ids = np.fromiter(chain.from_iterable(all_ids), dtype=np.int32, count=int(lengths.sum()))
    mask = np.repeat(np.array(is_trained, dtype=np.uint8), lengths)
    ends = np.append(0, np.cumsum(lengths))[np.append(0, np.cumsum(num_pieces, dtype=np.int64))]
    for start, end in pairwise(ends.tolist()):
        yield ids[start:end], mask[start:end]


def _encode_whole(
    texts: Sequence[Rendered], *, backend: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and mask of each text encoded in one go; a token is trained if a span holds it all.

    For tokenizers that mark the start of every text. Slower: it needs the offsets of every token.
    """
    encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), dtype=np.uint8)
        for start, end in text.spans:
            mask[(offsets[:, 0] >= start) & (offsets[:, 1] <= end)] = 1
        yield np.array(encoding.ids, dtype=np.int32), mask
