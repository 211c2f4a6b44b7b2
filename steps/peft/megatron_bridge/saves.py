"""What a run writes at every save: the adapter, the state to resume from, and its lineage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nemotron.steps._training.checkpoint import (
    Origin,
    SaveFailedError,
    fail_together,
    save_adapter,
)
from nemotron.steps._training.loop import Progress, Trainer
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.resume import run_state
from nemotron.steps._training.run_directory import retain_newest
from nemotron.steps.peft.megatron_bridge.start import ResumeSettings


@dataclass(frozen=True)
class Saves:
    """Writes the saves of one run.

    Attributes:
        output: Directory of the run.
        train_iters: Optimizer steps of the run.
        resume: What is saved so that a run can be resumed.
        stop: Whether this save is the last one before the run is stopped.
        origin: Where the adapter comes from.
    """

    output: Path
    train_iters: int
    resume: ResumeSettings
    stop: StopRequest
    origin: Origin

    def save(self, trainer: Trainer, progress: Progress) -> None:
        """Save the adapter; a collective. Unless it is the last save, training survives a failure.

        Raises:
            SaveFailedError: The last save of the run failed.
        """
        try:
            directory = fail_together(trainer.layout, lambda: self._write(trainer, progress))
        except SaveFailedError as error:
            if self.stop.is_agreed or progress.iteration == self.train_iters:
                raise
            trainer.metrics.save_failed(progress.iteration, str(error))
        else:
            trainer.metrics.saved(progress.iteration, directory)

    def _write(self, trainer: Trainer, progress: Progress) -> Path:
        before, now = progress.before, progress.now
        # Losses on other rows, as after a change of eval_iters, cannot be compared.
        if before and now and before.supervised_tokens != now.supervised_tokens:
            before = None
        losses = {
            "valid_loss_before": before.lm_loss if before else None,
            "valid_loss": now.lm_loss if now else None,
            "best_valid_loss": trainer.best.lm_loss if trainer.best else None,
            "best_iteration": trainer.best.iteration if trainer.best else None,
        }
        directory = save_adapter(
            self.output,
            trainer.model,
            layout=trainer.layout,
            iteration=progress.iteration,
            origin=self.origin,
            losses=losses,
            moments=trainer.moments() if self.resume.save_optim else {},
            run_state=run_state(
                train_iters=self.train_iters,
                identity=self.resume.identity,
                before=progress.before,
                is_evaluated=progress.is_evaluated,
                best=trainer.best,
            ),
        )
        if trainer.layout.is_first and self.resume.most_recent_k > 0:
            try:
                retain_newest(self.output, self.resume.most_recent_k, until=progress.iteration)
            except OSError as error:  # the new save is complete
                print(
                    f"warning: earlier saves could not be deleted: {error}",
                    file=sys.stderr,
                    flush=True,
                )
        return directory
