"""The state of a Lepton job, asked of its workspace through Lepton's own client.

Lepton knows that a job failed, but not with which exit code: ``launch.sh`` prints the exit code as
its last line, and the step's error above it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemotron.errors import ExitCode, NemotronError
from nemotron.executors import LeptonExecution
from nemotron.jobs import Placement
from nemotron.launch.remote import State, ended_silently
from nemotron.launch.script import END_MARK, ERROR_MARK
from nemotron.preflight import Check

POLL_SECONDS = 1.0
_TIMEOUT_SECONDS = 30
_DRAIN_SECONDS = 10.0
_QUEUED = ("Starting", "Queueing", "Awaiting", "PendingRetry", "Restarting")
_RUNNING = ("Running", "Stopping", "Deleting", "UNK")
_REFUSED = (401, 403)


@dataclass
class LeptonHandle:
    """One job of a workspace: its state, what it prints, its end."""

    placement: Placement
    poll_seconds: float = field(init=False)
    _printed: queue.SimpleQueue[bytes] = field(init=False, default_factory=queue.SimpleQueue)
    _readers: dict[str, threading.Thread] = field(init=False, default_factory=dict)
    _has_ended: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.poll_seconds = POLL_SECONDS
        self._client = open_client()

    def state(self) -> State:
        """Return where the job stands.

        Raises:
            NemotronError: The workspace does not answer, or refuses.
        """
        with _asking():
            try:
                job = self._client.job.get(self.placement.id)
            except RuntimeError as error:
                if _http_status(error) != 404:
                    raise
                return _gone(self.placement.id)
        return self._judged(job)

    def new_output(self, *, is_last: bool = False) -> bytes:
        """Return what the job has printed since the last call, all its nodes.

        Args:
            is_last: Wait for what is on its way.
        """
        with contextlib.suppress(NemotronError), _asking():
            for replica in self._client.job.get_replicas(self.placement.id):
                name = replica.metadata.id_
                if name and name not in self._readers:
                    reader = threading.Thread(target=self._read, args=(name,), daemon=True)
                    self._readers[name] = reader
                    reader.start()
        if is_last:
            end = time.monotonic() + _DRAIN_SECONDS
            for reader in self._readers.values():
                reader.join(max(0.0, end - time.monotonic()))
        return b"".join(self._drained())

    def cancel(self) -> None:
        """Stop the job; its record and logs stay in the workspace."""
        with _asking():
            self._client.job.update(self.placement.id, spec={"spec": {"stopped": True}})  # type: ignore[arg-type]

    def _drained(self) -> Iterator[bytes]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._printed.get_nowait()

    def _read(self, replica: str) -> None:
        """Put a node's whole log into the queue; connections that are lost are opened again."""
        seen = 0
        while True:
            is_last = self._has_ended.is_set()
            position = 0
            with contextlib.suppress(Exception):  # a connection that ends is opened again
                for block in self._log(replica):
                    fresh = block[max(0, seen - position) :]
                    position += len(block)
                    seen = max(seen, position)
                    if fresh:
                        self._printed.put(fresh)
            if is_last:
                return
            self._has_ended.wait(self.poll_seconds)

    def _log(self, replica: str) -> Iterator[bytes]:
        texts = self._client.job.get_log(self.placement.id, replica, timeout=_TIMEOUT_SECONDS)
        return (text.encode() for text in texts)

    def _judged(self, job: Any) -> State:
        status = job.status
        name = status.state.value if status and status.state else "UNK"
        if name in _QUEUED:
            return State("queued", reason=name)
        if name in _RUNNING:
            return State("running")
        self._has_ended.set()
        if name == "Stopped":
            return _cancelled("job_cancelled", "the job was stopped")
        is_deleted = name in ("Archived", "Deleted")
        if name == "Completed" or (is_deleted and _succeeded(job)):
            return State.ended(0, None, 0)
        if is_deleted and not status.failed:
            return _cancelled("job_deleted", "the job was deleted before it ended")
        return self._failed()

    def _failed(self) -> State:
        code, error = int(ExitCode.FAILED), None
        with contextlib.suppress(Exception):  # logs can be gone; that it failed is known
            for replica in self._client.job.get_replicas(self.placement.id):
                text = b"".join(self._log(str(replica.metadata.id_))).decode(errors="replace")
                error = error or _reported(text)
                found = re.findall(rf"^{END_MARK} (\d+)$", text, re.MULTILINE)
                code = int(found[-1]) if found and found[-1] != "0" else code
        if error is not None:
            return State.ended(int(error["exit_code"]), error, 0)
        return ended_silently(code, 0)


def open_client() -> Any:
    """Return a client of the workspace that the environment or ``lep login`` names.

    Raises:
        NemotronError: ``workspace_unknown``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from leptonai.api.v2.client import APIClient
    try:
        client = APIClient()
    except Exception as error:
        raise NemotronError(
            "workspace_unknown",
            f"cannot connect to a Lepton workspace: {str(error).splitlines()[0]}",
            fix="run lep login, or export LEPTON_WORKSPACE_ID, LEPTON_WORKSPACE_TOKEN and "
            "LEPTON_WORKSPACE_URL",
            exit_code=ExitCode.SUBMISSION,
        ) from None
    client._timeout = _TIMEOUT_SECONDS
    return client


def has_job(name: str) -> bool:
    """Return whether the workspace has a job of this name.

    Raises:
        NemotronError: The workspace does not answer, or refuses.
    """
    client = open_client()
    with _asking():
        try:
            client.job.get(name)
        except RuntimeError as error:
            if _http_status(error) != 404:
                raise
            return False
    return True


def require_node_group(execution: LeptonExecution) -> None:
    """Refuse a workspace that does not answer, or has no such node group.

    Raises:
        NemotronError: ``workspace_refused``, ``workspace_silent``, ``node_group_unknown``.
    """
    client = open_client()
    with _asking():
        names = [group.metadata.name for group in client.nodegroup.list_all()]
    if execution.node_group not in names:
        raise NemotronError(
            "node_group_unknown",
            f"node_group {execution.node_group!r} is not one of: {', '.join(map(str, names))}",
            where="run.env.node_group",
            fix="correct node_group in the profile",
            exit_code=ExitCode.SUBMISSION,
        )


def check_workspace(execution: LeptonExecution) -> Iterator[Check]:
    """Yield the checks of a profile that its workspace can answer."""
    require_node_group(execution)
    yield Check("ok", f"the workspace answers; node group {execution.node_group} exists")
    wanted = dict.fromkeys((*execution.secrets, *execution.secret_vars.values()))
    if not wanted:
        return
    with _asking():
        known = {secret.name for secret in open_client().secret.list_all()}
    for name in wanted:
        if name in known:
            yield Check("ok", f"the workspace has the secret {name}")
            continue
        error = NemotronError(
            "secret_missing",
            f"the workspace has no secret {name}",
            where="secrets and secret_vars of the profile",
            fix="create it in the workspace, or correct the name",
            exit_code=ExitCode.PREFLIGHT,
        )
        yield Check("failed", error.problem, error)


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Turn what the client raises into errors of ours, which never contain a token."""
    try:
        yield
    except NemotronError:
        raise
    except Exception as error:
        status = _http_status(error)
        said = re.sub(r"\s+", " ", str(error))[:300]
        if status in _REFUSED:
            code, fix = "workspace_refused", "check LEPTON_WORKSPACE_TOKEN, or run lep login again"
        elif status is None:
            code, fix = "workspace_silent", "check LEPTON_WORKSPACE_URL and the network; try again"
        else:
            code, fix = (
                "workspace_failed",
                "try again; if it persists, ask the workspace's administrators",
            )
        raise NemotronError(
            code, f"Lepton: {said}", fix=fix, exit_code=ExitCode.SUBMISSION
        ) from None


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _succeeded(job: Any) -> bool:
    """Return whether all nodes of a job have ended well."""
    return (job.status.succeeded or 0) >= (job.spec.completions or 1)


def _cancelled(code: str, problem: str) -> State:
    error = NemotronError(code, problem, exit_code=ExitCode.INTERRUPTED)
    return State.ended(int(error.exit_code), error.to_dict(), 0, "cancelled")


def _gone(job: str) -> State:
    problem = f"the workspace no longer has job {job}"
    error = NemotronError("job_gone", problem, exit_code=ExitCode.RANK_DIED)
    return State.ended(int(error.exit_code), error.to_dict(), 0, "lost")


def _reported(text: str) -> dict[str, Any] | None:
    for line in text.splitlines():
        if line.startswith(ERROR_MARK):
            with contextlib.suppress(ValueError):
                return json.loads(line.removeprefix(ERROR_MARK))
    return None
