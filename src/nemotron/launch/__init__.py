"""Starting jobs: one backend per executor, chosen by the plan."""

from __future__ import annotations

from nemotron.errors import ExitCode, NemotronError
from nemotron.launch.base import Console, Submission
from nemotron.launch.local import LocalBackend
from nemotron.plan import JobPlan

__all__ = ["Console", "Submission", "submit"]


def submit(plan: JobPlan, console: Console) -> Submission:
    """Run a plan where its profile says, after the last checks.

    Raises:
        NemotronError: A check failed, or the executor cannot be submitted to.
    """
    if plan.executor != "local":
        raise NemotronError(
            "submission_unavailable",
            f"submission through {plan.executor} is not built yet",
            where=f"profile {plan.profile.name}" if plan.profile else "",
            fix="add --dry-run to see the plan, or leave out -r and -b to run on this host",
            exit_code=ExitCode.SUBMISSION,
        )
    return LocalBackend().submit(plan, console)
