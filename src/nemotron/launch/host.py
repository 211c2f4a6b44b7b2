"""Running the commands of a scheduler: on this machine, or on a login node through ``ssh``.

The system's ``ssh`` is used, with the user's configuration, agent and known hosts. It runs in batch
mode: where it would ask a question it fails.
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
    """A machine that ``ssh`` reaches by ``name``; this machine if there is no name."""

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
        """Run a command and return its output and exit code, whatever that is.

        Args:
            command: The words of the command; no shell interprets them.
            stdin: What the command reads.
            timeout: Seconds after which it is given up.

        Raises:
            NemotronError: ``host_unreachable``, ``command_missing``, ``host_silent``.
        """
        argv = list(command) if self.is_local else [*self._ssh(), shlex.join(command)]
        try:
            # In a session of its own: the launcher decides what a Ctrl-C in the terminal ends.
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
            raise self._silent(command[0], timeout) from None
        if not self.is_local and done.returncode == _SSH_FAILED:
            raise self._unreachable(done.stderr)
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
                f"{command[0]} on {self.name or 'this host'} failed with {done.returncode}: {said}",
                where=shlex.join(command)[:500],
                fix="run the command there by hand to find out why",
                exit_code=ExitCode.SUBMISSION,
            )
        return done.stdout

    def read_from(self, path: str, offset: int) -> bytes:
        """Return the content of a file from byte ``offset`` on; nothing if there is no file."""
        if self.is_local:
            try:
                with Path(path).open("rb") as stream:
                    stream.seek(offset)
                    return stream.read()
            except FileNotFoundError:
                return b""
        done = self.run(["tail", "-c", f"+{offset + 1}", "--", path])
        return done.stdout if done.returncode == 0 else b""

    def _silent(self, program: str, timeout: float) -> NemotronError:
        return NemotronError(
            "host_silent",
            f"{program} on {self.name or 'this host'} did not answer within {timeout:.0f} s",
            fix="try again; the scheduler may be busy",
            exit_code=ExitCode.SUBMISSION,
        )

    def _unreachable(self, stderr: bytes) -> NemotronError:
        said = stderr.decode(errors="replace").strip().splitlines()
        return NemotronError(
            "host_unreachable",
            f"ssh to {self.name} failed: {said[-1] if said else 'it printed no error'}",
            fix=f"make this work without a prompt: {shlex.join(self._ssh())} true",
            exit_code=ExitCode.SUBMISSION,
        )

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
        f"{program} is not installed on this host",
        fix=fix,
        exit_code=ExitCode.SUBMISSION,
    )
