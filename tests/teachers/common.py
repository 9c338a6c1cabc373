"""A teacher that tells little, and short runs."""

import torch

from helpers import Recorder, make_trainer
from stable_opd import LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, StudentOnly
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet, Source
from stable_opd.streaming import known_logprobs


class Telling(LocalTeacher):
    """Tells its k likeliest tokens."""

    def __init__(self, path: str, support: str = "topk", told: int = 4):
        super().__init__(path)
        self.support, self.k = support, told

    def score(self, rollout):
        return known_logprobs(super().score(rollout), rollout.completion, self.k)


def module_of(teacher, divergence, student="testbed:student", **parts):
    return OPDModule(
        student,
        teacher,
        divergence,
        StudentOnly(),
        PeriodicSuffix(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        rollout=RolloutOptions(max_new_tokens=24, samples_per_prompt=1),
        **parts,
    )


def steps_of(teacher, divergence, count=2, source="testbed:train", **parts):
    recorder = Recorder()
    data = PromptDataModule(Source(source), EvaluationSet("testbed:validation"), batch_size=8)
    make_trainer(recorder, max_steps=count, limit_val_batches=0).fit(module_of(teacher, divergence, **parts), data)
    return recorder.steps
