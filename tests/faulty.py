"""Callbacks that plant a fault in some steps; spawned processes must be able to import them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback

from stable_opd import Author, Finish
from stable_opd.types import Plan

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


class Uneven(Callback):
    """Leaves the second of two processes little to learn from, or one process with the same prompts.

    Args:
        kind: What becomes of these prompts' rows: they are ``empty``, ``cut`` or ``masked``, or only ``golden`` ones
            stay, and of the other prompts none of these.
        place: File in which the two processes leave the prompts for the one.
    """

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.place = kind, Path(place)

    def on_fit_start(self, trainer, pl_module) -> None:
        self.trainer = trainer
        plan, write = pl_module.mixture.plan, pl_module.write
        pl_module.mixture.plan = lambda prompts, *given: self._planned(plan(prompts, *given), prompts)
        pl_module.write = lambda prompts, plan, *given, **named: self._cut(write(prompts, plan, *given, **named))
        pl_module.repetition.register_forward_hook(self._masked)

    def _planned(self, plan, prompts):
        if self.trainer.world_size == 1:
            known = json.loads(self.place.read_text())
            self.chosen = [place for place, index in enumerate(prompts.index) if index in known]
        else:
            self.chosen = list(range(len(prompts))) if self.trainer.global_rank else []
            if self.trainer.global_rank:
                before = json.loads(self.place.read_text()) if self.place.exists() else []
                self.place.write_text(json.dumps([*before, *prompts.index]))
        rows = list(zip(plan.prompt, plan.author, strict=True))
        if self.kind == "golden":
            rows = [(prompt, author) for prompt, author in rows if (author == Author.GOLDEN) == (prompt in self.chosen)]
        return Plan([prompt for prompt, _ in rows], [author for _, author in rows])

    def _mine(self, rollout):
        self.rows = torch.isin(rollout.prompt, torch.tensor(self.chosen))
        return self.rows

    def _cut(self, rollout):
        mine = self._mine(rollout)
        if self.kind == "empty":
            return _emptied(rollout, mine)
        finish = rollout.finish.masked_fill(mine, int(Finish.LENGTH)) if self.kind == "cut" else rollout.finish
        return replace(rollout, finish=finish)

    def _masked(self, _, inputs, found):
        more = self.rows[inputs[0].row] if self.kind == "masked" else torch.zeros_like(found.in_loop)
        return found._replace(in_loop=found.in_loop | more)


def _emptied(rollout, mine):
    """Return the rollout with rows that have no completion token."""
    kept = ~mine[rollout.row]
    sizes = torch.stack([rollout.prompt_lengths, rollout.lengths], 1).flatten().tolist()
    parts = rollout.tokens.split(sizes)
    gone = [place % 2 == 1 and bool(mine[place // 2]) for place in range(len(parts))]
    return replace(
        rollout,
        tokens=torch.cat([part for part, without in zip(parts, gone, strict=True) if not without]),
        lengths=rollout.lengths.masked_fill(mine, 0),
        behaviour_logprobs=rollout.behaviour_logprobs[kept],
        token_author=rollout.token_author[kept],
        texts=["" if without else text for text, without in zip(rollout.texts, mine.tolist(), strict=True)],
    )
