"""A thread per rank that tells the others it lives, and ends this rank when another one does not.

A collective that waits for a stopped process waits until its own timeout, which must be long enough
for the slowest step, and then blames the rank that waited. The beat goes through the rendezvous
store, so it works the same under gloo and NCCL, and does not need the main thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._entry import report
from nemotron.steps._training.distributed import Layout

_LEFT = "left"


class Heartbeat:
    """Watches all ranks of a job; use it as a context.

    Args:
        layout: This rank's groups.
        timeout_seconds: A rank that has been silent for so long ends the job.

    Attributes:
        last_step: Returns this rank's last optimizer step.
    """

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self._rank, self._size = layout.world.rank, layout.world.size
        self._timeout_seconds = timeout_seconds
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self.last_step: Callable[[], int] = int

    def __enter__(self) -> Self:
        if self._size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._size > 1:
            self._thread.join()

    def _watch(self) -> None:
        # A connection of its own: that of the process group may be blocked in a rendezvous.
        store = PrefixStore(
            "heartbeat",
            TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self._timeout_seconds),
            ),
        )
        heard = {rank: ("", time.monotonic()) for rank in range(self._size) if rank != self._rank}
        is_leaving, beat = False, 0
        try:
            while not is_leaving:
                is_leaving = self._leaving.wait(min(1.0, self._timeout_seconds / 4))
                beat += 1
                store.set(str(self._rank), _LEFT if is_leaving else f"{beat} {self.last_step()}")
                for rank, (last, since) in heard.items():
                    text = store.get(str(rank)).decode() if store.check([str(rank)]) else last
                    heard[rank] = (last, since) if text == last else (text, time.monotonic())
                    if text != _LEFT and time.monotonic() - since > self._timeout_seconds:
                        self._end(rank, text)
        except RuntimeError as error:
            # Without the store the launcher is gone, and nobody else would end this rank.
            if not self._leaving.is_set():
                self._end_with(f"the rendezvous store of the job is gone: {error}", "")

    def _end(self, rank: int, text: str) -> None:
        step = text.partition(" ")[2] or "0"
        self._end_with(
            f"rank {rank} has been silent for {self._timeout_seconds} s; its last step was {step}",
            "look at the process and the host of that rank; dist.heartbeat_timeout_seconds is the "
            "limit",
        )

    def _end_with(self, problem: str, fix: str) -> None:
        error = NemotronError("rank_silent", problem, fix=fix, exit_code=ExitCode.RANK_DIED)
        with contextlib.suppress(OSError):
            report(error)
        # The main thread waits in a collective that nothing else would end.
        os._exit(ExitCode.RANK_DIED)
