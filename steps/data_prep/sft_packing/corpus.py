"""The first stage: it tokenizes data sets into spools, and accounts for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemotron.artifacts import blake3_file, sha256_json
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP, Dataset
from nemotron.steps.data_prep.sft_packing.inputs import (
    Part,
    cut_into_parts,
    list_files,
    part_bytes,
    unreadable,
)
from nemotron.steps.data_prep.sft_packing.long_documents import LongDocuments, survives
from nemotron.steps.data_prep.sft_packing.receipts import Receipt, code_digest
from nemotron.steps.data_prep.sft_packing.rejects import BY_CONFIG, BY_TEMPLATE, SAMPLES_PER_REASON
from nemotron.steps.data_prep.sft_packing.selection import Conversations
from nemotron.steps.data_prep.sft_packing.spool import SpoolIndex, map_index
from nemotron.steps.data_prep.sft_packing.tokenizing import (
    EncoderSettings,
    RowSettings,
    TokenizeTask,
)


@dataclass(frozen=True)
class InputFile:
    """A file of a data set, its size and digest when the run began."""

    path: Path
    size_bytes: int
    blake3: str


@dataclass
class Source:
    """One data set and what became of its rows; ``rows_read`` are those kept plus those dropped.

    Attributes:
        dataset: The entry of the blend.
        files: Its files.
        tasks: The tasks that read the files, in their order.
        rows_read: Rows read.
        rendered: Conversations among them that were rendered; ``max_rows`` may leave out some.
        refused: Rendered conversations that turned out to be unusable.
        dropped: Rows that are not used, by reason.
        samples: Some of the dropped rows, with file and line.
    """

    dataset: Dataset
    files: tuple[InputFile, ...]
    tasks: tuple[TokenizeTask, ...]
    rows_read: int = 0
    rendered: int = 0
    refused: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Rows that were unusable, not counting those that the config leaves out."""
        return sum(self.bad_reasons.values())

    @property
    def bad_reasons(self) -> Counter[str]:
        """Why rows were unusable."""
        bad = ((reason, count) for reason, count in self.dropped.items() if reason not in BY_CONFIG)
        return Counter(dict(bad))

    @property
    def num_wanted(self) -> int:
        """Rows that were looked at: all but those that ``used_in_filter`` leaves out."""
        return self.rows_read - self.dropped["used_in"]

    @property
    def expected_bad(self) -> float:
        """Rows that would be unusable, estimated as if ``max_rows`` had left none out."""
        num_unread = self.num_bad - self.refused
        return num_unread + self.refused * (self.num_wanted - num_unread) / max(self.rendered, 1)


def plan_sources(
    datasets: Sequence[Dataset],
    *,
    directory: Path,
    encoder: EncoderSettings,
    used_in_field: str,
    used_in_filter: str | None,
) -> list[Source]:
    """Return the data sets with the tasks that tokenize them; those of weight 0 are left out.

    A task's key is a digest of its file's content and of everything that turns it into tokens, but
    of nothing about packing: with another ``pack_size`` the same tasks are found done.

    Args:
        datasets: The data sets.
        directory: Where the tasks leave spools and receipts.
        encoder: What encodes.
        used_in_field: See ``RowSettings``.
        used_in_filter: See ``RowSettings``.

    Raises:
        NemotronError: ``missing_training_data``, ``unreadable_input``.
    """
    wanted = [item for item in datasets if item.weight > 0]
    files = [list_files(item) for item in wanted]
    size_bytes = part_bytes([file for group in files for file in group])
    with ThreadPoolExecutor() as pool:
        described = [tuple(pool.map(_describe, group)) for group in files]
    sources: list[Source] = []
    for dataset, group in zip(wanted, described, strict=True):
        rows = RowSettings(
            messages_field=dataset.messages_field,
            tools_field=dataset.tools_field,
            used_in_field=used_in_field,
            used_in_filter=used_in_filter,
            max_rows=dataset.max_rows,
        )
        tasks = _tasks(group, rows, encoder, directory=directory, size_bytes=size_bytes)
        sources.append(Source(dataset, group, tasks))
    return sources


def _tasks(
    files: Sequence[InputFile],
    rows: RowSettings,
    encoder: EncoderSettings,
    *,
    directory: Path,
    size_bytes: int,
) -> tuple[TokenizeTask, ...]:
    """Return the tasks that tokenize these files, in parts of about ``size_bytes``."""
    how = {
        "code": code_digest(),
        # Not the path of the tokenizer: its digest says which one it is.
        "encoder": {**vars(encoder), "tokenizer": ""},
    }
    return tuple(
        TokenizeTask(
            key=_task_key(part, file, rows, how),
            directory=directory,
            part=part,
            size_bytes=_work_bytes(part, size_bytes),
            rows=rows,
            encoder=encoder,
        )
        for file in files
        for part in cut_into_parts(file.path, size_bytes=size_bytes)
    )


def _describe(file: Path) -> InputFile:
    try:
        return InputFile(file, file.stat().st_size, blake3_file(file))
    except OSError as error:
        raise unreadable(file, error) from None


def _task_key(part: Part, file: InputFile, rows: RowSettings, how: Mapping[str, Any]) -> str:
    """Return the digest of what the tokens of a part depend on."""
    what = [part.kind, part.start, part.stop, file.blake3, vars(rows), how]
    return sha256_json(what)[:32]


def _work_bytes(part: Part, size_bytes: int) -> int:
    """Return about how many bytes a part has; row groups are cut to ``size_bytes`` each."""
    if part.kind == "parquet":
        return size_bytes
    return (part.stop or part.path.stat().st_size) - part.start


def account(source: Source, receipts: Sequence[Receipt], *, max_bad_fraction: float) -> None:
    """Add up what a data set's tasks say about its rows.

    Raises:
        NemotronError: ``bad_rows``, ``rows_not_rendered`` or ``bad_loss_masks``: more than
            ``max_bad_fraction`` of the wanted rows are unusable; ``unreadable_input``: a file has
            changed meanwhile.
    """
    seen: Counter[str] = Counter()
    for task, receipt in zip(source.tasks, receipts, strict=True):
        path = str(task.part.path)
        source.rows_read += receipt["rows_read"]
        source.rendered += receipt["rendered"]
        source.refused += receipt["refused"]
        source.dropped.update(receipt["dropped"])
        for sample in receipt["samples"]:
            seen[sample["reason"]] += 1
            if seen[sample["reason"]] <= SAMPLES_PER_REASON:
                source.samples.append(
                    {
                        "file": path,
                        **_place(receipt["place"], seen[path] + sample["position"]),
                        "reason": sample["reason"],
                        "detail": sample["detail"],
                    }
                )
        seen[path] += receipt["positions"]
    for file in source.files:
        if file.path.stat().st_size != file.size_bytes:
            raise step_error(
                STEP, "unreadable_input", "it changed while it was read", where=str(file.path)
            )
    if source.expected_bad > max_bad_fraction * source.num_wanted:
        raise _too_many_bad(source, max_bad_fraction)


# Almost every row without a trained token is the template's doing, not the data's.
_TEMPLATES_DOING = {
    "bad_loss_masks": ("no_trainable_tokens",),
    "rows_not_rendered": BY_TEMPLATE,
}


def _place(place: str, position: int) -> dict[str, int]:
    """Lines are counted from 1, items and rows from 0."""
    return {place: position + 1 if place == "line" else position}


def _too_many_bad(source: Source, max_bad_fraction: float) -> NemotronError:
    counts = f"{source.num_bad} of {source.num_wanted} rows"
    if source.dropped["max_rows"]:
        num_unread = source.num_bad - source.refused
        counts = f"{num_unread} of {source.num_wanted} rows as read and {source.refused} of "
        counts += f"{source.rendered} as rendered"
    bad = source.bad_reasons
    reasons = ", ".join(f"{count} {why}" for why, count in bad.most_common(3))
    name, explained = "bad_rows", tuple(bad)
    for other, by in _TEMPLATES_DOING.items():
        if 2 * sum(bad[reason] for reason in by) > source.num_bad:
            name, explained = other, by
    example = next(item for item in source.samples if item["reason"] in explained)
    place = next(example[key] for key in ("line", "item", "row") if key in example)
    problem = (
        f"{counts} ({source.expected_bad / source.num_wanted:.1%}) of the data set "
        f"{source.dataset.name} cannot be used; max_bad_fraction is {max_bad_fraction:g}: "
        f"{reasons}; the first: {example['detail']}"
    )
    return step_error(STEP, name, problem, where=f"{example['file']}:{place}")


@dataclass(frozen=True)
class Corpus:
    """What the first stage left.

    Attributes:
        spools: Names of all spools, in the order of the blend.
        conversations: All conversations in them.
    """

    spools: tuple[str, ...]
    conversations: Conversations


def load_corpus(
    sources: Sequence[Source],
    receipts: Callable[[Source], Sequence[Receipt]],
    *,
    directory: Path,
    policy: LongDocuments,
    max_tokens: int,
) -> Corpus:
    """Return all conversations of the spools; tokens stay on disk.

    Args:
        sources: The data sets.
        receipts: The receipts of a data set's tasks.
        directory: Where the spools are.
        policy: What becomes of documents longer than ``max_tokens``.
        max_tokens: Most stored tokens of a document.

    Raises:
        NemotronError: ``seq_length_mismatch``: the policy is ``error`` and a document is too long.
    """
    names: list[str] = []
    columns: list[tuple[np.ndarray, ...]] = []
    for number, source in enumerate(sources):
        first_rows: Counter[Path] = Counter()
        for task, receipt in zip(source.tasks, receipts(source), strict=True):
            for name in receipt["spools"]:
                index = map_index(directory, name)
                if policy == "error":
                    _require_short(index, max_tokens, task.part, first_rows[task.part.path])
                columns.append(_columns(index, number, len(names), policy, max_tokens))
                names.append(name)
            first_rows[task.part.path] += receipt["positions"]
    if not columns:
        columns = [tuple(np.empty(0, kind) for kind in _KINDS)]
    return Corpus(tuple(names), Conversations(*map(np.concatenate, zip(*columns, strict=True))))


_KINDS = (np.uint64, np.int32, np.int32, np.uint32, np.uint32, np.int64, np.bool_)


def _columns(
    index: SpoolIndex, dataset: int, spool: int, policy: LongDocuments, max_tokens: int
) -> tuple[np.ndarray, ...]:
    conversations, documents = index
    lengths = documents["length"].astype(np.int64)
    first_trained = documents["first_trained"]
    alive = survives(lengths, first_trained, policy=policy, max_tokens=max_tokens)
    most = lengths if policy == "split" else np.minimum(lengths, max_tokens)
    firsts = conversations["first_document"]
    # Copies: what refers to a map keeps its file open, and there may be thousands.
    return (
        conversations["uid"].copy(),
        np.full(len(firsts), dataset, dtype=np.int32),
        np.full(len(firsts), spool, dtype=np.int32),
        np.arange(len(firsts), dtype=np.uint32),
        conversations["row"].copy(),
        np.add.reduceat(alive * (most - 1), firsts),
        np.logical_or.reduceat(alive, firsts),
    )


def _require_short(index: SpoolIndex, max_tokens: int, part: Part, first_row: int) -> None:
    conversations, documents = index
    long = np.flatnonzero(documents["length"] > max_tokens)
    if len(long) == 0:
        return
    owners = np.repeat(conversations["row"], conversations["num_documents"])
    first = long[np.argmin(owners[long])]
    place = first_row + int(owners[first]) + (part.kind == "lines")
    problem = (
        f"a document has {documents['length'][first]} tokens, of which at most {max_tokens} fit, "
        "and long_documents is error"
    )
    raise step_error(STEP, "seq_length_mismatch", problem, where=f"{part.path}:{place}")


def require_conversations(source: Source, num_left: int) -> None:
    """Check that a data set has something left.

    Raises:
        NemotronError: ``seq_length_mismatch`` or ``missing_training_data``.
    """
    if num_left:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in source.dropped.most_common())
    problem = (
        f"no rows are left of the {source.rows_read} read ({reasons or 'the files are empty'})"
    )
    is_length = source.dropped["over_long"] * 2 > source.rows_read
    name = "seq_length_mismatch" if is_length else "missing_training_data"
    raise step_error(STEP, name, problem, where=source.dataset.name)


def token_groups(tokens: np.ndarray, *, max_tokens: int) -> list[tuple[int, int]]:
    """Return (start, stop) of runs of conversations of at most about ``max_tokens`` each."""
    number = (np.cumsum(tokens) - tokens) // max_tokens
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens)], strict=True))
