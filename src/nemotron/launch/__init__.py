"""Starts jobs and follows them, by one backend per executor, which plan or record chooses."""

from __future__ import annotations

from nemotron.launch.base import Console, Output, Submission
from nemotron.launch.check import check_profile
from nemotron.launch.coming_back import cancel, logs, refresh, wait
from nemotron.launch.local import submit_local
from nemotron.launch.remote import OnInterrupt
from nemotron.launch.secrets import refuse_secrets_in_plan
from nemotron.launch.submit import preview, submit_remote
from nemotron.plan import JobPlan

__all__ = [
    "Console",
    "OnInterrupt",
    "Output",
    "Submission",
    "cancel",
    "check_profile",
    "logs",
    "preview",
    "refresh",
    "refuse_secrets_in_plan",
    "submit",
    "wait",
]


def submit(plan: JobPlan, console: Console, *, on_interrupt: OnInterrupt = "ask") -> Submission:
    """Run a plan where its profile says, after the last checks.

    Raises:
        NemotronError: A check failed, or the executor did not take the job.
    """
    if plan.executor == "local":
        return submit_local(plan, console)
    return submit_remote(plan, console, on_interrupt=on_interrupt)
