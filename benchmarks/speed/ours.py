"""Our side: an ordinary `OPDModule` in an ordinary Lightning `Trainer`."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.speed.stats import Step
from benchmarks.speed.turns import Job, Turns
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

import stable_opd
from stable_opd import (
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PromptDataModule,
    Prompts,
    ReferenceKL,
    ReverseKL,
    StudentOnly,
    ZlibRepetition,
)
from stable_opd.data import Source
from stable_opd.engines import RolloutEngine
from stable_opd.options import RolloutOptions, UpdateOptions

LEARNING_RATE = 1e-6  # so small that the lengths stay what they are


@dataclass(frozen=True)
class Settings:
    """What is trained on what; both sides read it.

    Attributes:
        student: Folder of the student.
        teacher: Folder of the teacher.
        prompts: File of the prompts.
        rows: Answers per step.
        samples: Answers per prompt.
        limit: Token budget of an answer.
        precision: ``32-true``, ``bf16-true`` or ``bf16-mixed``.
        engine: Our side only: the class of the rollout engine; none takes the default.
        whole: Our side only: golden rows and the reference KL too.
        cache: TRL's side only: its ``cache_implementation``.
    """

    student: str
    teacher: str
    prompts: str
    rows: int
    samples: int
    limit: int
    precision: str
    engine: str | None = None
    whole: bool = False
    cache: str | None = None


class Reporter(Callback):
    """Ends a step of the benchmark where Lightning ends a step of the training."""

    def __init__(self, turns: Turns, rows: int) -> None:
        self.turns, self.rows = turns, rows

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first release."""
        trainer.should_stop = not self.turns.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Prompts, batch_idx: int
    ) -> None:
        """Report a step."""
        trainer.should_stop = not self.turns.finish(lambda: facts(trainer, batch, self.rows))


def facts(trainer: Trainer, batch: Prompts, rows: int) -> Step:
    """Return the tokens of the answers, those of prompts and answers, and the seconds of each phase."""
    logged = trainer.callback_metrics
    tokens = round(float(logged["train/length_mean"]) * rows)
    prompts = sum(map(len, batch.ids)) * (rows // len(batch))
    phases = {name: float(logged[f"time/{name}"]) for name in ("rollout", "score", "update")}
    return {"tokens": tokens, "real": tokens + prompts, **phases}


def make_module(settings: Settings, engine: RolloutEngine | None, optimizer: Any, clip: float = 1.0) -> OPDModule:
    """Return the module of the recipe that both sides share: exact reverse KL, mean over all tokens."""
    return OPDModule(
        student=settings.student,
        teacher=LocalTeacher(settings.teacher),
        divergence=ReverseKL(),
        mixture=GoldenMixture() if settings.whole else StudentOnly(),
        repetition=ZlibRepetition(),
        constraints={"anchor": ReferenceKL()} if settings.whole else {},
        engine=engine,
        optimizer=optimizer,
        rollout=RolloutOptions(samples_per_prompt=settings.samples, max_new_tokens=settings.limit),
        update=UpdateOptions(aggregation="token_mean", gradient_clip=clip),
    )


def make_trainer(device: str, precision: str, callback: Callback, steps: int = -1) -> Trainer:
    """Return a trainer that does nothing beside training."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Trainer(
        accelerator=device,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )


def train(job: Job, turns: Turns) -> None:
    """Take steps while released."""
    settings = Settings(**job.settings)
    seed_everything(0, verbose=False)
    engine = getattr(stable_opd, settings.engine)() if settings.engine else None
    # The fused form of AdamW is what TRL takes by default.
    optimizer = partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    data = PromptDataModule(train=Source(settings.prompts), batch_size=settings.rows // settings.samples)
    trainer = make_trainer(job.device, settings.precision, Reporter(turns, settings.rows))
    trainer.fit(make_module(settings, engine, optimizer), data)
