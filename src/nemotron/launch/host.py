"""Running commands where a scheduler is: on this machine, or on a login node through ``ssh``.

The system's ``ssh`` is used, with the user's configuration, agent and known hosts; it never asks.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron.errors import ExitCode, NemotronError

_TIMEOUT_SECONDS = 60
_SSH_FAILED = 255


@dataclass(frozen=True)
class Host:
    """This machine; where ``name`` is given, a machine that ``ssh`` reaches."""

    name: str | None = None
    user: str | None = None
    port: int | None = None
    identity: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether commands run on this machine."""
        return self.name is None

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = _TIMEOUT_SECONDS,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command and return what it said; its exit code is the caller's to judge.

        Args:
            command: The words of the command; none is read by a shell.
            stdin: What it reads.
            timeout: Seconds.

        Raises:
            NemotronError: ``host_unreachable``, ``command_missing``, ``host_silent``.
        """
        argv = list(command) if self.is_local else [*self._ssh(), shlex.join(command)]
        try:
            # In a session of its own: what Ctrl-C of the terminal ends is decided by the launcher.
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                timeout=timeout,
                check=False,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise _missing(argv[0]) from None
        except subprocess.TimeoutExpired:
            raise NemotronError(
                "host_silent",
                f"{command[0]} on {self.name or 'this host'} did not answer in {timeout:.0f} s",
                fix="try again; the scheduler may be busy",
                exit_code=ExitCode.SUBMISSION,
            ) from None
        if not self.is_local and done.returncode == _SSH_FAILED:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise NemotronError(
                "host_unreachable",
                f"ssh to {self.name} failed: {said[-1] if said else 'it said nothing'}",
                fix=f"make this work without a question: {shlex.join(self._ssh())} true",
                exit_code=ExitCode.SUBMISSION,
            )
        return done

    def require(
        self, command: Sequence[str], *, stdin: bytes = b"", timeout: float = _TIMEOUT_SECONDS
    ) -> bytes:
        """Run a command that must succeed; return its standard output.

        Raises:
            NemotronError: ``command_failed``, and what ``run`` raises.
        """
        done = self.run(command, stdin=stdin, timeout=timeout)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-2000:]
            raise NemotronError(
                "command_failed",
                f"{command[0]} on {self.name or 'this host'} ended with {done.returncode}: {said}",
                where=shlex.join(command)[:500],
                fix="run the command there by hand",
                exit_code=ExitCode.SUBMISSION,
            )
        return done.stdout

    def read_from(self, path: str, offset: int) -> bytes:
        """Return what a file holds from a byte on; nothing if it is not there."""
        if self.is_local:
            try:
                with Path(path).open("rb") as stream:
                    stream.seek(offset)
                    return stream.read()
            except FileNotFoundError:
                return b""
        done = self.run(["tail", "-c", f"+{offset + 1}", "--", path])
        return done.stdout if done.returncode == 0 else b""

    def _ssh(self) -> list[str]:
        assert self.name is not None  # noqa: S101 - not this machine
        argv = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"]
        argv += ["-p", str(self.port)] if self.port else []
        argv += ["-i", str(Path(self.identity).expanduser())] if self.identity else []
        argv += ["-l", self.user] if self.user else []
        return [*argv, self.name]


def _missing(program: str) -> NemotronError:
    fix = 'run this on a login node of the cluster, or set tunnel = "ssh" in the profile'
    if program == "ssh":
        fix = 'install it, or run this on a login node of the cluster with tunnel = "local"'
    return NemotronError(
        "command_missing",
        f"there is no {program} on this host",
        fix=fix,
        exit_code=ExitCode.SUBMISSION,
    )
