"""On-policy distillation of language models that does not collapse."""

from stable_opd.constraints import Constraint, ReferenceKL
from stable_opd.data import PromptDataModule
from stable_opd.divergences import (
    AdvantageDivergence,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    TeacherTopK,
)
from stable_opd.engines import InProcessEngine, LoopStop, RolloutEngine, TransformersEngine
from stable_opd.mixtures import GoldenMixture, Mixture, StudentOnly
from stable_opd.module import OPDModule
from stable_opd.registry import Component, build, components
from stable_opd.repetition import PeriodicSuffix, RepetitionDetector, ZlibRepetition
from stable_opd.samplers import Sampler, Temperature, TopP
from stable_opd.schedules import Cosine, Linear, Schedule
from stable_opd.tasks import ExactMatch, ModularChains, Task
from stable_opd.teachers import LocalTeacher, Teacher
from stable_opd.types import Author, Evidence, Finish, Plan, Prompts, Repetition, Rollout, Scores, TokenLoss

__all__ = [
    "AdvantageDivergence",
    "Author",
    "Component",
    "Constraint",
    "Cosine",
    "Divergence",
    "Evidence",
    "ExactMatch",
    "Finish",
    "ForwardKL",
    "GoldenMixture",
    "InProcessEngine",
    "JensenShannon",
    "Linear",
    "LocalTeacher",
    "LoopStop",
    "Mixture",
    "ModularChains",
    "OPDModule",
    "PeriodicSuffix",
    "Plan",
    "PromptDataModule",
    "Prompts",
    "ReferenceKL",
    "Repetition",
    "RepetitionDetector",
    "ReverseKL",
    "Rollout",
    "RolloutEngine",
    "SampledReverseKL",
    "Sampler",
    "Schedule",
    "Scores",
    "StudentOnly",
    "Task",
    "Teacher",
    "TeacherTopK",
    "Temperature",
    "TokenLoss",
    "TopP",
    "TransformersEngine",
    "ZlibRepetition",
    "build",
    "components",
]
