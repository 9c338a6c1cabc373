"""A callback that plants a fault in some steps; spawned processes must be able to import it."""

import os
import signal

import torch
from lightning.pytorch import Callback

NAN = float("nan")


class Fault(Callback):
    """Breaks something in some steps.

    Args:
        what: ``loss`` (of the divergence, and nothing else), ``gradient``, ``teacher``, ``student`` (for good),
            ``weights`` (by the optimizer, for good), an error in the ``rollout``, in the ``optimizer`` or in the
            ``report``, or ``hang``.
        steps: In which steps.
        rank: In which process; none means all.
    """

    def __init__(self, what: str, steps: list[int], rank: int | None = None) -> None:
        self.what, self.steps, self.rank = what, steps, rank
        self.active = False

    def on_fit_start(self, trainer, pl_module) -> None:
        student = pl_module.model
        if self.what == "loss":
            plain = pl_module.divergence.closed_form
            pl_module.divergence.closed_form = lambda *given: self._broken(plain(*given))
        elif self.what == "gradient":
            next(student.parameters()).register_hook(lambda gradient: gradient * NAN if self.active else None)
        elif self.what == "rollout":
            pl_module.sampler.register_forward_pre_hook(self._fail)
        elif self.what == "weights":
            trainer.optimizers[0].register_step_post_hook(lambda *_: self._set(student, NAN) if self.active else None)
        elif self.what == "optimizer":
            trainer.optimizers[0].register_step_post_hook(self._fail)
        elif self.what == "report":
            measure = pl_module.report.measure
            pl_module.report.measure = lambda *given: self._fail() or measure(*given)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        mine = self.rank is None or self.rank == trainer.global_rank
        self.active = mine and trainer.global_step in self.steps
        if not self.active:
            return
        if self.what == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        model = {"teacher": pl_module.readers.teacher.language_model, "student": pl_module.model}.get(self.what)
        if model is not None:
            self.healthy = next(model.parameters())[0, 0].item()
            self._set(model, NAN)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if self.active and self.what == "teacher":
            self._set(pl_module.readers.teacher.language_model, self.healthy)

    def _broken(self, term):
        return term._replace(loss=term.loss * NAN) if self.active else term

    def _fail(self, *_) -> None:
        if self.active:
            raise RuntimeError(f"no {self.what} any more")

    @staticmethod
    @torch.no_grad()
    def _set(model, value) -> None:
        next(model.parameters())[0, 0] = value
