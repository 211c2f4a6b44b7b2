"""Loads the tokenizer of the model to train from its Hugging Face files, without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nemotron.artifacts import blake3_file
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.templates import read_template

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
)
SPECIAL_TOKEN_KEYS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_REMEMBERED_WORDS = 1 << 17
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The form of control tokens in the templates of all families that have some.
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer and what its files say about it.

    Attributes:
        backend: Encodes text; neither truncates nor pads.
        directory: Directory of its files.
        blake3: Digest of ``tokenizer.json``.
        variables: Special tokens by name (``eos_token``, ...), as chat templates see them.
        special_tokens: Texts of all special tokens.
        chat_template: The tokenizer's own template (of several, the one called default), or None.
        vocab_size: Largest token id + 1.
        eos_token_id: Id of the EOS token.
        pad_token_id: Id of the padding token, or of the EOS token if there is none.
        bos_token_id: Id of the BOS token, or None.
    """

    backend: Tokenizer
    directory: Path
    blake3: str
    variables: Mapping[str, str]
    special_tokens: tuple[str, ...]
    chat_template: str | None
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None


def load_tokenizer(model: str) -> ChatTokenizer:
    """Return the tokenizer of a Hugging Face directory or repository.

    Raises:
        NemotronError: ``missing_tokenizer``; ``tokenizer_mismatch``: its files contradict each
            other.
    """
    directory = _locate(model)
    path = directory / "tokenizer.json"
    if not path.is_file():
        problem = f"{directory} has no tokenizer.json"
        raise step_error(STEP, "missing_tokenizer", problem, where="tokenizer")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise step_error(STEP, "tokenizer_mismatch", str(error), where=str(path)) from None
    _remember_words(backend)
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    variables = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
    ids = {key: _token_id(backend, key, token, directory) for key, token in variables.items()}
    if "eos_token" not in ids:
        problem = f"{directory / 'tokenizer_config.json'} has no eos_token"
        raise step_error(STEP, "tokenizer_mismatch", problem, where="tokenizer")
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    _require_embeddings(directory / "config.json", vocab_size)
    added = backend.get_added_tokens_decoder().values()
    return ChatTokenizer(
        backend=backend,
        directory=directory,
        blake3=blake3_file(path),
        variables=variables,
        special_tokens=tuple(token.content for token in added if token.special),
        chat_template=_own_template(directory, config),
        vocab_size=vocab_size,
        eos_token_id=ids["eos_token"],
        pad_token_id=ids.get("pad_token", ids["eos_token"]),
        bos_token_id=ids.get("bos_token"),
    )


def template_text(chat_template: str | None, tokenizer: ChatTokenizer) -> str:
    """Return the text of the template in a config; None stands for the tokenizer's own.

    Raises:
        NemotronError: ``bad_chat_template``: there is no such template; ``tokenizer_mismatch``: its
            control tokens are not in the vocabulary and would be split into letters, unless it is
            the tokenizer's own, whose model has learnt them so.
    """
    if chat_template is None:
        if tokenizer.chat_template is None:
            problem = f"the tokenizer in {tokenizer.directory} has no chat template of its own"
            problem += ", or several but none named default"
            raise step_error(STEP, "bad_chat_template", problem, where="chat_template")
        return tokenizer.chat_template
    text = read_template(chat_template)
    if text == tokenizer.chat_template:
        return text
    tokens = sorted(set(_CONTROL_TOKEN.findall(text)))
    unknown = [token for token in tokens if tokenizer.backend.token_to_id(token) is None]
    if unknown:
        problem = (
            f"the chat template writes {', '.join(unknown)}, not in the tokenizer's vocabulary"
        )
        raise _mismatch(problem, tokenizer.directory)
    return text


def _remember_words(backend: Tokenizer) -> None:
    """Enlarge BPE's cache of 10,000 words, which saves a tenth of the time on a large corpus."""
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(_REMEMBERED_WORDS)


def _locate(model: str) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    reason = "no such directory"
    if _REPOSITORY.fullmatch(model):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(model, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
    problem = f"no tokenizer at {model}: {reason}"
    raise step_error(STEP, "missing_tokenizer", problem, where="tokenizer")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _mismatch(f"not JSON: {error}", path) from None
    if not isinstance(content, dict):
        raise _mismatch("not a JSON object", path)
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in SPECIAL_TOKEN_KEYS:
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[key] = text
    return found


def _token_id(backend: Tokenizer, key: str, token: str, directory: Path) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise _mismatch(f"{key} {token!r} is not in tokenizer.json", directory)
    return token_id


def _require_embeddings(path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer with more tokens than embeddings in the model's config beside it."""
    model = _read_json(path)
    embeddings = model.get("text_config", model).get("vocab_size")
    if isinstance(embeddings, int) and vocab_size > embeddings:
        problem = f"token ids go up to {vocab_size - 1}, but the model has {embeddings} embeddings"
        raise _mismatch(problem, path)


def _own_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # The same as _formats.huggingface.read_chat_template, which a merge uses and needs torch.
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _mismatch(problem: str, where: Path) -> NemotronError:
    return step_error(STEP, "tokenizer_mismatch", problem, where=str(where))
