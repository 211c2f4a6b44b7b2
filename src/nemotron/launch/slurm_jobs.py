"""The state of a Slurm job, from ``scontrol`` or ``sacct``, and what the job has printed.

Works without slurmdbd: ``scontrol`` knows a finished job for some minutes, ``sacct`` knows it where
there is accounting, and after that the exit code is in a file that the job's own batch shell left.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Placement
from nemotron.launch.host import Host
from nemotron.launch.remote import State, ended_silently
from nemotron.launch.script import BATCH_MARK

_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
# How Slurm ends a job that did not end by itself: our exit code, the problem and the fix.
_ENDINGS: dict[str, tuple[ExitCode, str, str]] = {
    "CANCELLED": (ExitCode.INTERRUPTED, "the job was cancelled", ""),
    "TIMEOUT": (
        ExitCode.PREEMPTED,
        "the job reached its time limit",
        "run it again to resume from its newest save, or set signal and requeue in the profile",
    ),
    "PREEMPTED": (ExitCode.PREEMPTED, "the job was preempted", "run it again to continue"),
    "NODE_FAIL": (ExitCode.RANK_DIED, "a node of the job failed", "run it again to continue"),
    "OUT_OF_MEMORY": (
        ExitCode.RANK_DIED,
        "the job ran out of memory",
        "request more memory with mem",
    ),
    "BOOT_FAIL": (ExitCode.SUBMISSION, "a node of the job did not boot", "run it again"),
    "DEADLINE": (ExitCode.SUBMISSION, "the job missed its deadline", "run it again"),
    "REVOKED": (ExitCode.SUBMISSION, "the job was revoked", "run it again"),
}
# What slurmd gives for a signal where it could not start the batch script; nobody sends it.
_NOT_STARTED = 53
# Where nemo-run's trace of a start begins, below what the start before has printed.
_TRACE = b"\nexport PYTHONUNBUFFERED=1\n"
_READ_EXITS = 'cd -- "$1" 2>/dev/null && grep -s "" exit.* /dev/null'
# A job is lost only after this many looks: a file may show up late on another machine.
_TIMES_LOST = 3
# Between two looks at the job's files, and at first between two questions to Slurm.
POLL_SECONDS, POLL_SECONDS_OVER_SSH = 0.5, 3.0
MOST_SECONDS = 10.0  # between two questions later: jobs take days, and Slurm has other users


@dataclass
class SlurmHandle:
    """One job of a Slurm cluster: its state, what it prints, its end."""

    placement: Placement
    poll_seconds: float = field(init=False)
    _offsets: dict[str, int] = field(init=False, default_factory=dict)
    _restarts: int = field(init=False, default=0)
    _marks_seen: int = field(init=False, default=0)
    _first_log: int = field(init=False, default=0)
    _known: State | None = field(init=False, default=None)
    _pause: float = field(init=False, default=0.0)
    _ask_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        place = self.placement
        self._host = Host(place.host, place.user, place.port, place.identity)
        self.poll_seconds = POLL_SECONDS if self._host.is_local else POLL_SECONDS_OVER_SSH

    def state(self) -> State:
        """Return where the job stands.

        The last answer of Slurm is reused for a while, unless the job has left its exit code since.

        Raises:
            NemotronError: The scheduler does not answer.
        """
        if self._known is not None and time.monotonic() < self._ask_at and not self._has_left_end():
            return self._known
        state = self._asked()
        for _ in range(_TIMES_LOST - 1):
            if state.status != "lost":
                break
            time.sleep(self.poll_seconds)
            state = self._asked()
        self._known = None if state.status == "unknown" else state
        self._pause = min(2 * (self._pause or self.poll_seconds), MOST_SECONDS)
        self._ask_at = time.monotonic() + self._pause
        return state

    def new_output(self, *, is_last: bool = False) -> bytes:
        """Return what the job has printed since the last call, the batch shell included.

        Args:
            is_last: The job has ended: hold nothing back.
        """
        place = self.placement
        logs = [
            self._read(f"{place.directory}/log-{place.name}_{place.id}_{restart}.out")
            for restart in range(self._first_log, self._restarts + 1)
        ]
        # Slurm counts a restart before the earlier start has ended, whose last lines may yet come.
        self._first_log = max(0, self._restarts - 1)
        return b"".join([self._batch_output(is_last), *logs])

    def cancel(self) -> None:
        """Ask Slurm to end the job; does nothing if it has ended."""
        if self._from_scontrol() != {}:
            self._host.require(["scancel", self.placement.id])
        self._known, self._pause = None, 0.0

    def _has_left_end(self) -> bool:
        path = f"{self.placement.directory}/code/exit.{self._restarts}"
        return bool(self._host.read_from(path, 0))

    def _read(self, path: str) -> bytes:
        start = self._offsets.get(path, 0)
        block = self._host.read_from(path, start)
        self._offsets[path] = start + len(block)
        return block

    def _batch_output(self, is_last: bool) -> bytes:
        """Return what the batch shell printed below its marks; above each is nemo-run's trace."""
        place = self.placement
        path = f"{place.directory}/sbatch_{place.name}_{place.id}.out"
        start = self._offsets.get(path, 0)
        block = self._read(path)
        if self._marks_seen > self._restarts:
            return block
        *starts, last = (part.partition(b"\n")[2] for part in block.split(BATCH_MARK.encode()))
        if starts:
            self._marks_seen = self._restarts + 1
            earlier = (start.rpartition(_TRACE)[0] or start for start in starts[1:])
            return b"".join([*earlier, last])
        if not is_last:
            self._offsets[path] = start  # the mark may come yet
            return b""
        return block

    def _asked(self) -> State:
        facts = self._from_scontrol()
        is_forgotten = facts == {}
        facts = facts or self._from_sacct()
        if facts:
            self._restarts = int(facts.get("Restarts", self._restarts))
            return self._judged(facts)
        # Only if Slurm has forgotten the job: one that has left an exit code may be queued again.
        return self._from_files() if is_forgotten else State("unknown", "Slurm does not answer")

    def _from_scontrol(self) -> dict[str, str] | None:
        """Return what Slurm knows of the job: {} if it has forgotten it, None without an answer.

        Job numbers start over at Slurm's MaxJobId, and each cluster has its own. A job with the
        same number is this one if it writes where this one does.
        """
        done = self._host.run(["scontrol", "-o", "show", "job", self.placement.id])
        if done.returncode:
            return {} if b"Invalid job id" in done.stderr else None
        text = done.stdout.decode(errors="replace")
        facts = dict(re.findall(r"(\w+)=(\S+)", text))
        directory = self.placement.directory
        if "JobState" not in facts:
            return None
        log = PurePosixPath(facts.get("StdOut", directory))
        return facts if log.is_relative_to(directory) else {}

    def _from_sacct(self) -> dict[str, str] | None:
        command = ["sacct", "-X", "-n", "-P", "-D", "-j", self.placement.id]
        done = self._host.run([*command, "-o", "State,ExitCode,SubmitLine"])
        text = done.stdout.decode(errors="replace")
        found = re.findall(r"^([A-Z_]+)[^|\n]*\|(\d+:\d+)\|(.*)$", text, re.MULTILINE)
        # A job of the same number is ours if its batch script lies beside our task's directory.
        ours = f"{PurePosixPath(self.placement.directory).parent}/"
        lines = [(state, code) for state, code, line in found if not line or ours in line]
        if done.returncode or not lines:
            return None
        state, code = lines[-1]
        # -D: one line for each time that the job was started.
        return {"JobState": state, "ExitCode": code, "Restarts": str(len(lines) - 1)}

    def _from_files(self) -> State:
        """Return how a job that Slurm has forgotten ended, from the files that it left."""
        # One line for each start that ran to an end, such as exit.0:143.
        command = ["sh", "-c", _READ_EXITS, "sh", f"{self.placement.directory}/code"]
        said = self._host.run(command).stdout.decode(errors="replace")
        exits = {int(n): int(code) for n, code in re.findall(r"(?m)^exit\.(\d+):(\d+)$", said)}
        if exits:
            self._restarts = max(exits)
            return self._ended(exits[self._restarts], 0)
        error = NemotronError(
            "job_lost",
            f"Slurm no longer knows job {self.placement.id}, which left no exit code",
            where=self.placement.directory,
            fix="look at the end of the log",
            exit_code=ExitCode.RANK_DIED,
        )
        return State.ended(int(error.exit_code), error.to_dict(), self._restarts, "lost")

    def _judged(self, facts: dict[str, str]) -> State:
        name = facts.get("JobState", "UNKNOWN").rstrip("+")
        reason = facts.get("Reason", "")
        if name in _QUEUED:
            return State("queued", reason=reason, restarts=self._restarts)
        if name in _RUNNING:
            return State("running", reason=facts.get("NodeList", ""), restarts=self._restarts)
        code, _, number = facts.get("ExitCode", "1:0").partition(":")
        if name == "FAILED" and int(number or 0) == _NOT_STARTED:
            return self._not_started(facts.get("NodeList", "its node"))
        if name in ("COMPLETED", "FAILED"):
            return self._ended(int(code), int(number or 0))
        exit_code, problem, fix = _ENDINGS.get(
            name, (ExitCode.FAILED, f"Slurm reports {name}", "look at the end of the log")
        )
        error = NemotronError(f"job_{name.lower()}", problem, fix=fix, exit_code=exit_code)
        status = "cancelled" if name == "CANCELLED" else None
        return State.ended(int(exit_code), error.to_dict(), self._restarts, status)

    def _ended(self, code: int, number: int) -> State:
        if code == 0 and number == 0:
            return State.ended(0, None, self._restarts)
        reported = self._reported()
        if reported is not None:
            return State.ended(int(reported["exit_code"]), reported, self._restarts)
        return ended_silently(128 + number if number else code, self._restarts)

    def _not_started(self, node: str) -> State:
        """Return the end of a job whose log, mostly, its node could not open."""
        error = NemotronError(
            "job_not_started",
            f"{node} could not start the job",
            where=self.placement.directory,
            fix=f"check that compute nodes have {self.placement.directory} and may write there, or "
            "set remote_job_dir to a directory that they have; slurmd's log has the details",
            exit_code=ExitCode.SUBMISSION,
        )
        return State.ended(int(error.exit_code), error.to_dict(), self._restarts)

    def _reported(self) -> dict[str, Any] | None:
        path = f"{self.placement.directory}/code/error.{self._restarts}.json"
        try:
            return json.loads(self._host.read_from(path, 0))
        except ValueError:
            return None
