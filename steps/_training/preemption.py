"""Stop requests: SIGTERM or SIGUSR1 to any rank stops all ranks at the same boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from nemotron.steps._training.distributed import Layout

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns both signals into a flag on which the ranks agree; use it as a context.

    A second signal changes nothing. Schedulers send signals to all processes of a job, and torchrun
    passes on those that it gets, so that a rank often gets two for one request.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._is_received = False
        self._previous: dict[int, Any] = {}
        self.is_agreed = False

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self) -> bool:
        """Return whether any rank has been asked to stop; a collective until that is agreed on.

        All ranks must call this at the same places.
        """
        if not self.is_agreed:
            self.is_agreed = self._layout.any_rank(self._is_received)
        return self.is_agreed

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._is_received = True
