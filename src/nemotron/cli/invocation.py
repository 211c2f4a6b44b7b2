"""The command line as it was typed, split where the user ends it with ``--``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Invocation:
    """All arguments of one call, without the program."""

    argv: list[str]

    @property
    def words(self) -> list[str]:
        """The part that nemotron itself reads: everything before ``--``."""
        return self.argv[: self._end]

    @property
    def passthrough(self) -> list[str]:
        """The part that goes to the run module verbatim: everything after ``--``."""
        return self.argv[self._end + 1 :]

    @property
    def is_json(self) -> bool:
        """Whether results and errors are wanted as JSON."""
        return "--json" in self.words

    @property
    def is_debug(self) -> bool:
        """Whether tracebacks are wanted."""
        return "--debug" in self.words

    @property
    def _end(self) -> int:
        return self.argv.index("--") if "--" in self.argv else len(self.argv)
