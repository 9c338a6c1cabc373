"""Checkpoints from which a killed run goes on as if it had not been killed."""

import csv
import io
import os
import pickle
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.tensor import DTensor

from stable_opd.models import is_finite
from stable_opd.processes import end_launched
from stable_opd.resume import changes, checkpoint_path, checkpoints, peek, refusal, step_of
from stable_opd.skips import NonFiniteError

#: Exit status of a run that was told to stop, as a shell reports it.
STOPPED = 128 + signal.SIGTERM

GIB = 2**30


class RunCheckpoint(Checkpoint):
    """Saves all that a run consists of between two steps, and stops between two steps when it is told to.

    Written are ``checkpoints/last-step=<n>.ckpt`` in the run's folder: after each evaluation, every so many steps, at
    the end, and before the run ends by SIGTERM, or by SIGUSR1 under Slurm, which queues the job again. The step and the
    evaluation that are under way are finished first; the exit status is 143. A file appears under its name only when it
    is whole, and the rows of ``metrics.csv`` up to there are in it.

    Args:
        every_n_steps: Optimizer steps after which a checkpoint is written, whether there was an evaluation or not.
        keep: Checkpoints that are kept, the newest ones; the others are there if the newest turns out to be damaged.
        accept_changes: Whether a run may go on from the checkpoint of another configuration.

    Raises:
        ValueError: If ``every_n_steps`` or ``keep`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2, accept_changes: bool = False) -> None:
        super().__init__()
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"Expected every_n_steps and keep of at least 1, but got {every_n_steps} and {keep}. "
                "Set trainer.enable_checkpointing=false to save nothing."
            )
        self.every_n_steps, self.keep, self.accept_changes = every_n_steps, keep, accept_changes
        #: The resolved configuration, if the run has one; it is saved, so that a changed one is noticed.
        self.config: Mapping[str, Any] | None = None
        self._told: int | None = None
        self._saved_at: int | None = None
        self._began: int | None = None
        self._metrics: str | None = None
        self._evaluated, self._between_steps = False, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that checkpoints can be written, before there is anything to lose.

        Raises:
            OSError: If the folder cannot be written to, or if there is no room in it.
        """
        self._told, folder = None, self._folder(trainer)
        problem = _problem(folder, _state_bytes(pl_module)) if trainer.is_global_zero and folder else None
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise OSError(problem)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning has set its own handlers just before."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, and save nothing where the run begins."""
        self._listen()
        self._saved_at = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there was an evaluation; not all that belongs to it is done yet."""
        self._evaluated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps, when all of the last one is done: save if it is time, and stop if told to.

        Raises:
            SIGTERMException: If the run was told to stop.
        """
        # All of them stop if one was told, as the others would wait for it.
        told = trainer.strategy.reduce_boolean_decision(self._told is not None, all=False)
        if told or self._evaluated or trainer.global_step % self.every_n_steps == 0:
            self._between_steps = True
            self._save(trainer)
            self._evaluated, self._between_steps = False, False
        if told:
            self._stop(trainer)
        self._began = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note that the step is over."""
        self._began = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before a step that failed before the optimizer took it, and say where the run goes on.

        One process alone cannot save. So of several, only those that fail together do.
        """
        if not isinstance(exception, Exception) or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.world_size > 1 and not isinstance(exception, NonFiniteError):
            if isinstance(exception, torch.distributed.DistError) or "gloo" in str(exception):
                exception.add_note(
                    f"Process {trainer.global_rank} of {trainer.world_size} ends. It was waiting for another one, "
                    "which has ended or does not answer: see what that one says. The same command goes on from the "
                    "last checkpoint with --ckpt_path last."
                )
            end_launched(trainer)
            return
        if self._began is None or self._folder(trainer) is None or not _untouched(trainer, self._began):
            return
        self._between_steps = True
        try:
            self._save(trainer)
        except (OSError, ArithmeticError) as error:
            exception.add_note(str(error))
        else:
            exception.add_note(
                f"The state after {self._began} steps, before the one that failed, is kept. The same command goes on "
                "from there with --ckpt_path last."
            )
        finally:
            self._between_steps = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration, and the text of ``metrics.csv`` if it is complete."""
        return {"config": self.config, "metrics": self._metrics}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have Lightning's counters say that one step is over and the next has not begun.

        The batch of the next step has been fetched already. And as Lightning takes counters that all agree for those of
        a run that is still to evaluate, one of them does not: it then counts the last step when the run goes on.
        """
        if not self._between_steps:
            return
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        done = progress["total"]["completed"]
        progress["total"] |= {"ready": done, "started": done - 1}
        progress["is_last_batch"] = False
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = done - 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the metrics of a checkpoint.

        Raises:
            ValueError: If it is of another configuration, and that was not accepted.
        """
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.state.fn != TrainerFn.FITTING or saved is None:
            return
        if self.config is not None and saved["config"] is not None:
            different = changes(saved["config"], self.config)
            if different and not self.accept_changes:
                raise ValueError(refusal(different, f"step {checkpoint['global_step']}"))
            if different:
                rank_zero_warn(f"The run goes on with another configuration: {'; '.join(different)}.")
        logger = _csv_logger(trainer)
        if logger is not None and saved["metrics"]:
            # The logger deletes what is there when it opens a folder.
            logger.experiment.metrics[:0] = list(csv.DictReader(io.StringIO(saved["metrics"])))
            logger.save()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning's own handlers talk to the other processes, or save, in the middle of whatever is going on.
        signal.signal(signal.SIGTERM, self._note)
        if SLURMEnvironment.detect():
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, _: Any) -> None:
        self._told = number

    def _stop(self, trainer: Trainer) -> None:
        step = trainer.global_step
        rank_zero_info(f"Told to stop after step {step}; the same command goes on from there with --ckpt_path last.")
        if self._told == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        # The process that launched the others would kill itself if one of them failed before it ends.
        raise SIGTERMException(STOPPED if trainer.is_global_zero else 0)

    def _folder(self, trainer: Trainer) -> Path | None:
        """Return where checkpoints are written; None if nothing is to be left behind."""
        folder = trainer.log_dir or trainer.default_root_dir  # processes agree on it, so all of them ask
        return None if trainer.fast_dev_run else Path(folder) / "checkpoints"  # type: ignore[attr-defined]

    def _save(self, trainer: Trainer) -> None:
        step, folder = trainer.global_step, self._folder(trainer)
        if folder is None or step == self._saved_at:
            return
        if not trainer.strategy.reduce_boolean_decision(_finite(trainer.lightning_module)):
            raise ArithmeticError(
                f"Expected finite weights after step {step}, but got some that are not, and did not save them. "
                f"{_left(folder)}. Go on from there with a lower learning rate."
            )
        path = checkpoint_path(folder, step)
        part = path.with_name(f".{path.name}.part")
        for logger in trainer.loggers:
            logger.save()
        self._metrics = _read_metrics(trainer)
        if trainer.is_global_zero:
            _remove(part)  # half of one, by a process that was killed
        try:
            trainer.save_checkpoint(part, weights_only=False)
            if trainer.is_global_zero:
                _put(part, path)
                _forget(folder, step, self.keep)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise OSError(_failure(folder, step, error)) from error
        finally:
            self._metrics = None
            if trainer.is_global_zero:
                _remove(part)
        self._saved_at = step
        trainer.strategy.barrier("RunCheckpoint")


def _csv_logger(trainer: Trainer) -> CSVLogger | None:
    """Return the logger that writes ``metrics.csv``, on the process that does."""
    loggers = [each for each in trainer.loggers if isinstance(each, CSVLogger)]
    return loggers[0] if loggers and trainer.is_global_zero else None


def _read_metrics(trainer: Trainer) -> str | None:
    logger = _csv_logger(trainer)
    path = Path(logger.experiment.metrics_file_path) if logger is not None else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _state_bytes(module: LightningModule) -> int:
    """Return about how large a checkpoint is, with an optimizer that keeps two numbers per parameter, such as AdamW."""
    saved = [each for each in module.parameters() if each.requires_grad or module.strict_loading]
    return sum(each.numel() * each.element_size() * (3 if each.requires_grad else 1) for each in saved)


def _problem(folder: Path, size: int) -> str | None:
    """Return why checkpoints cannot be written, or None."""
    probe = folder / ".probe"
    way_out = "Name a folder on another disk by trainer.logger.save_dir."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return f"Expected to write checkpoints to {folder}, but got {type(error).__name__}: {error}. {way_out}"
    more = 1 if checkpoints(folder) else 2  # a new one is written beside the old one
    free = shutil.disk_usage(folder).free
    if free >= more * size:
        return None
    return (
        f"Expected room for {more} checkpoints of about {size / GIB:.2f} GiB in {folder}, but got {free / GIB:.2f} "
        f"GiB. {way_out}"
    )


def _put(part: Path, path: Path) -> None:
    """Give a checkpoint its name once it is on the disk and can be read; a sharded strategy writes a folder."""
    peek(part)
    for each in [part, *(sorted(part.rglob("*")) if part.is_dir() else []), part.parent]:
        _flush(each)
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest; what lies ahead of this step is from a course that was given up."""
    found = checkpoints(folder)
    kept = [each for each in found if step_of(each) <= step][:keep]
    for each in found:
        if each not in kept:
            _remove(each)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _failure(folder: Path, step: int, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    way_out = "Make room" if isinstance(error, OSError) else "Let callbacks and components save plain values only"
    return (
        f"Could not write the checkpoint of step {step} to {folder}: {type(error).__name__}: {reason}. "
        f"{_left(folder)}. {way_out}, and start the same command again with --ckpt_path last."
    )


def _left(folder: Path) -> str:
    left = checkpoints(folder)
    return f"The checkpoint of step {step_of(left[0])} is whole" if left else "There is no earlier one"


def _finite(module: LightningModule) -> bool:
    """Return whether what is trained is finite; of sharded weights, whether this process's part is."""
    learning = (each.detach() for each in module.parameters() if each.requires_grad)
    return all(is_finite(each.to_local() if isinstance(each, DTensor) else each) for each in learning)


def _untouched(trainer: Trainer, step: int) -> bool:
    """Return whether the optimizer has neither taken nor begun to take the step after so many."""
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    return trainer.global_step == step and steps.ready == steps.completed


def _requeue() -> None:
    """Have Slurm run the job again."""
    task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = "_".join(task) if all(task) else os.environ.get("SLURM_JOB_ID", "")  # type: ignore[arg-type]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Slurm did not take the job again: {getattr(error, 'stderr', None) or error}.")
